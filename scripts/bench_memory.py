"""Measure what scripts.plan predicts: peak memory and seconds of real training iterations on random
weights and made-up data.

    python -m scripts.bench_memory  # the three cases of docs/planner.md, on one CUDA card
    python -m scripts.bench_memory --case mine \\
        experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_c1-1 model.config.net.sac_config.mode=none
    torchrun --nproc_per_node=2 -m scripts.bench_memory --case two experiment=... \\
        model.config.fsdp_shard_size=2

Networks are made on the device with RANDOM weights, no checkpoint is read, data are made up:
numbers say nothing about quality. Every kind of iteration runs twice with its longest rollout,
in the trainer's own loop; the second is measured (by then the optimiser's states exist). On
the CPU a counter of live tensors stands in for CUDA's, and the plain formulas are predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from rcm.configs.cli import DEFAULT_REGISTRY, load_registry
from rcm.configs.compose import Run, compose_run
from rcm.configs.plan_job import plan_job
from rcm.core.errors import first_line
from rcm.core.output_file import OutputFile
from rcm.inference.outcome import command
from rcm.parallel.mesh import ParallelDims, process_group
from rcm.train.planner import Prediction, predict
from rcm.train.planner_card import GIB, H200
from scripts.bench_measure import bench_flags, forget, in_words, machine, require_card, write
from scripts.bench_scale_rows import NO_FILES
from scripts.bench_scale_run import Meter, Watch, longest_rollout, scripted_phases, trained

_PREFIX = "experiment=causal_wan2pt1_1pt3B_res480p_t2v_"
CASES: dict[str, list[str]] = {
    "teacher forcing": [_PREFIX + "tf_c3-3"],
    "continuous consistency, 14B teacher": [_PREFIX + "tf_scm_c3-3"],
    "self-forced DMD, 14B teacher": [_PREFIX + "sf_dmd_2step_c3-3", "net_fake_score=wan2pt1_1pt3b"],
}
"""On one card; the 14B fake score of the last one would need 213 GiB of states and gradients."""

ONE_CARD = ["model.config.fsdp_shard_size=1", "model_parallel.context_parallel_size=1"]


@dataclass(frozen=True)
class Measured:
    """One kind of iteration: bytes allocated before it and at its peak, and its seconds, beside the
    prediction's.
    """

    case: str
    role: str
    before: float
    peak: float
    seconds: float
    predicted_peak: float
    predicted_seconds: float

    @property
    def memory_ratio(self) -> float:
        """Predicted over measured peak."""
        return self.predicted_peak / self.peak


def measure(case: str, run: Run, *, dims: ParallelDims, device: torch.device) -> list[Measured]:
    """Every kind of iteration of `run` twice, with random weights; a row per kind of the second
    time. Collective.
    """
    expected = expect(run, ranks=dims.world_size, device=device)
    roles = [phase.role for phase in expected.phases]
    phases = scripted_phases(run, roles, [longest_rollout(run)] * 2)
    watch = Watch(phases, meter=Meter(device))
    if trained(run, watch, dims=dims, device=device) != "finished":
        raise KeyboardInterrupt
    seen = zip(watch.iterations[len(roles) :], expected.phases, strict=True)
    return [
        Measured(case, phase.role, i.before, i.allocated, i.seconds, phase.peak, phase.seconds)
        for i, phase in seen
    ]


def expect(run: Run, *, ranks: int, device: torch.device) -> Prediction:
    """The planner's word on `run`, for the longest rollouts."""
    return predict(
        plan_job(run, ranks=ranks, fused=device.type == "cuda", rollouts="longest"), H200
    )


def table(rows: Sequence[Measured]) -> str:
    """Predicted beside measured."""
    head = (
        f"{'case':<38}{'iteration':<12}{'measured GiB':>13}{'predicted':>11}{'ratio':>7}"
        f"{'seconds':>9}{'predicted':>11}{'ratio':>7}"
    )
    lines = [
        f"{row.case:<38}{row.role:<12}{row.peak / GIB:>13.3f}{row.predicted_peak / GIB:>11.3f}"
        f"{row.memory_ratio:>7.3f}{row.seconds:>9.2f}{row.predicted_seconds:>11.2f}"
        f"{row.predicted_seconds / row.seconds:>7.2f}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add("--config", default=DEFAULT_REGISTRY, metavar="REGISTRY", help="as scripts.train has it")
    add("--case", default="given", metavar="NAME", help="name of the case that the words describe")
    add("--predict", action="store_true", help="print the predictions and stop")
    words = "as for scripts.train; without them the three cases of docs/planner.md"
    add("words", nargs="*", metavar="key=value", help=words)
    parser.idle("case", without="words")
    parser.idle("json", beside="predict")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error."""
    flags = arguments(argv)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    registry = load_registry(flags.config)
    cases = {name: [*words, *ONE_CARD] for name, words in CASES.items()}
    if flags.words:
        cases = {flags.case: flags.words}
    if flags.predict:
        return _print_predictions(cases, registry)
    if not flags.words:
        require_card("bench_memory", instead="give a small experiment, or --predict")
    rows: list[Measured] = []
    with process_group(device_type) as device:
        for name, words in cases.items():
            world = torch.distributed.get_world_size()
            run = compose_run(
                [*words, *NO_FILES], registry=registry, world_size=world, require_inputs=False
            )
            replicate, shard, cp = run.mesh
            dims = ParallelDims(
                dp_replicate=replicate, dp_shard=shard, cp=cp, device_type=device_type
            )
            try:
                rows += measure(name, run, dims=dims, device=device)
            except torch.OutOfMemoryError as error:
                print(f"{name}: {first_line(error)}", file=sys.stderr, flush=True)
            if dims.rank == 0 and rows:
                _report(name, rows, flags.json, device)
            forget(device)
    return 0


def _report(
    case: str, rows: Sequence[Measured], path: OutputFile | None, device: torch.device
) -> None:
    on = machine(device)
    print(
        f"\n{case}: done, RANDOM weights, made-up data; {in_words(on)}\n{table(rows)}", flush=True
    )
    if path is not None:
        write(path, {"machine": on, "rows": [asdict(row) for row in rows]})


def _print_predictions(cases: Mapping[str, Sequence[str]], registry: str) -> int:
    for name, words in cases.items():
        run = compose_run(
            [*words, *NO_FILES], registry=registry, world_size=None, require_inputs=False
        )
        found = expect(run, ranks=1, device=torch.device("cuda"))
        for phase in found.phases:
            print(f"{name:<38}{phase.role:<12}{phase.peak / GIB:>9.2f} GiB{phase.seconds:>9.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
