"""Offline metrics of folders of videos, as a page: one folder alone, or several on the same prompts
and noise, compared video by video.

    python -m scripts.compare_checkpoints outputs/vbench/videos_a --out outputs/compare
    python -m scripts.compare_checkpoints videos_a videos_b videos_c --out outputs/compare \\
        --max_videos 40

Folders are those of `rcm vbench sample`; for others, --ignore_conditions skips the check that
prompts and noise agree. The metrics are this package's own (docs/evaluation.md), not VBench.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import require_folder
from rcm.evaluation.compare import compare, require_same_conditions, side_by_side
from rcm.evaluation.metrics_pixels import clip_of
from rcm.evaluation.metrics_report import write_comparison_page, write_metrics_page
from rcm.evaluation.metrics_suite import ClipScores, Models, measure_clip
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import check_device, command
from rcm.pipelines.video_io import probe, read_mp4, write_mp4
from rcm.train.describe import installed_versions, write_atomically

_FLAGS = """
out DIR = outputs/compare  [%(default)s]
max_videos N               only the first N names
grid_videos N = 12         videos shown side by side [%(default)s]
pixels_only                without the networks
ignore_conditions          do not check that prompts and seeds agree
device str = cpu           of the networks [%(default)s]
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = Arguments(prog="scripts.compare_checkpoints", allow_abbrev=False, description=__doc__)
    told = "folders of mp4 files with equal names; the first is the reference"
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=told)
    add_flags(parser, _FLAGS, out={"type": Path})
    parser.idle("device", beside="pixels_only")
    parser.idle("ignore_conditions", beside="folders", when=lambda flags: len(flags.folders) == 1)
    run(parser.parse_args(argv))


def run(flags: argparse.Namespace) -> None:
    """Check that the folders belong together, measure, write the page."""
    check_device(flags.device)
    names = common_videos(flags.folders)[: flags.max_videos]
    if len(flags.folders) > 1 and not flags.ignore_conditions:
        try:
            require_same_conditions(flags.folders)
        except ConfigError as error:
            raise ConfigError(f"{error}; or pass --ignore_conditions") from error
    require_folder(flags.out, f"--out {flags.out}")
    if any(flags.out.resolve() == folder.resolve() for folder in flags.folders):
        raise ConfigError(
            f"--out {flags.out} is one of the folders of videos, which the page's copies would"
            " replace; choose another"
        )
    models = Models() if flags.pixels_only else Models.installed(device=flags.device)
    for why in models.absent.values():
        print(f"without: {why}")
    labels = {str(folder): folder for folder in flags.folders}
    scores = {
        label: {name: _measured(folder / name, models) for name in names}
        for label, folder in labels.items()
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    kept = {
        label: {name: asdict(score) for name, score in by_video.items()}
        for label, by_video in scores.items()
    }
    write_atomically(flags.out / "scores.json", json.dumps(kept))
    machine = {**installed_versions(), "machine": platform.machine()}
    shown = names[: flags.grid_videos]
    for number, name in enumerate(shown if len(labels) > 1 else names):
        videos = [read_mp4(folder / name) for folder in labels.values()]
        target = flags.out / (f"grid-{number:04d}.mp4" if len(labels) > 1 else name)
        write_mp4(
            target,
            side_by_side(videos) if len(videos) > 1 else videos[0],
            fps=probe(flags.folders[0] / name).fps,
            pad=True,
        )
    if len(labels) == 1:
        page = write_metrics_page(
            flags.out,
            scores[str(flags.folders[0])],
            title=f"Offline numbers of {flags.folders[0]}",
            machine=machine,
        )
    else:
        order = ", ".join(labels)
        grids = [
            {"path": f"grid-{i:04d}.mp4", "title": name, "caption": f"left to right: {order}"}
            for i, name in enumerate(shown)
        ]
        page = write_comparison_page(
            flags.out,
            compare(scores),
            grids,
            title=f"{len(labels)} checkpoints compared",
            machine=machine,
        )
    print(f"{len(names)} videos of {len(labels)} folder(s); page {page}")


def common_videos(folders: Sequence[Path]) -> list[str]:
    """Names of the mp4 files that all folders have, sorted. `ConfigError` for a folder that is
    missing or named twice, and for none in common.
    """
    if len(set(folders)) < len(folders):
        raise ConfigError("a folder is named twice; a checkpoint is not compared with itself")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder")
    held = [{path.name for path in folder.glob("*.mp4")} for folder in folders]
    if empty := [str(folder) for folder, names in zip(folders, held, strict=True) if not names]:
        raise ConfigError(f"no .mp4 file lies in {', '.join(empty)} itself")
    common = sorted(set.intersection(*held))
    if not common:
        raise ConfigError(f"the folders {', '.join(map(str, folders))} have no .mp4 name in common")
    if lost := len(set.union(*held)) - len(common):
        print(f"left out: {lost} videos that only some of the folders have")
    return common


def _measured(path: Path, models: Models) -> ClipScores:
    return measure_clip(clip_of(read_mp4(path)), models=models, feature_stride=2)


if __name__ == "__main__":
    sys.exit(main())
