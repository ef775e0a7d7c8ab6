"""Drift pages: curves against clips whose drift is known, the toy world's exact scores,
refusals.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.pipelines.video_io import write_mp4
from rcm.worlds.toy_world import ToyWorld
from scripts import drift_report
from scripts.drift_report import main, measure


def clip(frames: int = 64, *, fade: float = 0.0, blur: float = 0.0, slow: bool = False, blink: bool = False) -> torch.Tensor:
    """A textured picture that slides, and gets darker, softer, slower or blinks as it goes on."""
    base = torch.rand(3, 32, 256, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6
    out = []
    for i in range(frames):
        share = i / (frames - 1)
        at = int(i * (0.4 if slow and share > 0.5 else 1)) + (int(frames * 0.3) if slow and share > 0.5 else 0)
        frame = base[:, :, at : at + 48]
        soft = torch.nn.functional.avg_pool2d(frame, 3, stride=1, padding=1)
        frame = frame + blur * share * (soft - frame) - fade * share
        out.append(frame + (0.3 if blink and share > 0.5 and i % 2 else 0.0))
    return torch.stack(out, dim=1).clamp(-1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("videos")
    for name, options in {
        "steady": {},
        "fading": {"fade": 0.5},
        "soft": {"blur": 1.0},
        "slow": {"slow": True},
        "blink": {"blink": True},
    }.items():
        write_mp4(made / f"{name}.mp4", clip(**options), fps=16, crf=0)
    return made


def test_each_curve_tells_its_own_drift(folder):
    found = {p.stem: measure(p.stem, str(p), window=8, features=None, toy=None) for p in folder.glob("*.mp4")}
    shifts = {name: {curve: d.shift(curve) for curve in d.curves} for name, d in found.items()}
    assert all(len(d.curves["colour"]) == 8 and d.num_frames == 64 for d in found.values())
    assert shifts["fading"]["colour"] > 5 * abs(shifts["steady"]["colour"]) and shifts["fading"]["colour"] > 0.1
    assert shifts["soft"]["sharpness"] < -0.3 < -0.1 < shifts["steady"]["sharpness"]
    assert shifts["slow"]["motion"] < 0.7 * -abs(shifts["steady"]["motion"]) and shifts["slow"]["motion"] < -2
    assert shifts["blink"]["flicker"] > 10 * abs(shifts["steady"]["flicker"]) + 1


def test_a_page_of_several_videos(folder, tmp_path, capsys):
    words = [f"{name}={folder / name}.mp4" for name in ("steady", "fading")]
    assert main([*words, "--out", str(tmp_path / "page"), "--window", "8", "--no-features"]) == 0
    data = json.loads((tmp_path / "page" / "report.json").read_text())
    assert [chart["title"] for chart in data["charts"]] == ["Colour", "Sharpness", "Motion", "Flicker"]
    assert [[line["name"], len(line["points"])] for line in data["charts"][0]["lines"]] == [["steady", 8], ["fading", 8]]
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<svg") >= 4 and "fading" in page and "data:image/png" in page
    assert "fading: 64 frames; last quarter less first: colour" in capsys.readouterr().out


def test_the_toy_world_scores_itself(tmp_path):
    world = ToyWorld()
    scenes = world.scenes(1, seed=3)
    prompt = world.captions(scenes)[0]
    whole = world.render(scenes)[0]
    assert whole.shape[1] == 17
    # the second window shows nothing
    long = torch.cat([whole, torch.full_like(whole[:, :16], -0.9)], dim=1)
    write_mp4(tmp_path / "toy.mp4", long, fps=16, scale=8, crf=0)
    assert main([f"a={tmp_path / 'toy.mp4'}", "--out", str(tmp_path / "o"), "--window", "8", "--no-features", "--toy_prompt", prompt]) == 0
    chart = json.loads((tmp_path / "o" / "report.json").read_text())["charts"][-1]
    assert chart["title"] == "Adherence"
    points = chart["lines"][0]["points"]
    first, second = (y for _, y in points)
    assert [x for x, _ in points] == [0, 1.0], "its own windows of 16 frames, whatever --window is"
    assert first > 90 and second < 50


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x=none.mp4"], "none.mp4"),
        (["FOLDER/steady.mp4", "steady=FOLDER/soft.mp4"], "two videos are called steady"),
        (["FOLDER/steady.mp4", "--window", "2"], "--window 2 must be at least 3"),
        (["FOLDER/steady.mp4", "--window", "9" * 20], "--window 99999999999999999999 must be"),
        (["FOLDER/steady.mp4", "--window", "40"], "fewer than two windows of 40"),
        (["FOLDER/steady.mp4", "--toy_prompt", "a purple dragon"], "dragon|purple"),
    ],
)
def test_refusals(folder, tmp_path, capsys, words, sentence):
    assert main([*(w.replace("FOLDER", str(folder)) for w in words), "--no-features", "--out", str(tmp_path / "o")]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_without_the_networks_weights_the_sentence_names_the_way_around(folder, tmp_path, capsys, monkeypatch):
    def absent(**_: object) -> None:
        raise ConfigError("the weights are not installed")

    monkeypatch.setattr(drift_report, "FrameFeatures", absent)
    assert main([f"{folder}/steady.mp4", "--out", str(tmp_path / "o")]) == 2
    assert "not installed; --no-features" in capsys.readouterr().err
