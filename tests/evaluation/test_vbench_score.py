"""Totals against every published row, refusals by name, the way through VBench's own environment (a
stand-in for it), and explanations.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_explain import explain, published_side, run_side, told
from rcm.evaluation.vbench_files import FILES, cache_folder, files_for, problems
from rcm.evaluation.vbench_hooks import read_vision_reward, vision_reward_command
from rcm.evaluation.vbench_launch import Launch, prepare
from rcm.evaluation.vbench_manifest import EVAL_INFO
from rcm.evaluation.vbench_results import read_results
from rcm.evaluation.vbench_sampling import SuiteRun, sample_suite
from rcm.evaluation.vbench_score import I2V, T2V, Suite, aggregate, table
from scripts.vbench_env import main as env_main
from scripts.vbench_score import ASSETS, main
from tests.evaluation.test_vbench_sampling import Noise, items
from tests.hygiene.source import ROOT

PUBLISHED = json.loads((ASSETS / "published_rows.json").read_text())
MISPRINTED = {"FlashVideo (8 fps)": 0.1036, "DMD2-v Wan2.1-1.3B 4-step shift 5": 0.198}
"""Rows that contradict themselves by this much (percent): in their semantic score, in their total.
"""
REAL = Path(os.environ.get("RCM_VBENCH_PYTHON", ROOT / ".venv-vbench" / "bin" / "python"))


def constant(suite: Suite, value: float) -> dict[str, float]:
    return dict.fromkeys(suite.names, value)


@pytest.mark.parametrize("name", PUBLISHED["rows"])
def test_published_rows_add_up(name: str) -> None:
    row = PUBLISHED["rows"][name]
    score = aggregate({d: v / 100 for d, v in zip(PUBLISHED["dimensions"], row["values"], strict=True)})
    found = {"quality": score.groups["quality"], "semantic": score.groups["semantic"], "total": score.total}
    off = max(abs(100 * found[key] - row[key]) for key in found)
    assert off == pytest.approx(MISPRINTED[name], abs=1e-3) if name in MISPRINTED else off < 0.015


@pytest.mark.parametrize("name", PUBLISHED["totals"])
def test_published_totals_follow_from_their_groups(name: str) -> None:
    row = PUBLISHED["totals"][name]
    weights = T2V.group_weights
    off = abs(sum(weights[group] * row[group] for group in weights) / sum(weights.values()) - row["total"])
    assert off == pytest.approx(MISPRINTED[name], abs=1e-3) if name in MISPRINTED else off < 0.015


def test_there_are_59_rows_and_20_totals() -> None:
    assert (len(PUBLISHED["rows"]), len(PUBLISHED["totals"])) == (59, 20)
    assert tuple(PUBLISHED["dimensions"]) == T2V.names


@pytest.mark.parametrize(
    ("value", "quality", "semantic", "total"),
    [
        (1.0, 1.0013194353, 1.6912550770, 1.1393065636),
        (0.5, 0.1433608590, 0.8454518533, 0.2837790579),
        (0.0, -0.7145977172, -0.0003513703, -0.5717484478),
    ],
)
def test_exact_values_and_no_clamp(value: float, quality: float, semantic: float, total: float) -> None:
    score = aggregate(constant(T2V, value))
    assert score.groups == pytest.approx({"quality": quality, "semantic": semantic}, abs=1e-9)
    assert score.total == pytest.approx(total, abs=1e-9)


def test_bounds_map_to_zero_and_one() -> None:
    for suite in (T2V, I2V):
        low = aggregate({d.name: d.low for d in suite.dimensions}, suite)
        high = aggregate({d.name: d.high for d in suite.dimensions}, suite)
        assert low.total == pytest.approx(0, abs=1e-12) and high.total == pytest.approx(1, abs=1e-12)
    # cosines may be negative, and beyond 1 by rounding
    assert aggregate(constant(T2V, 0.5) | {"temporal_style": -0.1, "subject_consistency": 1.0000002}).total


def test_image_to_video_by_hand() -> None:
    raw = {"i2v_subject": 0.9, "i2v_background": 0.95, "camera_motion": 0.3, "subject_consistency": 0.95, "background_consistency": 0.96}
    raw |= {"motion_smoothness": 0.98, "dynamic_degree": 0.4, "aesthetic_quality": 0.6, "imaging_quality": 0.7}
    image = ((0.9 - 0.1462) / 0.8538 + (0.95 - 0.2615) / 0.7385 + 0.1 * 0.3) / 2.1
    quality = [(0.95 - 0.1462) / 0.8538, (0.96 - 0.2615) / 0.7385, (0.98 - 0.706) / 0.2915, 0.5 * 0.4, 0.6, 0.7]
    score = aggregate(raw, I2V)
    assert score.groups == pytest.approx({"i2v": image, "quality": sum(quality) / 5.5})
    assert score.total == pytest.approx((image + sum(quality) / 5.5) / 2)


@pytest.mark.parametrize(
    ("change", "told_"),
    [
        ({"scene": None}, "no result for scene"),
        ({"scene": float("nan")}, "the result of scene is nan"),
        ({"color": True}, "the result of color is True"),
        ({"imaging_quality": 67.0}, "imaging_quality is 67, expected 0 to 1"),
        ({"color": -0.3}, "color is -0.3, expected 0 to 1"),
        ({"temporal_style": -1.1}, "temporal_style is -1.1, expected -1 to 1"),
        ({"color": 10**400}, "no finite number"),
        ({"colour": 0.5}, "colour: no dimension of the suite t2v"),
    ],
)
def test_what_is_missing_or_no_number_is_refused_by_name(change: dict, told_: str) -> None:
    raw = {name: value for name, value in (constant(T2V, 0.5) | change).items() if value is not None}
    with pytest.raises(ConfigError, match=told_):
        aggregate(raw)


def test_a_partial_score_says_so() -> None:
    score = aggregate({"temporal_flickering": 0.99, "scene": 0.5}, partial=True)
    assert score.partial and score.to_dict()["partial"] and len(score.missing) == 14
    assert "PARTIAL: 14 of 16" in table(score)
    alone = aggregate({"scene": 0.5}, partial=True)
    assert alone.total is None and "not defined" in table(alone)


def write_result(folder: Path, name: str, score: float, *, file: str | None = None, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    videos = [{"video_path": f"x/prompt {i}-0.mp4", "video_results": score} for i in range(count)]
    (folder / f"{file or name}_eval_results.json").write_text(json.dumps({name: [score, videos]}))


def test_results_are_read_and_doubles_refused(tmp_path: Path) -> None:
    write_result(tmp_path, "scene", 0.4)
    write_result(tmp_path, "human action", 0.9, file="results_2026-01-01-10:00:00")
    found = read_results(tmp_path)
    assert (found["scene"].score, found["scene"].num_videos, found["human_action"].score) == (0.4, 3, 0.9)
    write_result(tmp_path, "scene", 0.5, file="again")
    with pytest.raises(ConfigError, match=r"scene is in again_eval_results.json and in scene_eval_results.json"):
        read_results(tmp_path)
    (tmp_path / "again_eval_results.json").write_text('{"color": [NaN, []]}')
    with pytest.raises(ConfigError, match=r"gives nan for color"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "told_"),
    [
        (b"", "is not JSON"),
        (b"[" * 10**5, "is not JSON"),
        (b'[{"scene": 0.4}]', "must hold an object"),
        (b'{"scene": [0.4, []], "scene": [0.9, []]}', "the key 'scene' is given twice"),
        (b'{"human_action": 0.4, "human action": 0.4}', "human_action is in x_eval_results.json and in x_"),
        (b'{"scene": ["0.4", []]}', "gives '0.4' for scene, no finite number"),
        (b'{"scene": [1' + b"0" * 400 + b", []]}", "no finite number"),
        (b'{"made": "2026-01-01"}', "for made, no finite number; .* take the key out if it is no dimension"),
        (b'{"scene": [0.4, [{"video_path": "a/p-0.mp4"}, {"video_path": "b/p-0.mp4"}]]}', "counts 'p-0.mp4' 2 times in scene"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, text: bytes, told_: str) -> None:
    (tmp_path / "x_eval_results.json").write_bytes(text)
    with pytest.raises(ConfigError, match=told_):
        read_results(tmp_path)


def test_results_as_other_programs_leave_them(tmp_path: Path) -> None:
    (tmp_path / "a_eval_results.json").write_bytes(b'\xef\xbb\xbf{"scene": 0.4, "color": [0.5, [{"video_path": 5}]]}')
    videos = [{"video_path": f"p-{i}.mp4", "video_results": 0.5} for i in range(2)]
    (tmp_path / "b_eval_results.json").write_text(json.dumps({"camera_motion": [0.3, {"pan": 0.3}, videos]}))
    assert {name: (r.score, r.num_videos) for name, r in read_results(tmp_path).items()} == {
        "scene": (0.4, 0),
        "color": (0.5, 0),
        "camera_motion": (0.3, 2),
    }


def test_a_total_of_fewer_videos_than_the_suite_has_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in T2V.names:
        write_result(tmp_path, name, 0.5, count=430 if name in ("scene", "background_consistency") else 500)
    assert main(["--result_dir", str(tmp_path)]) == 0 and "PARTIAL" not in capsys.readouterr().out
    for name in ("scene", "color"):  # videos of color may lack the object
        write_result(tmp_path, name, 0.5, count=429)
    assert main(["--result_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"scene .*429 of 430 videos", said) and "0 of 16 dimensions are missing, 1 are of fewer videos" in said
    record = json.loads((tmp_path / "score.json").read_text())
    assert record["partial"] and record["few"] == {"scene": [429, 430]}


STAND_IN = """
import json, os
class VBench:
    def __init__(self, device, full_info, output):
        self.full_info, self.output = full_info, output
    def evaluate(self, videos_path, name, dimension_list, local, read_frame):
        names = os.listdir(videos_path)
        suffix = os.path.splitext(names[0])[1]
        videos = []
        for row in json.load(open(self.full_info)):
            if dimension_list[0] in row["dimension"]:
                wanted = [f"{row['prompt_en']}-{i}{suffix}" for i in range(5)]
                videos += [{"video_path": os.path.join(videos_path, w), "video_results": 0.5} for w in wanted if w in names]
        if not os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] or dimension_list[0] == "color":
            raise ZeroDivisionError("no videos")
        json.dump({dimension_list[0]: [0.5, videos]}, open(f"{self.output}/{name}_eval_results.json", "w"))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages vbench and torchvision that the driver imports, and a suite of three prompts sampled
    once.
    """
    for package, text in (("vbench", STAND_IN), ("torchvision", "")):
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    run = SuiteRun([replace(item, dimensions=("scene", "color")) for item in items()], tmp_path / "v", num_samples=5)
    sample_suite(run, Noise(checkpoint={"weights": "ema"}), settings={"extended_prompts": True})
    (tmp_path / "v" / ".left.mp4.partial").write_bytes(b"half")
    (tmp_path / "v" / "notes.json").write_text("{}")
    return tmp_path


def score(folder: Path, *more: str) -> int:
    return main(["--videos_path", str(folder / "v"), "--vbench_python", sys.executable, "--device", "cpu", *more])


def test_scoring_sees_only_videos(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    assert score(stand_in, "--dimension", "scene", "--partial") == 0
    record = json.loads((stand_in / "v_eval_results" / "score.json").read_text())
    assert record["num_videos"] == {"scene": 15} and record["raw"] == {"scene": 0.5} and record["partial"]
    assert sorted(p.suffix for p in (stand_in / "v_eval_results" / "videos").iterdir()) == [".mp4"] * 15
    (stand_in / "v" / "prompt 1-3.mp4").unlink()
    assert score(stand_in, "--dimension", "scene", "--partial") == 2
    assert "is of 15 videos of scene, 14 are there now" in capsys.readouterr().err
    (stand_in / "v_eval_results" / "scene_eval_results.json").unlink()
    (stand_in / "v" / "prompt 1-3.mp4").write_bytes(b"")
    assert score(stand_in, "--dimension", "scene") == 2
    assert "prompt 1-3.mp4 has 0 bytes, " in capsys.readouterr().err, "it is not what was sampled"
    (stand_in / "v_run" / "manifest.json").unlink()
    (stand_in / "v_run" / EVAL_INFO).rename(stand_in / "list.json")
    assert score(stand_in, "--dimension", "scene", "--full_json_dir", str(stand_in / "list.json")) == 2
    assert "1 videos of scene are missing in" in capsys.readouterr().err, "an empty file is no video"


def test_a_video_that_vbench_passed_over_is_named(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    results = stand_in / "v_eval_results"
    write_result(results, "scene", 0.5, count=3)
    assert score(stand_in, "--dimension", "scene", "--partial") == 2
    assert "is of 3 videos of scene, 15 are there now, 'prompt 0-1.mp4' is not among them" in capsys.readouterr().err


def test_links_never_lie_among_the_videos(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    (stand_in / "v").rename(stand_in / "videos")
    flags = ["--result_dir", str(stand_in), "--dimension", "scene", "--partial", "--full_json_dir", str(stand_in / "v_run" / EVAL_INFO)]
    assert main(["--videos_path", str(stand_in / "videos"), "--vbench_python", sys.executable, *flags]) == 2
    assert "is the folder of the videos itself" in capsys.readouterr().err
    assert len(list((stand_in / "videos").glob("prompt*.mp4"))) == 15


def test_clips_of_other_videos_are_cut_again(tmp_path: Path) -> None:
    launch, videos = Launch(python=Path("py"), output=tmp_path / "r", suite="long"), tmp_path / "v"
    videos.mkdir()
    (videos / "b.mp4").symlink_to("b.mp4")  # leads in a circle
    for count in (1, 2):
        (videos / f"a-{count}.mp4").write_bytes(b"x")
        prepare(launch, videos, [])
        assert {path.name for path in launch.view.iterdir()} == {path.name for path in videos.iterdir()}
        (launch.view / "split_clip" / "a-1").mkdir(parents=True)
    prepare(launch, videos, [])
    assert (launch.view / "split_clip").is_dir(), "nothing has changed"


def test_failures_of_vbench_are_told(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    assert score(stand_in, "--dimension", "scene", "human_action", "--partial") == 0
    assert "human_action: left out, there is no video of it" in capsys.readouterr().out
    assert score(stand_in, "--dimension", "human_action") == 2
    assert "no prompt to score has the dimension human_action" in capsys.readouterr().err
    assert score(stand_in, "--dimension", "color", "--partial") == 2
    assert "VBench failed on color (exit status 1): ZeroDivisionError: no videos" in capsys.readouterr().err
    assert main(["--videos_path", str(stand_in / "v"), "--vbench_python", str(stand_in / "no"), "--dimension", "color", "--partial"]) == 2
    assert "make one with `rcm vbench env`" in capsys.readouterr().err


def test_dry_run_lists_commands_and_files(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    assert score(stand_in, "--dry_run", "--vbench_cache", str(stand_in / "cache")) == 0
    said = capsys.readouterr().out
    assert said.count("--dimension") == 16 and all(file.path in said for file in FILES) and "in all 8,986,762,312 bytes" in said
    assert not (stand_in / "v_eval_results").exists() and "PYTHONUTF8=1" in said
    assert cache_folder("cache") == Path("cache").absolute(), "VBench runs in another folder"
    assert problems(stand_in, ["scene"]) == {"caption_model/tag2text_swin_14m.pth": "missing"} and not files_for(["temporal_flickering"])


def test_videos_of_another_suite_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sample_suite(SuiteRun(items(1), tmp_path / "v", num_samples=1), Noise(), settings={"suite": "t2v"})
    assert score(tmp_path, "--suite", "i2v", "--dry_run") == 2
    assert "--suite i2v: the videos in" in capsys.readouterr().err


def test_long_suite_needs_a_clone(tmp_path: Path) -> None:
    launch = Launch(python=Path("py"), output=tmp_path, suite="long", repository=Path("/clone"))
    beside = replace(launch, repository=Path("clone")).command("scene")
    assert beside[1] == str(Path("clone/vbench2_beta_long/eval_long.py").absolute()), "it runs in another folder"
    words = launch.command("temporal_flickering")
    assert words[1] == "/clone/vbench2_beta_long/eval_long.py" and "--static_filter_flag" in words and "long_vbench_standard" in words
    assert "--static_filter_flag" not in launch.command("scene")
    with pytest.raises(ConfigError, match=r"--vbench_repo DIR"):
        Launch(python=Path("py"), output=tmp_path, suite="long").command("scene")
    with pytest.raises(ConfigError, match=r"i2v_subject reads the images .* --vbench_repo DIR"):
        Launch(python=Path(sys.executable), output=tmp_path, suite="i2v").run("i2v_subject")


def test_vision_reward_counts_every_video_once(tmp_path: Path) -> None:
    rows = [{"video_list": ["v/a-0.mp4", "v/a-1.mp4"]}]
    path = tmp_path / "s.json"
    scores = [{"video_path": f"other/a-{i}.mp4", "prompt": "a", "score": s} for i, s in enumerate((0.1, 0.3))]
    path.write_text(json.dumps({"mean_score": 0.2, "video_results": scores}))
    assert read_vision_reward(path, rows) == pytest.approx({"mean": 0.2, "standard_error": 0.1, "num_videos": 2})
    for changed, told_ in ((scores[:1], "1 videos without a score"), ([*scores, scores[0]], "scored twice")):
        path.write_text(json.dumps({"video_results": changed}))
        with pytest.raises(ConfigError, match=told_):
            read_vision_reward(path, rows)
    words = vision_reward_command("py s.py --in {eval_info} --o {output}", eval_info=Path("a b.json"), output=Path("o"))
    assert words == ["py", "s.py", "--in", "a b.json", "--o", "o"]
    with pytest.raises(ConfigError, match=r"must contain \{output\}"):
        vision_reward_command("py {eval_info}", eval_info=Path("a"), output=Path("o"))


def test_vision_reward_is_looked_at_before_hours_of_scoring(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--dimension", "scene", "--partial", "--vision_reward"]
    for command, told_ in (("x {eval_info}", "must contain {output}"), ("x 'a {eval_info} {output}", "is cut off: No closing quotation")):
        assert score(stand_in, *flags, command) == 2
        assert told_ in capsys.readouterr().err and not (stand_in / "v_eval_results").exists()
    script = "import json,sys; rows = json.load(open(sys.argv[1]));"
    script += (
        "json.dump({'video_results': [{'video_path': v, 'score': 0.5} for r in rows for v in r['video_list']]}, open(sys.argv[2], 'w'))"
    )
    assert score(stand_in, *flags, f'{sys.executable} -c "{script}" {{eval_info}} {{output}}') == 0
    record = json.loads((stand_in / "v_eval_results" / "score.json").read_text())
    assert record["vision_reward"] == {"mean": 0.5, "standard_error": 0.0, "num_videos": 15}


def scored_run(folder: Path, *, extended: bool = True, weights: str = "ema", fps: float = 16.0, samples: int = 1, **raw: float) -> Path:
    """Videos with settings, and results of all dimensions."""
    sampler = Noise(checkpoint={"weights": weights})
    sampler.fps = fps
    sample_suite(SuiteRun(items(), folder, num_samples=samples), sampler, settings={"extended_prompts": extended})
    for name in T2V.names:
        write_result(Path(f"{folder}_eval_results"), name, raw.get(name, 0.5), count=3 * samples)
    return Path(f"{folder}_eval_results")


@pytest.mark.parametrize(
    ("change", "suspicion"),
    [
        ({"extended": False, "scene": 0.3, "weights": "reg"}, "extended prompts"),
        ({"weights": "reg", "aesthetic_quality": 0.4}, r"averaged \(EMA\) against last weights: checkpoint.weights='ema' in A, 'reg' in B"),
        ({"fps": 8.0, "dynamic_degree": 0.9}, "frame rate of the files"),
        ({"samples": 2}, "other numbers of scored videos"),
        ({"scene": 0.3}, "scene: 0.5000 and 0.3000, \\+0.54 points of the total"),
        ({}, "no difference beyond rounding"),
    ],
)
def test_explain_names_the_first_suspicion(tmp_path: Path, change: dict, suspicion: str) -> None:
    mine, theirs = run_side(scored_run(tmp_path / "a")), run_side(scored_run(tmp_path / "b", **change))
    lines = told(explain(mine, theirs), mine, theirs).splitlines()
    assert re.search(suspicion, lines[2]), lines


def test_explain_against_a_published_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = next(name for name in PUBLISHED["rows"] if name.startswith("Wan2.1-T2V-1.3B") and "2025-05-03" in name)
    values = dict(zip(PUBLISHED["dimensions"], PUBLISHED["rows"][row]["values"], strict=True))
    raw = {name: value / 100 for name, value in values.items()}
    for name in ("multiple_objects", "scene", "human_action", "color"):
        raw[name] -= 0.1
    results = tmp_path / "x_eval_results"
    for name, value in raw.items():
        write_result(results, name, value)
    assert main(["--explain", str(results), row]) == 0
    first = capsys.readouterr().out.splitlines()[2]
    assert "lower in A" in first and "not extended prompts" in first
    assert main(["--explain", str(results), "Wan"]) == 2
    assert "no single published row 'Wan'" in capsys.readouterr().err
    assert published_side(row, file=ASSETS / "published_rows.json").raw["scene"] == pytest.approx(values["scene"] / 100)


def test_environment_script_says_what_it_would_do(capsys: pytest.CaptureFixture) -> None:
    assert env_main(["--dry_run", "--python", sys.executable]) == (0 if sys.version_info < (3, 12) else 2)
    assert "vbench==0.1.5" in capsys.readouterr().out or sys.version_info >= (3, 12)
    assert env_main(["--dry_run", "--python", "no-such-python"]) == 2
    assert "name a Python 3.11" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="no VBench environment (python -m scripts.vbench_env)")
def test_real_vbench_scores_temporal_flickering(tmp_path: Path) -> None:
    flickering = [replace(item, dimensions=("temporal_flickering",)) for item in items()]
    run = SuiteRun(flickering, tmp_path / "v", num_samples=5)
    sample_suite(run, Noise())
    flags = ["--videos_path", str(tmp_path / "v"), "--vbench_python", str(REAL), "--device", "cpu"]
    assert main([*flags, "--dimension", "temporal_flickering", "--partial"]) == 0
    found = read_results(tmp_path / "v_eval_results")["temporal_flickering"]
    assert found.num_videos == 15 and 0.4 < found.score < 0.9
