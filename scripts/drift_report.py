"""How much long videos drift: curves of colour, sharpness, motion, flicker and content over time,
several videos side by side on one page.

    python -m scripts.drift_report sliding_window=a.mp4 rolling_sink=b.mp4 --out outputs/drift
    python -m scripts.drift_report mine=long.mp4 --toy_prompt "a red square moving left"

Every curve is a distance to the video's own first window, except motion and flicker, which are
plotted directly. Videos are read window by window, so their length does not matter. The page is
OUT/report.html, the numbers OUT/report.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rcm.core.arguments import Arguments, one_of
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile, require_folder
from rcm.evaluation.metrics_features import FrameFeatures
from rcm.evaluation.metrics_pixels import clip_of, colour, differences, flicker, sharpness
from rcm.evaluation.report import write_report
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import check_device, command
from rcm.pipelines.video_io import contact_sheet, iter_frames
from rcm.worlds.toy_scores import ToyScorer
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig

STRIP_HEIGHT, STRIP_FRAMES, MAX_STRIP = 96, 12, 400
CURVES = {
    "colour": ("Colour", "distance of brightness, contrast and tint from the first window"),
    "sharpness": (
        "Sharpness",
        "log gradient of brightness less that of the first window: below 0 is softer",
    ),
    "motion": ("Motion", "mean change between neighbouring frames, in percent of the range"),
    "flicker": ("Flicker", "mean second difference of brightness, in percent of the range"),
    "content": ("Content", "one less the cosine of image features with those of the first window"),
    "adherence": ("Adherence", "share of what the toy world's prompt asks for, 0 to 100"),
}
"""Name of a curve -> its title, what it means."""


@dataclass
class Drift:
    """One video: a value per window of every curve, frames in all, and small frames, one per
    window, for its strip.
    """

    name: str
    path: str
    curves: dict[str, list[float]] = field(default_factory=dict)
    num_frames: int = 0
    strip: list[Tensor] = field(default_factory=list)

    def shift(self, curve: str) -> float:
        """Mean of the last quarter of the windows less that of the first quarter."""
        values = self.curves[curve]
        count = max(1, round(len(values) / 4))
        return sum(values[-count:]) / count - sum(values[:count]) / count


def measure(
    name: str,
    path: str,
    *,
    window: int,
    features: FrameFeatures | None,
    toy: Callable[[Tensor], list[float]] | None,
) -> Drift:
    """Read a video window by window. `ConfigError` for one of fewer than two windows, `VideoError`
    for one that cannot be read.
    """
    found = Drift(name, path)
    first: dict[str, Tensor] = {}
    frames = iter_frames(path)
    for clip in _windows(frames, window):
        series = {"colour": colour(clip).mean(0), "sharpness": sharpness(clip).mean()}
        if features is not None:
            series["content"] = torch.nn.functional.normalize(features(clip).mean(0), dim=0)
        first = first or series
        row = {
            "colour": (series["colour"] - first["colour"]).norm(),
            "sharpness": series["sharpness"] - first["sharpness"],
            "motion": 100 * differences(clip).mean(),
            "flicker": 100 * flicker(clip).mean(),
        }
        if features is not None:
            row["content"] = 1 - series["content"] @ first["content"]
        for curve, value in row.items():
            found.curves.setdefault(curve, []).append(float(value))
        found.num_frames += len(clip)
        found.strip.append(_small(clip[0]))
        if len(found.strip) > MAX_STRIP:
            found.strip = found.strip[::2]
    if len(found.curves.get("colour", ())) < 2:
        raise ConfigError(
            f"{path} has fewer than two windows of {window} frames; give a longer video, or a"
            " smaller --window"
        )
    if toy is not None:
        found.curves["adherence"] = toy(torch.stack(list(iter_frames(path))))
    return found


def report(drifts: Sequence[Drift], *, window: int, folder: Path, fps: float) -> Path:
    """Write the page: a chart per curve with a line per video, a table of what changed, a strip of
    frames per video.
    """
    charts = []
    for curve, (title, note) in CURVES.items():
        # the toy world's scores have windows of their own
        hop = (ToyWorldConfig().num_frames - 1 if curve == "adherence" else window) / fps
        lines = [
            {"name": d.name, "points": [[i * hop, v] for i, v in enumerate(values)], "colour": n}
            for n, d in enumerate(drifts, 1)
            if (values := d.curves.get(curve))
        ]
        if lines:
            charts.append({"title": title, "note": note, "x": "seconds", "y": "", "lines": lines})
    rows = [
        {"stage": d.name, "scores": {CURVES[c][0]: d.shift(c) for c in CURVES if c in d.curves}}
        for d in drifts
    ]
    table = {
        "title": "Last quarter less first quarter",
        "note": "of the windows; 0 is a video that does not drift",
        "rows": rows,
    }
    strips = []
    for number, d in enumerate(drifts):
        picks = torch.linspace(0, len(d.strip) - 1, min(STRIP_FRAMES, len(d.strip))).round().long()
        name = f"strip_{number}.png"
        frames = torch.stack([d.strip[i] for i in picks], dim=1)[None]
        contact_sheet(OutputFile.claim(folder / name), frames, columns=STRIP_FRAMES, scale=1)
        facts = [f"{d.num_frames} frames", Path(d.path).name]
        strips.append({"title": d.name, "path": name, "facts": facts, "section": "drift"})
    data = {
        "title": "Drift of long videos",
        "subtitle": f"{len(drifts)} videos in windows of {window} frames ({window / fps:g} s)",
        "charts": charts,
        "tables": [table],
        "videos": strips,
        "glossary": dict(CURVES.values()),
    }
    return write_report(folder, data)


def toy_adherence(prompt: str) -> Callable[[Tensor], list[float]]:
    """Adherence per window of the toy world's length, of frames uint8 [F, H, W, 3]; `ConfigError`
    for a prompt of another world.
    """
    world = ToyWorld()
    world.parse([prompt])
    scorer = ToyScorer(world, num_reference=64)

    def score(frames: Tensor) -> list[float]:
        pixels = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
        small = torch.nn.functional.adaptive_avg_pool2d(
            pixels, (world.config.height, world.config.width)
        )
        return list(scorer.drift(small[None], [prompt]).adherence)

    return score


def _features(device: str) -> FrameFeatures:
    try:
        return FrameFeatures(device=device)
    except ConfigError as error:
        raise ConfigError(f"{error}; --no-features leaves the content out") from error


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, tell, write the page."""
    flags = _parser().parse_args(argv)
    named = [_named(word) for word in flags.videos]
    names = [name for name, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"two videos are called {', '.join(sorted(twice))}; write NAME=FILE with different"
            " names"
        )
    if flags.window < 3:
        raise ConfigError(f"--window {flags.window} must be at least 3 frames")
    check_device(flags.device)
    toy = None if flags.toy_prompt is None else toy_adherence(flags.toy_prompt)
    features = _features(flags.device) if flags.features else None
    folder = Path(flags.out)
    require_folder(folder, f"--out {folder}")
    drifts = []
    for name, path in named:
        drifts.append(measure(name, path, window=flags.window, features=features, toy=toy))
        told = ", ".join(f"{curve} {drifts[-1].shift(curve):+.3g}" for curve in drifts[-1].curves)
        print(
            f"{name}: {drifts[-1].num_frames} frames; last quarter less first: {told}", flush=True
        )
    print(f"wrote {report(drifts, window=flags.window, folder=folder, fps=flags.fps)}", flush=True)


_FLAGS = """
out DIR = outputs/drift  [%(default)s]
window N = 16     frames of a window [%(default)s]
fps float = 16.0  for the time axis [%(default)g]
features          content by an image classifier (rcm[metrics])
device str = cpu  of the classifier [%(default)s]
toy_prompt TEXT   the videos are of the toy world: also its exact scores for this prompt
"""


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="python -m scripts.drift_report", allow_abbrev=False, description=__doc__
    )
    told = "a video under a name, such as that of its method"
    parser.add_argument("videos", nargs="+", metavar="NAME=FILE", help=told)
    either = {"action": argparse.BooleanOptionalAction, "default": True}
    add_flags(parser, _FLAGS, features=either)
    parser.idle("device", beside="features", when=one_of("features", False))
    return parser


def _named(word: str) -> tuple[str, str]:
    name, sign, path = word.partition("=")
    return (name, path) if sign and name and path else (Path(word).stem, word)


def _windows(frames: Iterator[Tensor], window: int) -> Iterator[Tensor]:
    """Clips [F, 3, H, W] in [0, 1] of `window` frames; a shorter rest is left out."""
    while len(part := list(islice(frames, window))) == window:
        yield clip_of(torch.stack(part).permute(3, 0, 1, 2).float() / 127.5 - 1)


def _small(frame: Tensor) -> Tensor:
    """A frame [3, H, W] in [0, 1] as a small one in [-1, 1]."""
    height = min(STRIP_HEIGHT, frame.shape[1])
    width = max(1, round(frame.shape[2] * height / frame.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(frame, (height, width)) * 2 - 1


if __name__ == "__main__":
    sys.exit(main())
