"""Attention with tangent, and masked attention with gradient: correctness first, then times of
every variant, as a table and JSON.

    python -m scripts.bench_attention [--part all] [--json FILE] [--frames 21] [--only SUBSTRING] \\
        [--repeats 7]

`--part tangent` is this file, `--part gradient` is `scripts/bench_masked.py`.

Shapes are Wan2.1-1.3B at 480p: 12 heads of 128, 1560 tokens per latent frame. A variant whose check
fails is not timed. FLOP counts are the useful ones: products x 2 x (query, key) pairs that the mask
allows x head size x heads. Quote ratios of one run; machines differ by 10 %.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm.core.errors import ConfigError, first_line
from rcm.diffusion.blocks import BlockPattern
from rcm.inference.outcome import command
from rcm.kernels.flash_jvp.budget import errors_and_budgets, relative_error
from rcm.kernels.flash_jvp.launch import Tiles, triton_jvp
from rcm.kernels.flash_jvp.selfcheck import time_ms
from rcm.kernels.flash_jvp.validation import Problem, check_problem
from rcm.kernels.masks import BlockCausal, Full, MaskSpec, TeacherForcing
from scripts.bench_masked import FRAME_TOKENS, HEADS, PATTERNS, SMALL_TOKENS, WIDTH, measure_all
from scripts.bench_measure import bench_flags, in_words, this_card, write


@dataclass(frozen=True)
class Work:
    """What is computed: a mask, which tangents exist, and where the tangents of keys begin."""

    name: str
    mask: MaskSpec
    small: MaskSpec
    tangents: str
    tangent_start: int = 0
    small_start: int = 0

    def flop(self) -> float:
        """Useful floating-point operations over all heads."""
        total = 0.0
        for segment in self.mask.row_segments():
            for start, stop in segment.intervals:
                plain = max(0, min(stop, self.tangent_start) - start)
                total += (segment.q_stop - segment.q_start) * (
                    plain * self._products(False) + (stop - start - plain) * self._products(True)
                )
        return total * 2 * WIDTH * HEADS

    def _products(self, with_key_tangents: bool) -> int:
        tangents = [name for name in self.tangents if with_key_tangents or name == "q"]
        return 2 + len(tangents) + any(name in tangents for name in "qk")


def works(frames: int) -> list[Work]:
    """Dense with tangent, dense primal, and the two halves of the teacher-forced tangent pass for
    each pattern.
    """
    length = frames * FRAME_TOKENS
    found = [
        Work("dense jvp", Full(length, length), Full(1000, 1000), "qkv"),
        Work("dense primal", Full(length, length), Full(1000, 1000), ""),
        Work("cross q-tangent", Full(length, 512), Full(1000, 300), "q"),
    ]
    sizes, starts = (FRAME_TOKENS, SMALL_TOKENS), (length, frames * SMALL_TOKENS)
    for name in PATTERNS:
        pattern = BlockPattern.parse(name)
        clean = (BlockCausal(pattern, frames, tokens) for tokens in sizes)
        noisy = (TeacherForcing(pattern, frames, tokens, queries="noisy") for tokens in sizes)
        both = (TeacherForcing(pattern, frames, tokens) for tokens in sizes)
        found.append(Work(f"{name} clean primal", *clean, ""))
        found.append(Work(f"{name} noisy jvp", *noisy, "qkv", *starts))
        found.append(Work(f"{name} packed primal", *both, ""))
    return found


def make_problem(
    mask: MaskSpec,
    *,
    tangents: str,
    tangent_start: int,
    heads: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:
    """Random inputs on the GPU; tangents of keys have only the rows that matter."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randn(1, length, heads, WIDTH, generator=generator, device="cuda").to(dtype)

    q, k, v = draw(mask.q_len), draw(mask.kv_len), draw(mask.kv_len)
    own = mask.kv_len - tangent_start
    lengths = {"q_dot": mask.q_len, "k_dot": own, "v_dot": own}
    dots = {name: draw(length) if name[0] in tangents else None for name, length in lengths.items()}
    return check_problem(q, k, v, **dots, mask=mask, scale=None, tangent_start=tangent_start)


def sdpa_by_segment(
    problem: Problem, *, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION
) -> tuple[Tensor, None, None]:
    """Primal attention as one dense library call per run of queries with equal keys."""
    out = torch.empty_like(problem.q)
    with sdpa_kernel(backend):
        for start, stop, intervals in problem.mask.row_segments():
            (low, high), *rest = intervals
            keys, values = problem.k[:, low:high], problem.v[:, low:high]
            if rest:
                keys = torch.cat([keys, *(problem.k[:, a:b] for a, b in rest)], dim=1)
                values = torch.cat([values, *(problem.v[:, a:b] for a, b in rest)], dim=1)
            part = F.scaled_dot_product_attention(
                problem.q[:, start:stop].transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
            )
            out[:, start:stop] = part.transpose(1, 2)
    return out, None, None


def variants(work: Work) -> dict[str, Callable[[Problem], tuple]]:
    """Name -> implementation, for one kind of work."""
    found: dict[str, Callable[[Problem], tuple]] = {
        "hopper": lambda p: triton_jvp(p, kernel="hopper")
    }
    if work.tangents:
        for m, n, warps, stages in ((128, 32, 8, 3), (128, 64, 8, 2)):
            tiles = Tiles(m, n, warps, stages)
            found[f"portable {m}x{n} w{warps} s{stages}"] = lambda p, tiles=tiles: triton_jvp(
                p, kernel="portable", tiles=tiles
            )
    else:
        tiles = Tiles(128, 128, 8, 2)
        found["portable 128x128 w8 s2"] = lambda p: triton_jvp(p, kernel="portable", tiles=tiles)
        found["cuDNN per chunk"] = sdpa_by_segment
    return found


def is_correct(work: Work, run: Callable[[Problem], tuple]) -> tuple[bool, str]:
    """Small problem of the same kind against float64, within twice the error of eager bf16."""
    problem = make_problem(
        work.small, tangents=work.tangents, tangent_start=work.small_start, heads=2
    )
    got = run(problem)
    if got[2] is None:
        error = relative_error(got[0], triton_jvp(problem, kernel="portable")[0])
        return error < 0.02, f"o vs portable {error:.1e}"
    report = errors_and_budgets(problem, got)
    words = " ".join(f"{name} {error:.1e}/{budget:.1e}" for name, (error, budget) in report.items())
    return all(error <= budget for error, budget in report.values()), words


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large matrix product, for a moment and for a second (the power limit), and TB/s
    of a device copy.
    """
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product = 2 * 8192**3 / 1e9
    return {
        "matmul 8192 TFLOP/s": product / time_ms(lambda: a @ b, repeats=15),
        "matmul 8192 sustained TFLOP/s": (
            600 * product / time_ms(lambda: [a @ b for _ in range(600)], repeats=1)
        ),
        "copy TB/s": 2 * source.nbytes / time_ms(lambda: target.copy_(source)) / 1e9,
    }


def measure(work: Work, *, only: str, repeats: int) -> list[dict]:
    """Check and time every variant of one kind of work."""
    rows = []
    problem = make_problem(
        work.mask, tangents=work.tangents, tangent_start=work.tangent_start, heads=HEADS
    )
    for name, run in variants(work).items():
        if only and only not in f"{work.name} {name}":
            continue
        began = time.perf_counter()
        row = {"work": work.name, "variant": name}
        try:
            good, words = is_correct(work, run)
            row |= {"correct": good, "errors": words}
            row["first_call_s"] = round(time.perf_counter() - began, 1)
            if good:
                row["ms"] = time_ms(lambda run=run: run(problem), repeats=repeats)
                row["tflops"] = work.flop() / row["ms"] / 1e9
        except Exception as error:
            row |= {"correct": False, "errors": first_line(error)}
        rows.append(row)
        print(
            f"{row['work']:20s} {row['variant']:26s} {row.get('ms', float('nan')):9.3f} ms"
            f" {row.get('tflops', float('nan')):7.1f} TFLOP/s "
            f" {'ok' if row['correct'] else 'WRONG'}  {row['errors']}  (check incl. compilation"
            f" {row.get('first_call_s', 0)} s)",
            flush=True,
        )
    return rows


@command
def main(arguments: list[str] | None = None) -> int:
    """Measure everything and print it."""
    parser = bench_flags(__doc__)
    parser.add_argument("--part", choices=("all", "tangent", "gradient"), default="all")
    parser.add_argument("--frames", type=int, default=21, help="latent frames of 1560 tokens [21]")
    parser.add_argument("--only", default="", help="substring of 'work variant' to run")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.frames % 12 != 9:
        raise ConfigError(
            f"--frames {options.frames} is no whole number of blocks of {', '.join(PATTERNS)};"
            " give 9, 21, 33 or so on"
        )
    machine, how = this_card("bench_attention"), {"only": options.only, "repeats": options.repeats}
    with torch.no_grad():
        limits = ceilings()
        print(in_words(limits), flush=True)
        parts = works(options.frames) if options.part != "gradient" else []
        rows = [row for work in parts for row in measure(work, **how)]
    if options.part != "tangent":
        rows += measure_all(options.frames, **how)
    if not rows:
        raise ConfigError(f"--only {options.only} is part of no name; leave it out to see them all")
    if options.json:
        write(options.json, {"machine": machine, "ceilings": limits, "rows": rows})
    return 1 if any(row["correct"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
