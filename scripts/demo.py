"""The whole recipe on the toy world, in 10 minutes on two idle CPU cores: data, bidirectional
teacher, causal teachers, consistency students, self-forced DMD, frame by frame and in chunks,
sampled in 1, 2 and 4 steps and scored exactly.

    rcm demo                 all stages; the same command continues where it was stopped
    rcm demo --quick         one method, in minutes
    rcm demo --fresh         start over

It writes report.html, report.json and mp4 files to outputs/demo, updates the page after every
stage, prints a table, and exits with status 1 if a stage scores below its threshold. Every stage is
an ordinary experiment (configs/experiment/toy_*.yaml) run through the training entry point.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.files import discard
from rcm.core.output_file import require_folder
from rcm.core.stop_signal import status_of
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import command
from rcm.train.job_lock import NAME as LOCK
from rcm.train.job_lock import job_lock
from scripts.demo_page import COLUMNS, verdict, write_page
from scripts.demo_progress import Board
from scripts.demo_record import FILE_NAME, Record
from scripts.demo_run import LONG_FRAMES, Demo, Failed, Stopped
from scripts.demo_stages import Stage, branches, flat
from scripts.demo_threads import free_threads

VERDICTS = {True: "pass", False: "FAIL", None: "  - "}
DRAW_EVERY = 0.25


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. 0: done; 1: a gate was missed or a stage failed; 2: a flag is wrong, or a file
    cannot be written; 130, 143: stopped, to be continued.
    """
    args = _parser().parse_args(argv)
    folder = _folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    with job_lock(folder, knob="--out"):
        record = _open(args, folder)
        # sampling runs beside training processes: more threads would wait for each other
        torch.set_num_threads(1)
        how = {"scale": args.scale, "num_videos": args.videos}
        judged = args.scale >= 1 and not args.quick
        return Session(record, branches(args.quick), judged=judged, **how).run()


_FLAGS = """
out str            folder of everything the demo writes [outputs/demo, or outputs/demo_quick]
fresh              start over: empty the folder first, which must be a demo's
quick              one stage from random weights, no threshold: under 3 minutes on 2 idle cores
scale float = 1.0  factor on all numbers of iterations; below 1 no threshold is checked
videos int = 96    videos sampled per score, at least 8 [%(default)s]
"""


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="scripts.demo", description=__doc__)
    add_flags(parser, _FLAGS, out={"type": Path})
    return parser


def _folder(args: argparse.Namespace) -> Path:
    """Check the flags, and that the folder is a demo's or empty."""
    folder = args.out or Path("outputs/demo_quick" if args.quick else "outputs/demo")
    if str(folder).encode(errors="replace") != os.fsencode(folder):
        raise ConfigError(f"--out {str(folder)!r} is not UTF-8; choose another name")
    require_folder(folder, f"--out {folder}")
    if odd := re.search(r"[,*?[]|\$\{", str(folder)):
        raise ConfigError(f"--out {folder}: a name with {odd[0]} cannot be a value of rcm train")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held - {LOCK, f"{FILE_NAME}.writing"} and not (folder / FILE_NAME).is_file():
        raise ConfigError(
            f"--out {folder} holds files that no demo wrote (it has no {FILE_NAME}); choose an"
            " empty or a new folder"
        )
    return folder


def _open(args: argparse.Namespace, folder: Path) -> Record:
    """The record of the folder, emptied first if it is to be fresh: what makes it a demo's goes
    last, so that it stays one when this is interrupted.
    """
    for path in sorted(folder.iterdir(), key=lambda p: p.name == FILE_NAME) if args.fresh else ():
        if path.name != LOCK:
            discard(path)
    return Record.open(folder, {"quick": args.quick, "scale": args.scale, "videos": args.videos})


class Session:
    """One sitting of a demo: what is left runs, side by side where it can, until all is done or
    Ctrl-C.
    """

    def __init__(
        self,
        record: Record,
        chosen: Sequence[Sequence[Stage]],
        *,
        scale: float,
        num_videos: int,
        judged: bool,
    ) -> None:
        self.record, self.chosen, self.stages, self.judged = record, chosen, flat(chosen), judged
        self.board = Board(chosen)
        self.demo = Demo(
            record, self.board, scale=scale, num_videos=num_videos, changed=self._write_page
        )
        self._begin, self._before = time.perf_counter(), record.seconds
        self._page = threading.Lock()

    def run(self) -> int:
        """Work, watch, tell; returns the exit status."""
        self.board.resume({stage.name: self.demo.share(stage) for stage in self.stages})
        scored = sum(self.record.is_scored(stage.name) for stage in self.stages)
        kept = f", {scored} done before" if scored else ""
        page, logs = self.record.folder / "report.html", self.record.folder / "logs"
        when = "" if page.exists() else " (after the first)"
        count = f"{len(self.stages)} stage{'s' * (len(self.stages) > 1)}"
        self.board.say(f"{count}{kept}; page {page}{when}, logs {logs}")
        hung_up = signal.getsignal(signal.SIGHUP)
        if hung_up is signal.SIG_DFL:  # a closed terminal, which training processes do not notice
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        try:
            self._work()
        except KeyboardInterrupt as stop:
            self._stopped()
            return status_of(stop)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            signal.signal(signal.SIGHUP, hung_up)
            self._clock()
            self.record.write()
        return self._finished()

    def _work(self) -> None:
        """The first branch, then the others side by side: one core each beats two threads on
        tensors this small.
        """
        first, *others = self.chosen
        with ThreadPoolExecutor(1 + max(1, len(others))) as pool, self.board.drawing():
            try:
                self._wait([pool.submit(self._first, first)])
                late = [pool.submit(self.demo.score, first[-1])]
                self._wait([*late, *(pool.submit(self._branch, one) for one in others)])
            except BaseException:
                self.demo.stop()
                raise

    def _first(self, first: Sequence[Stage]) -> None:
        self.demo.build_data()
        for i, stage in enumerate(first):
            if i:
                self.demo.score(first[i - 1])
            self.demo.train(stage, threads=free_threads())

    def _branch(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            self.demo.wait_for(stage.feeds.values())
            self.demo.train(stage, threads=1)
            self.demo.score(stage)

    def _wait(self, futures: Sequence[Future]) -> None:
        """Draw until all are done; the first error ends the others."""
        while not all(future.done() for future in futures):
            self.board.show()
            broken = next((f for f in futures if f.done() and f.exception() is not None), None)
            if broken is not None:
                self.demo.stop()
            time.sleep(DRAW_EVERY)
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
            raise error

    def _stopped(self) -> None:
        """After Ctrl-C: processes have saved; a second Ctrl-C had ended them at once."""
        self.demo.kill()
        doing = next(
            (stage for stage in self.stages if not self.record.is_scored(stage.name)),
            self.stages[-1],
        )
        where = f"{self.board.number(doing.name)} ({doing.name})"
        print(
            f"stopped at {where}; the same command continues there, --fresh begins anew",
            file=sys.stderr,
        )

    def _clock(self) -> None:
        self.record.seconds = self._before + time.perf_counter() - self._begin

    def _write_page(self) -> None:
        with self._page:  # branches may end at once
            self._clock()
            left = [stage.name for stage in self.stages if not self.record.is_scored(stage.name)]
            done = len(self.stages) - len(left)
            status = f"{done} of {len(self.stages)} stages done; reload for more" if left else ""
            page = write_page(self.demo, self.stages, judged=self.judged, status=status)
        if done == 1 and left:
            self.board.say(f"first videos: open {page}")

    def _finished(self) -> int:
        self._write_page()
        scores = self.demo.scores()
        verdicts = {stage.name: verdict(stage, scores, judged=self.judged) for stage in self.stages}
        _print_table(self.demo, self.stages, verdicts)
        minutes, seconds = divmod(round(self.record.seconds), 60)
        last = self.demo.run([s.name for s in self.stages if s.pattern == "c1-1"][-1])
        print(f"\n{minutes} min {seconds:02d} s in all; open {self.record.folder / 'report.html'}")
        words = shlex.join(["rcm", "stream", "--ckpt", str(last)])
        print(f'next: {words} --prompt "{self.demo.prompts[0]}"')
        return 0 if all(passed in (True, None) for _, passed in verdicts.values()) else 1


def _print_table(
    demo: Demo, stages: Sequence[Stage], verdicts: dict[str, tuple[str, bool | None]]
) -> None:
    print(f"\n{'stage':<16} {'steps':<11} " + " ".join(f"{c:>9}" for c in COLUMNS))
    order = [stage.name for stage in stages]
    for (name, label), scores in sorted(
        demo.scores().items(), key=lambda item: order.index(item[0][0])
    ):
        cells = " ".join(
            f"{scores[c]:9.1f}" if c == "score" else f"{scores[c]:9.2f}" for c in COLUMNS
        )
        print(f"{name:<16} {label:<11} {cells}")
    for stage in stages:
        if drift := demo.record.stages[stage.name]["drift"]:
            print(
                f"{stage.name:<16} streamed {LONG_FRAMES} frames: adherence drifts by"
                f" {drift['drift over 4 windows']:+.1f}"
            )
    print()
    for name, (sentence, passed) in verdicts.items():
        print(f"{VERDICTS[passed]}  {name:<16} {sentence}")


if __name__ == "__main__":
    sys.exit(main())
