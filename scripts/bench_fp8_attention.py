"""FP8 attention against bf16 on one card: errors against float64 first, then every variant over a
stream's shapes, as a table and JSON.

    python -m scripts.bench_fp8_attention [--out FILE] [--only SUBSTRING]

An error of a variant is a line of the table. Times are of calls inside a CUDA graph. "all" adds to
attention what codes the queries and the chunk's own keys and values. bf16 is the same kernel on
plain operands, as captured streams call it, beside cuDNN in one call and in parts along the keys.
Whole streams: `rcm bench stream --attention fp8 --parts correct,c33,steady`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rcm.inference.outcome import command
from rcm.kernels.persistent_attention.api import attend
from rcm.kernels.split_attention.api import split_attention
from rcm.nets.attention_auto import parts_of
from scripts.bench_measure import (
    attempted,
    bench_flags,
    captured,
    drawn,
    relative,
    require_match,
    this_card,
    write,
)

WIDTH = 128
FRAME = 1560
draw = partial(drawn, width=WIDTH, shifted=True)
SHAPES = [
    *((FRAME, FRAME * frames, 12) for frames in (1, 3, 6, 12, 21)),
    *((3 * FRAME, FRAME * frames, 12) for frames in (3, 6, 12, 21)),
    (3 * FRAME, 12 * FRAME, 40),
]
"""Queries, keys, heads: chunks of 1 and of 3 latent frames at 480x832 of the small network, one of
the large one.
"""
CHECKS = [
    (1, 1, 1, 2),
    (130, 129, 2, 3),
    (64, 16, 1, 1),
    (1000, 3001, 1, 4),
    (FRAME, 21 * FRAME, 1, 12),
]
"""Queries, keys, batch, heads."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants() -> dict[str, tuple[str, object]]:
    """Name -> kind of kernel, and its tiles."""
    from rcm.kernels.fp8_attention.schedule import PERSISTENT, PortableTiles
    from rcm.kernels.persistent_attention.schedule import Tiles

    return {
        "bf16": ("bf16", None),
        "gluon 128x128": ("hopper", PERSISTENT),
        "gluon 128x128 one level": ("hopper", Tiles(stages=4)),
        "gluon 128x128 one level, 6": ("hopper", Tiles(stages=6)),
        "gluon 128x128 one level, 3": ("hopper", Tiles(stages=3)),
        "gluon 192x64 one level": ("hopper", Tiles(3, 64, 8)),
        "triton 64x128 w4 s2": ("portable", PortableTiles(64, 128, 4, 2)),
        "triton 64x64 w4 s3": ("portable", PortableTiles(64, 64, 4, 3)),
    }


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64, head by head."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(q.shape[2]):
        a, b, c = (x[:, :, head].double() for x in (q, k, v))
        out[:, :, head] = (a @ b.mT * WIDTH**-0.5).softmax(dim=-1) @ c
    return out


class Bf16:
    """What captured streams call otherwise."""

    attend = staticmethod(partial(attend, scale=WIDTH**-0.5))
    cudnn = staticmethod(partial(split_attention, scale=WIDTH**-0.5))

    def prepare(self) -> None:
        """Compile the kernels."""
        from rcm.kernels.persistent_attention.compile_list import attention_plan
        from rcm.kernels.precompile import precompile

        precompile(attention_plan, device="cuda", threads=4)

    def check(self, case: tuple[int, int, int, int], kind: str) -> tuple[float, float]:
        """Error of the kernel, and of the library."""
        q, k, v = draw(case[0], case[1], case[3], batch=case[2], kind=kind)
        found = self.attend(q, k, v), self.cudnn(q, k, v, parts=1)
        return tuple(relative(x, exact(q, k, v)) for x in found)

    def measure(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
        """The kernel; one library call, and several for parts of the keys."""
        parts = parts_of(q, k)
        calls = {
            "ms": partial(self.attend, q, k, v),
            "library_ms": partial(self.cudnn, q, k, v, parts=1),
            "parts_ms": partial(self.cudnn, q, k, v, parts=parts),
        }
        return {name: captured(call) for name, call in calls.items()} | {"parts": parts}


class Fp8:
    """A kernel of this package with its tiles."""

    def __init__(self, kind: str, tiles: object) -> None:
        self.kind, self.tiles = kind, tiles

    def prepare(self) -> None:
        """Compile all kernels."""
        from rcm.kernels.precompile import precompile

        q, k, v = draw(130, 129, 1)
        precompile(
            lambda: self.attend(*self.coded(q, k, v, capacity=144), 129), device="cuda", threads=4
        )

    def coded(self, q: Tensor, k: Tensor, v: Tensor, *, capacity: int) -> tuple:
        """Codes of the queries and of all keys and values."""
        from rcm.kernels.fp8_attention import codes, launch

        held = codes.new_codes(codes.scales_of(k, v), batch=k.shape[0], capacity=capacity)
        launch.write(held, torch.arange(k.shape[1], device="cuda"), k, v)
        return launch.code_queries(q, held.scales, scale=WIDTH**-0.5), held

    def attend(self, queries: object, held: object, count: int) -> Tensor:
        """The kernel."""
        from rcm.kernels.fp8_attention import launch
        from rcm.kernels.persistent_attention.launch import processors

        if self.kind == "hopper":
            return launch.attend_hopper(
                queries, held, count=count, dtype=torch.bfloat16, tiles=self.tiles
            )
        batch, heads, q_len = queries.scale.shape
        per_round = processors(held.keys.device) * (8 // self.tiles.num_warps)
        tiles = batch * heads * -(-q_len // self.tiles.block_m)
        most = max(1, min(6, count // 2048))
        parts = min(range(1, most + 1), key=lambda n: (-(-tiles * n // per_round) + 0.1 * n) / n)
        return launch.attend_portable(
            queries, held, count=count, dtype=torch.bfloat16, tiles=self.tiles, parts=parts
        )

    def check(self, case: tuple[int, int, int, int], kind: str) -> tuple[float, float]:
        """Error of the kernel, and of the formula on the same codes, both against float64. Slots
        behind the keys hold codes, too.
        """
        from rcm.kernels.fp8_attention import codes, launch, reference

        q, k, v = draw(case[0], case[1], case[3], batch=case[2], kind=kind)
        queries, held = self.coded(q, k, v, capacity=case[1] + 300)
        plain = codes.new_codes(held.scales, batch=case[2], capacity=case[1])
        plain_queries = codes.code_queries_reference(q, held.scales, scale=WIDTH**-0.5)
        codes.write_reference(plain, torch.arange(case[1], device="cuda"), k, v)
        rest = torch.arange(case[1], case[1] + 300, device="cuda")
        behind = torch.randn(2, case[2], 300, case[3], WIDTH, device="cuda", dtype=q.dtype)
        launch.write(held, rest, *behind)
        truth = exact(q, k, v)
        by_formula = [
            reference.attend_reference(
                codes.CodedQueries(
                    plain_queries.codes[:, h : h + 1], plain_queries.scale[:, h : h + 1]
                ),
                codes.Codes(
                    plain.keys[:, h : h + 1],
                    plain.values[:, h : h + 1],
                    codes.Scales(*(x[h : h + 1] for x in plain.scales)),
                ),
                count=case[1],
                dtype=torch.float32,
            )
            for h in range(case[3])
        ]
        return relative(self.attend(queries, held, case[1]), truth), relative(
            torch.cat(by_formula, dim=2), truth
        )

    def measure(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
        """Attention alone, and with the coding of the queries and of the chunk's own keys and
        values.
        """
        from rcm.kernels.fp8_attention import launch

        queries, held = self.coded(q, k, v, capacity=21 * FRAME)
        slots = torch.arange(q.shape[1], device="cuda")
        own = k[:, : q.shape[1]], v[:, : q.shape[1]]
        alone = captured(lambda: self.attend(queries, held, k.shape[1]))
        asked = captured(lambda: launch.code_queries(q, held.scales, scale=WIDTH**-0.5))
        entered = captured(lambda: launch.write(held, slots, *own))
        return {
            "ms": alone,
            "queries_ms": asked,
            "entry_ms": entered,
            "all_ms": alone + asked + entered,
        }


def sustained(subject: Bf16 | Fp8) -> str:
    """Clock, power and temperature of the card after half a second of the longest call."""
    q, k, v = draw(3 * FRAME, 21 * FRAME, 12)
    if isinstance(subject, Fp8):
        queries, held = subject.coded(q, k, v, capacity=21 * FRAME)
        for _ in range(1200):
            subject.attend(queries, held, k.shape[1])
    else:
        for _ in range(800):
            subject.attend(q, k, v)
    time.sleep(0.5)
    words = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu"]
    words += ["--format=csv,noheader"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        return told.stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def measured(name: str, kind: str, tiles: object) -> list[dict]:
    """The lines of one variant: errors, then times, if the errors are good."""
    subject = Bf16() if kind == "bf16" else Fp8(kind, tiles)
    begin = time.perf_counter()
    subject.prepare()
    rows: list[dict] = [{"variant": name, "prepared_s": round(time.perf_counter() - begin, 1)}]
    for data in ("random", "real-like"):
        for case in CHECKS:
            error, budget = subject.check(case, data)
            good = error <= 1.3 * budget + 4e-3
            row = {"variant": name, "data": data, "case": case, "error": error}
            rows.append(row | {"formula": budget, "good": good})
    if not all(row.get("good", True) for row in rows):
        failed = "errors beyond those of the formula; not timed"
        return [*rows, {"variant": name, "failed": failed}]
    for shape in SHAPES:
        rows.append({"variant": name, "shape": shape} | subject.measure(*draw(*shape)))
    return [*rows, {"variant": name, "state": sustained(subject)}]


@torch.no_grad()
def run_all(names: Sequence[str]) -> list[dict]:
    """The lines of all variants; what failed has a line that says how."""
    rows: list[dict] = []
    for name in names:
        found = attempted(lambda name=name: {"rows": measured(name, *variants()[name])})
        rows += found.get("rows", [{"variant": name, "failed": found.get("error")}])
    return rows


def table(rows: list[dict], names: list[str]) -> str:
    """Errors, times, failures."""
    lines = ["errors against float64, relative (formula on the same codes in brackets)"]
    for name in names:
        mine = [row for row in rows if row["variant"] == name and "case" in row]
        words = [
            f"{row['data'][:4]} {row['case'][0]}x{row['case'][1]} {row['error']:.1e}"
            f" ({row['formula']:.1e})" + " WRONG" * (not row["good"])
            for row in mine
        ]
        lines.append(f"  {name:26s} {'; '.join(words)}")
    plain = {row["shape"]: row for row in rows if row["variant"] == "bf16" and "shape" in row}
    lines.append("milliseconds (TFLOP/s) attention alone; all; x: bf16 over all")
    for shape in SHAPES:
        flop = 4 * shape[0] * shape[1] * shape[2] * WIDTH / 1e9
        base = plain.get(shape)
        if base:
            lines.append(
                f"{shape[0]} x {shape[1]}, {shape[2]} heads: bf16 {base['ms']:.4f}"
                f" ({flop / base['ms']:.0f}); cuDNN {base['library_ms']:.4f}"
                f" ({flop / base['library_ms']:.0f}), {base['parts']} parts {base['parts_ms']:.4f}"
            )
        for row in rows:
            if row["variant"] != "bf16" and row.get("shape") == shape:
                gain = f"x {base['ms'] / row['all_ms']:.2f}" if base else ""
                lines.append(
                    f"    {row['variant']:26s} {row['ms']:.4f} ({flop / row['ms']:.0f})  all"
                    f" {row['all_ms']:.4f} (queries {row['queries_ms']:.4f}, entry"
                    f" {row['entry_ms']:.4f})  {gain}"
                )
    lines += [
        f"after half a second, {row['variant']}: {row['state']}" for row in rows if "state" in row
    ]
    lines += [f"FAILED {row['variant']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> int:
    """Check and measure everything, and print it."""
    parser = bench_flags("FP8 attention against bf16: errors, then times.", file="--out")
    parser.add_argument("--only", default="", help="substring of the variants to run, beside bf16")
    options = parser.parse_args(arguments)
    require_match(options.only, variants())
    machine = this_card("bench_fp8_attention")
    names = [name for name in variants() if name == "bf16" or options.only in name]
    rows = run_all(names)
    print(table(rows, names), flush=True)
    if options.out:
        write(options.out, {"machine": machine, "rows": rows})
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
