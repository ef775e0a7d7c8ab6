"""`python -m rcm.kernels.flash_jvp.selfcheck`: is the fused kernel right, and how fast is it, on
this very GPU?

Checks O, O_dot and LSE against float64 over masks, dtypes, head sizes and missing tangents; then
times dense attention with tangent against the library's dense attention. Exit status 0: the card is
good. 1: a check failed. 2: there is no CUDA device to check.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from rcm.core.arguments import Arguments
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.flash_jvp.budget import errors_and_budgets
from rcm.kernels.flash_jvp.validation import Problem, Results, check_problem
from rcm.kernels.masks import BlockCausal, MaskSpec, Queries, TeacherForcing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One problem to check; lengths come from the mask if there is one."""

    name: str
    mask: MaskSpec | None = None
    q_len: int = 515
    kv_len: int = 515
    d_qk: int = 128
    d_v: int = 128
    tangents: str = "qkv"
    tangent_start: int = 0
    batch: int = 2
    heads: int = 2

    @property
    def lengths(self) -> tuple[int, int]:
        """(query tokens, key tokens)."""
        return (
            (self.q_len, self.kv_len) if self.mask is None else (self.mask.q_len, self.mask.kv_len)
        )


def cases() -> Iterator[Case]:
    """Dense, cross-attention, head sizes, single tangents, and every family of masks with sizes
    that divide no tile.
    """
    yield Case("dense")
    yield Case("dense, 1 query, 1 key", q_len=1, kv_len=1)
    yield Case("cross-attention, tangent of q only", q_len=700, kv_len=77, tangents="q")
    yield Case("cross-attention, no tangent", q_len=130, kv_len=513, tangents="")
    yield from (
        Case(f"dense, tangent of {name} only", tangents=name, q_len=200, kv_len=333)
        for name in "qkv"
    )
    yield from (
        Case(f"heads of {d_qk} and {d_v}", d_qk=d_qk, d_v=d_v)
        for d_qk, d_v in ((64, 64), (64, 128), (128, 64), (16, 16), (80, 48), (256, 256))
    )
    yield Case("tangent only from key 301", tangent_start=301)
    yield Case("block-causal c1-2", BlockCausal(BlockPattern(1, 2), 7, 75))
    yield Case(
        "block-causal, offset, window 2, sink",
        BlockCausal(BlockPattern(1, 1), 9, 61, q_block_offset=4, window=2, sinks=1),
    )
    for window, sinks in ((None, 0), (1, 0), (1, 1), (2, 1)):
        for queries in get_args(Queries):
            mask = TeacherForcing(
                BlockPattern(1, 2), 7, 83, queries=queries, window=window, sinks=sinks
            )
            start = mask.half_len if queries == "noisy" else 0
            yield Case(
                f"teacher-forced {queries}, window {window}, sinks {sinks}",
                mask,
                tangent_start=start,
            )


def make_problem(
    case: Case, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Problem:
    """Random inputs with a component that all tokens share, so that no term of the tangent is
    negligible.
    """
    generator = torch.Generator().manual_seed(seed)
    q_len, kv_len = case.lengths

    def draw(length: int, width: int) -> Tensor:
        x = torch.randn(case.batch, length, case.heads, width, generator=generator) + torch.randn(
            1, 1, 1, width, generator=generator
        )
        return x.to(device=device, dtype=dtype)

    q, k, v = draw(q_len, case.d_qk), draw(kv_len, case.d_qk), draw(kv_len, case.d_v)
    dots = {
        f"{name}_dot": draw(x.shape[1], x.shape[3]) if name in case.tangents else None
        for name, x in (("q", q), ("k", k), ("v", v))
    }
    return check_problem(
        q, k, v, **dots, mask=case.mask, scale=None, tangent_start=case.tangent_start
    )


def check(
    case: Case, *, dtype: torch.dtype, device: torch.device | str, run: Callable[[Problem], Results]
) -> dict[str, tuple[float, float]]:
    """(error, budget) of every output of `run` on one case."""
    problem = make_problem(case, dtype=dtype, device=device)
    return errors_and_budgets(problem, run(problem))


def time_ms(call: Callable[[], object], *, repeats: int = 7) -> float:
    """Median milliseconds of a CUDA call after two warm-up calls."""
    samples = []
    for attempt in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if attempt >= 2:
            samples.append(begin.elapsed_time(end))
    return statistics.median(samples)


def dense_rates(*, tokens: int = 16384, heads: int = 8, width: int = 128) -> tuple[float, float]:
    """TFLOP/s of dense attention with tangent (six products) and of the library's dense attention
    (two products), bf16.
    """
    from rcm.kernels.flash_jvp.launch import triton_jvp

    problem = make_problem(
        Case("speed", q_len=tokens, kv_len=tokens, d_qk=width, d_v=width, batch=1, heads=heads),
        dtype=torch.bfloat16,
        device="cuda",
    )
    product = 2.0 * tokens * tokens * width * heads
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    ours = time_ms(lambda: triton_jvp(problem))
    library = time_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return 6 * product / ours / 1e9, 2 * product / library / 1e9


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print them, and return the exit status; `--dtype bf16` (repeatable) restricts
    them.
    """
    parser = Arguments(
        prog="python -m rcm.kernels.flash_jvp.selfcheck",
        description="Is the fused kernel right and fast on this GPU?",
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="check only this dtype; may be repeated"
    )
    chosen = parser.parse_args(arguments).dtype or list(DTYPES)
    if not torch.cuda.is_available():
        _say(
            "flash_jvp selfcheck: there is no CUDA device here, so the fused kernel cannot run. Use"
            " implementation='reference'."
        )
        return 2
    from rcm.kernels.flash_jvp.launch import triton_jvp

    _say(f"flash_jvp selfcheck on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    _say(
        "errors are relative to float64; the budget is twice the error of eager code in the same"
        " dtype"
    )
    failures = 0
    for case in cases():
        for dtype_name in chosen:
            try:
                report = check(case, dtype=DTYPES[dtype_name], device="cuda", run=triton_jvp)
            except Exception as error:
                failures += 1
                _say(f"FAILED {case.name} {dtype_name}: {type(error).__name__}: {error}")
                continue
            good = all(error <= budget for error, budget in report.values())
            failures += not good
            numbers = "  ".join(
                f"{name} {error:.1e}/{budget:.1e}" for name, (error, budget) in report.items()
            )
            _say(f"{'ok    ' if good else 'FAILED'} {case.name:45s} {dtype_name}  {numbers}")
    ours, library = dense_rates()
    _say(
        f"speed: attention with tangent {ours:.0f} TFLOP/s, {ours / library:.0%} of the library's"
        f" dense forward, {library:.0f} TFLOP/s"
    )
    verdict = (
        "this card is GOOD for implementation='triton'"
        if not failures
        else f"{failures} checks FAILED: use implementation='reference' on this card"
    )
    _say(verdict)
    return 1 if failures else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
