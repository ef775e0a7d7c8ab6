"""Score a folder of VBench videos in VBench's own environment, or add up existing results.

    python -m scripts.vbench_score --videos_path D --vbench_python .venv-vbench/bin/python --ngpus 8
    python -m scripts.vbench_score --videos_path D --dimension temporal_flickering --device cpu \\
        --partial
    python -m scripts.vbench_score --result_dir D_eval_results
    python -m scripts.vbench_score --videos_path D --dry_run
    python -m scripts.vbench_score --explain D_eval_results E_eval_results
    python -m scripts.vbench_score --explain D_eval_results "Wan2.1-T2V-1.3B (2025-05-03"
    python -m scripts.vbench_score --suite long --vbench_repo ~/VBench --videos_path D
    python -m scripts.vbench_score --videos_path D --vision_reward "python score.py --eval_info \\
        {eval_info} --output {output}"

A dimension that has a result is not scored again. --dry_run needs neither VBench nor its model
files: it prints the commands, the files they read and what is missing. The score is written to
score.json beside the results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.core.arguments import Arguments, one_of
from rcm.core.errors import ConfigError
from rcm.core.output_file import require_folder
from rcm.evaluation.vbench_explain import PUBLISHED, explain, published_side, run_side, told
from rcm.evaluation.vbench_files import cache_folder, problems
from rcm.evaluation.vbench_files import told as files_told
from rcm.evaluation.vbench_hooks import MODEL, SCORES, read_vision_reward, vision_reward_command
from rcm.evaluation.vbench_images import I2V_FILE, placed_list
from rcm.evaluation.vbench_launch import (
    SCORED_SAMPLES,
    Launch,
    holds_bytes,
    missing_videos,
    prepare,
)
from rcm.evaluation.vbench_manifest import (
    EVAL_INFO,
    MANIFEST,
    beside,
    read_manifest,
    require_unaltered,
)
from rcm.evaluation.vbench_prompts import T2V_FILE, by_dimension, read_suite
from rcm.evaluation.vbench_results import DimensionResult, read_json, read_results
from rcm.evaluation.vbench_score import SUITES, Suite, aggregate, table
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import command
from rcm.storage.shipped import asset
from rcm.train.describe import write_atomically

ASSETS = asset("vbench")


_FLAGS = f"""
videos_path DIR         folder of scripts.vbench_sample, or any with VBench's file names
result_dir,output_path DIR  results [VIDEOS_PATH_eval_results]
suite t2v|i2v|long = t2v  long: VBench-Long, added up like t2v [%(default)s]
dimension NAME...       [all of the suite]
full_json_dir FILE      prompts to score [the run's vbench_eval_info.json, else the public list]
partial                 allow missing dimensions and videos; the score is marked partial
dry_run                 print commands, files and what is missing; runs nothing
explain str             why two results differ: folders of results, or B the name of a published row
vbench_python FILE = .venv-vbench/bin/python  [%(default)s]
vbench_repo DIR         clone of VBench, for --suite long and i2v
vbench_cache DIR        its model files [$VBENCH_CACHE_DIR, else ~/.cache/vbench]
load_ckpt_from_local    never ask the network for model files
device cuda|cpu = cuda  [%(default)s]
ngpus N = 1             [%(default)s]; appearance_style has another rule with more than one
resolution 1-1|8-5|7-4|16-9 = 16-9  i2v: crops of the images [%(default)s]
vision_reward COMMAND   also run VisionReward; {{eval_info}}, {{output}} and {{model}} are filled in
vision_reward_model NAME = {MODEL}  [%(default)s]
"""


_SCORED = ("full_json_dir", "dry_run", "vbench_python", "vbench_repo", "vbench_cache")
_SCORED += ("load_ckpt_from_local", "device", "resolution")
"""Flags of scoring, which results that are there do not need."""


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run(arguments(argv))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="scripts.vbench_score", allow_abbrev=False, description=__doc__)
    names = ("videos_path", "result_dir", "full_json_dir", "vbench_python", "vbench_repo")
    paths = {name: {"type": Path} for name in (*names, "vbench_cache")}
    add_flags(parser, _FLAGS, explain={"nargs": 2, "metavar": ("A", "B")}, **paths)
    parser.idle(
        *(name for name in parser.names if name not in ("help", "explain", "suite")),
        beside="explain",
    )
    parser.idle("resolution", beside="suite", when=one_of("suite", "t2v", "long"))
    parser.idle("device", "ngpus", beside="suite", when=one_of("suite", "long"))
    parser.idle("vision_reward_model", without="vision_reward")
    parser.idle(*_SCORED, without="videos_path")
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> None:
    """Explain, or score what is missing and add up."""
    if flags.explain is not None:
        _explain(flags)
        return
    if flags.videos_path is None and flags.result_dir is None:
        raise ConfigError(
            "give --videos_path DIR to score, --result_dir DIR to add up results, or --explain A B"
        )
    suite = SUITES["i2v" if flags.suite == "i2v" else "t2v"]
    unknown = sorted(set(flags.dimension or ()) - set(suite.names))
    if unknown:
        raise ConfigError(
            f"--dimension {unknown[0]} is not of the suite {suite.name}: {', '.join(suite.names)}"
        )
    results = flags.result_dir or beside(flags.videos_path, "_eval_results")
    reward = _vision_reward(flags, results)
    if flags.videos_path is not None and _score_videos(flags, suite, results):
        return
    found = read_results(results)
    if flags.videos_path is not None:
        _require_current(flags, found)
    raw = {name: result.score for name, result in found.items()}
    score = aggregate(raw, suite, partial=flags.partial, few=_few(flags, found))
    print(table(score))
    record = {
        **score.to_dict(),
        "num_videos": {name: result.num_videos for name, result in found.items()},
        "suite_run": flags.suite,
        "ngpus": flags.ngpus,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if reward is not None:
        record["vision_reward"] = reward()
        print(f"VisionReward: {record['vision_reward']}")
    write_atomically(results / "score.json", json.dumps(record, indent=1))


def _score_videos(flags: argparse.Namespace, suite: Suite, results: Path) -> bool:
    """Score the dimensions without a result; True after a dry run."""
    if not flags.videos_path.is_dir():
        raise ConfigError(f"--videos_path {flags.videos_path} is no folder")
    rows = _rows(flags)
    launch = Launch(
        python=flags.vbench_python.absolute(),
        output=results.absolute(),
        suite=flags.suite,
        device=flags.device,
        gpus=flags.ngpus,
        cache=cache_folder(flags.vbench_cache),
        local=flags.load_ckpt_from_local,
        repository=flags.vbench_repo,
        options={"resolution": flags.resolution} if flags.suite == "i2v" else {},
    )
    wanted = [name for name in flags.dimension or suite.names if not launch.result(name).is_file()]
    lost = {name: missing_videos(flags.videos_path, rows, name) for name in wanted}
    prompts = Counter(name for row in rows for name in row["dimension"])
    # VBench divides by their number
    none = [name for name in wanted if len(lost[name]) == SCORED_SAMPLES * prompts[name]]
    lost = {name: files for name, files in lost.items() if files}
    if flags.dry_run:
        _tell(launch, wanted, lost)
        return True
    if flags.partial:
        wanted = [name for name in wanted if name not in none]
        for name in none:
            print(f"{name}: left out, there is no video of it")
    elif unasked := [name for name in none if not prompts[name]]:
        raise ConfigError(
            f"no prompt to score has the dimension {unasked[0]}; name others with --dimension, or"
            " pass --partial"
        )
    elif lost:
        name, files = next(iter(lost.items()))
        raise ConfigError(
            f"{len(files)} videos of {name} are missing in {flags.videos_path} or empty, the first"
            f" is {files[0]!r} (VBench would only warn); sample them, or pass --partial"
        )
    wrong = problems(launch.cache, wanted) if flags.load_ckpt_from_local else {}
    if wrong:
        path, what = next(iter(wrong.items()))
        raise ConfigError(
            f"{len(wrong)} model files are not in {launch.cache}, the first is {path} ({what});"
            " --dry_run lists them all"
        )
    if wanted:
        require_folder(launch.output, f"--result_dir {results}")
        launch.output.mkdir(parents=True, exist_ok=True)
        prepare(launch, flags.videos_path, rows)
    for name in wanted:
        begin = time.perf_counter()
        launch.run(name)
        print(f"{name}: scored in {time.perf_counter() - begin:.1f} s", flush=True)
    return False


def _tell(launch: Launch, wanted: Sequence[str], lost: Mapping[str, Sequence[str]]) -> None:
    """What would run, and what it lacks."""
    python = "there" if launch.python.is_file() else "MISSING: rcm vbench env makes it"
    print(f"# Python of VBench's environment {launch.python}: {python}")
    variables = " ".join(
        f"{key}={shlex.quote(value)}" for key, value in launch.environment().items()
    )
    for name in wanted:
        print(
            f"# {name}"
            + (
                f": {len(lost[name])} videos missing or empty, the first is {lost[name][0]!r}"
                if name in lost
                else ""
            )
        )
        print(f"{variables} {shlex.join(launch.command(name))}")
    print("# model files")
    print(files_told(launch.cache, wanted))


def _rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts to score: of the run if it left them, else the public list. Samples beyond the
    fifth are not scored.
    """
    records = beside(flags.videos_path)
    source = flags.full_json_dir
    if source is None and (records / EVAL_INFO).is_file():
        source = records / EVAL_INFO
        if (records / MANIFEST).is_file():
            _require_whole_run(flags, read_manifest(records))
    if source is None and flags.suite == "i2v":
        source = placed_list(ASSETS, clone=flags.vbench_repo, knob="--full_json_dir")
    source = source or ASSETS / T2V_FILE
    return [
        item.eval_row([item.video_name(i) for i in range(SCORED_SAMPLES)])
        for item in read_suite(source)
    ]


def _require_whole_run(flags: argparse.Namespace, manifest: Mapping[str, Any]) -> None:
    require_unaltered(flags.videos_path, manifest["videos"])
    made = manifest["settings"].get("suite")
    if made is not None and (made == "i2v") != (flags.suite == "i2v"):
        raise ConfigError(
            f"--suite {flags.suite}: the videos in {flags.videos_path} are of the suite {made}"
        )


def _fewer(flags: argparse.Namespace, name: str, result: DimensionResult, videos: int) -> bool:
    """Whether a result is of fewer than `videos`, and should not be: color leaves out videos in
    which the object was not seen, and VBench-Long's filter those that move.
    """
    chosen = name == "color" or (name == "temporal_flickering" and flags.suite == "long")
    return 0 < result.num_videos < videos and not chosen


def _few(
    flags: argparse.Namespace, found: Mapping[str, DimensionResult]
) -> dict[str, tuple[int, int]]:
    """Dimension -> (videos scored, videos of the suite) where some are lacking; empty where the
    suite's list is not at hand.
    """
    listed = ASSETS / (I2V_FILE if flags.suite == "i2v" else T2V_FILE)
    if not listed.is_file():
        return {}
    whole = {
        name: SCORED_SAMPLES * len(items)
        for name, items in by_dimension(read_suite(listed)).items()
    }
    return {
        name: (result.num_videos, whole[name])
        for name, result in found.items()
        if name in whole and _fewer(flags, name, result, whole[name])
    }


def _require_current(flags: argparse.Namespace, found: Mapping[str, DimensionResult]) -> None:
    """`ConfigError` for a result that is not of the videos that are there now: it is old, or VBench
    passed over files it could not read.
    """
    rows = _rows(flags)
    for name, result in found.items():
        wanted = [video for row in rows if name in row["dimension"] for video in row["video_list"]]
        there = [video for video in wanted if holds_bytes(flags.videos_path / video)]
        lost = next((video for video in there if video not in result.videos), None)
        if _fewer(flags, name, result, len(there)) or result.num_videos > len(there):
            more = f", {lost!r} is not among them (can it be played?)" if lost else ""
            raise ConfigError(
                f"{result.file} is of {result.num_videos} videos of {name}, {len(there)} are there"
                f" now{more}; delete it to have them scored again"
            )


def _explain(flags: argparse.Namespace) -> None:
    mine = run_side(flags.explain[0])
    published = not Path(flags.explain[1]).is_dir()
    theirs = (
        published_side(flags.explain[1], file=ASSETS / PUBLISHED)
        if published
        else run_side(flags.explain[1])
    )
    print(
        told(
            explain(mine, theirs, suite=SUITES["i2v" if flags.suite == "i2v" else "t2v"]),
            mine,
            theirs,
        )
    )


def _vision_reward(
    flags: argparse.Namespace, results: Path
) -> Callable[[], dict[str, float]] | None:
    """What runs VisionReward, once it is clear that it can; None where it is not asked for."""
    if flags.vision_reward is None:
        return None
    if flags.videos_path is None:
        raise ConfigError(
            "--vision_reward needs --videos_path with the videos and their vbench_eval_info.json"
        )
    info, scores = beside(flags.videos_path) / EVAL_INFO, results / SCORES
    if not info.is_file():
        raise ConfigError(f"no {info}: sampling of the suite is not complete")
    words = vision_reward_command(
        flags.vision_reward, eval_info=info, output=scores, model=flags.vision_reward_model
    )

    def reward() -> dict[str, float]:
        if not scores.is_file() and (subprocess.run(words).returncode or not scores.is_file()):
            raise ConfigError(f"VisionReward failed or wrote no {scores}: {shlex.join(words)}")
        return read_vision_reward(scores, read_json(info, what="list of videos"))

    return reward


if __name__ == "__main__":
    sys.exit(main())
