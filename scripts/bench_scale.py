"""What a training step costs: time, memory, tokens per second, MFU and communication of every
recipe, network and layout, beside what the planner says. Random weights at full size, made-up
latents of 480p.

    torchrun --nproc_per_node=1 -m scripts.bench_scale --json scale.json
    torchrun --nproc_per_node=4 -m scripts.bench_scale --json scale.json
    python -m scripts.bench_scale --plan-only --gpus 4 --gpu h100  # what fits; needs no GPU
    python -m scripts.bench_scale --report --json scale.json  # all rows, and scaling between them

Every row is composed as `scripts.train` composes it and runs in the trainer's own loop: every kind
of iteration once or twice to warm up, then `--repeats` times, then once under the profiler. Seconds
are the median of the repetitions (their rollouts differ in length, two of them on the mean as a
whole cycle's) of the slowest rank; kinds are weighed by their share. Tokens are those of the
videos, 1560 per latent frame at 480p, not of packed halves. MFU: `scripts.bench_scale_flops`.
"comm" is the share of the profiled iterations in which kernels of NCCL ran, "exposed" that in which
nothing else did.

A row whose prediction does not fit is tried without the student's average, and says so; one that
does not fit then is not run. The file is written after every row; rows in it that this launch does
not measure stay. A row whose ranks wait for each other too long ends the launch.
"""

from __future__ import annotations

import os

# multicast over NVLink is not to be had on shared machines; read when the first group is made
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from rcm.configs.cli import DEFAULT_REGISTRY, load_registry
from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.stop_signal import INTERRUPTED
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import command, writable_file
from rcm.parallel.launch import is_first, launched_world
from rcm.parallel.mesh import ParallelDims, process_group
from rcm.train.planner_card import CARDS, Card, card
from scripts.bench_scale_report import (
    Ledger,
    measured_record,
    print_comparison,
    print_plan,
    print_record,
)
from scripts.bench_scale_rows import Planned, Row, chosen, planned
from scripts.bench_scale_run import Attempt, attempt

BUILDING = 12.0
"""Seconds that a row takes beside its iterations: networks, first kernels, reading the profile."""

PATIENCE = 60.0
"""Seconds that a rank waits for the others at the end of a row."""


def present_card() -> Card:
    """The card of this machine as the planner knows it: by name, with the memory that it has."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = next(
        (name for name in CARDS if name.partition("-")[0] in properties.name.lower()), "h200"
    )
    return card(name, memory_gib=properties.total_memory / 2**30)


def turns_of(options: argparse.Namespace) -> int:
    """Iterations of each kind behind those that warm up."""
    return options.repeats + (not options.no_profile)


@cache
def dims_of(mesh: tuple[int, int, int], device_type: str) -> ParallelDims:
    """One set of meshes for all rows of a layout: every communicator of NCCL keeps memory that no
    allocator counts.
    """
    return ParallelDims(*mesh, device_type)


class Watchdog:
    """Ends this process if the block takes longer than `seconds`: a collective that some ranks
    never reach cannot be interrupted.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._timer = threading.Timer(seconds, self._end, (seconds, what))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    @staticmethod
    def _end(seconds: float, what: str) -> None:
        told = f"{what}: not done after {seconds:.0f} s; this process ends"
        print(told, file=sys.stderr, flush=True)
        os._exit(3)


class Bench:
    """All rows of one launch, in turn. Decisions are taken by rank 0 and told to the others."""

    def __init__(
        self, options: argparse.Namespace, *, ranks: int, device: torch.device, ledger: Ledger
    ) -> None:
        self.options, self.ranks, self.device, self.ledger = options, ranks, device, ledger
        stated = partial(card, options.gpu, memory_gib=options.memory_gib)
        self.on = present_card() if device.type == "cuda" else stated()
        self.main = dist.get_rank() == 0
        self.began, self.broken = time.monotonic(), False
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
        fused = device.type == "cuda"
        self.how = {"ranks": ranks, "on": self.on, "tiny": options.small, "fused": fused}

    def run(self, rows: Sequence[Row]) -> int:
        """Exit status: 0 if every row of this launch was measured, left out, or ran out of memory;
        1 if one failed or was refused; 130 when asked to stop.
        """
        for row in rows:
            try:
                found = planned(row, **self.how)
            except ConfigError as error:
                self.finish(row, {"status": "refused", "why": str(error)})
                self.broken = True
                continue
            if why := self.told(self.reason_against(found)):
                self.finish(row, {"status": "not run", "why": why}, found)
                continue
            status = self.measure(found)
            if status == "stopped":
                return INTERRUPTED
            self.broken |= status == "failed"
        return self.told(int(self.broken))

    def told(self, decision: Any) -> Any:
        """What rank 0 says."""
        box = [decision]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def reason_against(self, found: Planned) -> str:
        """Why a row is left out, "" where it is not."""
        needed = found.iterations_seconds(turns_of(self.options))
        prediction = found.prediction
        if not prediction.fits:
            reserved = prediction.reserved / 2**30
            return f"needs {reserved:.1f} of {self.on.gib:.1f} GiB, the average left out"
        if needed > self.options.limit:
            return f"would take {needed:.0f} s, more than --limit {self.options.limit:g}"
        left = self.options.budget - (time.monotonic() - self.began)
        if needed + BUILDING > left:
            return (
                f"would take {needed + BUILDING:.0f} s, {left:.0f} of --budget"
                f" {self.options.budget:g} are left"
            )
        return ""

    def measure(self, found: Planned) -> str:
        """Run the row on all ranks and record it. How it ended."""
        row, options = found.row, self.options
        began = time.monotonic()
        with Watchdog(2 * options.limit + PATIENCE, row.name):
            own = attempt(
                found.run,
                dims=dims_of(found.run.mesh, self.device.type),
                device=self.device,
                roles=[phase.role for phase in found.prediction.phases],
                warm=found.warm,
                repeats=options.repeats,
                profiled=not options.no_profile,
                reduce=row.reduce,
            )
            ends: list[Attempt] = [own] * self.ranks
            dist.all_gather_object(ends, own, group=self.control)
        broken = [end for end in ends if end.status != "measured"]
        worst = max(broken, key=lambda end: end.status == "failed", default=own)
        if worst.status == "measured":
            record = measured_record(found.prediction, found.flops, ends)
        else:
            record = {"status": worst.status, "why": worst.why}
        self.finish(row, record | {"took_s": round(time.monotonic() - began, 1)}, found)
        return worst.status

    def finish(self, row: Row, record: dict[str, Any], found: Planned | None = None) -> None:
        """Print and write a row's end (rank 0)."""
        if not self.main:
            return
        record = {"row": row.name, "ranks": self.ranks, **record}
        if found is not None:
            record |= {
                "words": list(found.run.overrides),
                "left_out": list(found.lean),
                "predicted": {
                    "seconds": found.prediction.seconds,
                    "peak_gib": found.prediction.peak / 2**30,
                    "reserved_gib": found.prediction.reserved / 2**30,
                },
            }
        print_record(record)
        self.ledger.end(record)


_FLAGS = f"""
rows A,B         names or globs, in this order; without it all that the number of ranks allows
list             print the rows and stop
plan-only        print what the planner says of every row and stop
report           print the rows of the --json file and stop
budget S = 520   seconds of this launch; rows beyond it are left out
limit S = 90     rows whose iterations take longer are left out
repeats N        iterations that count, of each kind
no-profile       without a last one that tells the share of communication
json FILE        written after every row; read first, and by --report
gpus N           --plan-only, --list: ranks
gpu {"|".join(CARDS)} = h100  --plan-only: the card
memory-gib,memory_gib float  --plan-only: another memory size
device cuda|cpu = cuda
small            tiny networks and videos, for trying the script
"""


_REPORT = ("help", "report", "json")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="scripts.bench_scale", description=__doc__)
    add_flags(
        parser,
        _FLAGS,
        repeats={"type": int, "choices": range(1, 10), "default": 2, "metavar": "N"},
        json={"type": writable_file},
    )
    run = ("budget", "limit", "no_profile", "device")
    parser.idle(*run, "repeats", "json", "gpu", "memory_gib", "plan_only", "small", beside="list")
    parser.idle(*run, "json", beside="plan_only")
    parser.idle(*(name for name in parser.names if name not in _REPORT), beside="report")

    def on_cards(options: argparse.Namespace) -> bool:
        told = options.list or options.plan_only or options.report
        return options.device == "cuda" and not told

    parser.idle("gpu", "memory_gib", beside="plan_only", when=on_cards)
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """0: every row was measured, left out, or ran out of memory. 1: one failed or was refused. 2:
    the request cannot be met.
    """
    options = arguments(argv)
    load_registry(DEFAULT_REGISTRY)
    ranks = options.gpus or launched_world()
    if options.report:
        if options.json is None or not options.json.path.is_file():
            named = "" if options.json is None else f", and {options.json} is none"
            raise ConfigError(f"--report reads the file of --json; give one{named}")
        records = Ledger(options.json).records()
        for record in records:
            print_record(record)
        print_comparison(records)
        return 0
    rows, unknown = chosen(options.rows, ranks=ranks)
    if unknown and is_first():
        told = f"--rows {','.join(unknown)}: no such row on {ranks} rank(s); the others run"
        print(f"error: {told}", file=sys.stderr, flush=True)
    if options.list:
        for row in rows:
            reduced = f"  (gradients reduced in {row.reduce})" if row.reduce else ""
            print(f"{row.name:<44} {' '.join(row.overrides(ranks))}{reduced}")
        return 0
    if options.plan_only:
        on = card(options.gpu, memory_gib=options.memory_gib)
        plans = [planned(row, ranks=ranks, on=on, tiny=options.small, fused=True) for row in rows]
        spent = [p.iterations_seconds(turns_of(options)) + BUILDING for p in plans]
        print_plan(
            (p.row.name, p.prediction, p.lean, seconds)
            for p, seconds in zip(plans, spent, strict=True)
        )
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "bench_scale needs CUDA devices; --plan-only needs none, --device cpu --small tries the"
            " script"
        )
    with process_group(options.device) as device:
        first, world = dist.get_rank() == 0, dist.get_world_size()
        if ranks != world:
            raise ConfigError(
                f"--gpus {ranks}, but this launch has {world} rank(s); start it with torchrun"
                f" --nproc_per_node={ranks}"
            )
        ledger = Ledger(options.json if first else None, device=device)
        status = Bench(options, ranks=world, device=device, ledger=ledger).run(rows)
        if first:
            print_comparison(ledger.records())
    return status or int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
