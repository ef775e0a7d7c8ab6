"""From a checked problem to one kernel launch: choice of kernel and tile sizes, outputs, tables,
grid.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
from torch import Tensor

from rcm.kernels.flash_jvp.forward import portable_forward
from rcm.kernels.flash_jvp.schedule import Tiles, plan_of
from rcm.kernels.flash_jvp.validation import MAX_HEAD, MIN_HEAD, Problem, Results
from rcm.kernels.launching import device_of

KernelName = Literal["auto", "hopper", "portable"]
_SMALL_TILES = (
    Tiles(64, 32, 4, 2),
    Tiles(64, 32, 4, 1),
    Tiles(32, 32, 4, 1),
    Tiles(32, 16, 4, 1),
    Tiles(16, 16, 4, 1),
)
"""Tried in this order on cards whose shared memory is too small for the preferred tiles."""


def portable_tiles(
    *, d_qk: int, d_v: int, element_size: int, num_tangents: int, shared_bytes: int
) -> Tiles:
    """Tile sizes of the portable kernel for padded head sizes and a device's shared memory: the
    first row of the table that fits.

    The accumulators of BLOCK_M x D live in registers, query tiles and `num_stages` key tiles in
    shared memory. The first rows are the ones measured best on an H200 (docs/performance_log.md).
    Raises `ValueError` if nothing fits.
    """
    width, copies = max(d_qk, d_v), 2 if num_tangents else 1
    if element_size == 4:
        preferred = [Tiles(64, 32, 4, 2)] if width <= 128 else [Tiles(32, 16, 4, 2)]
    elif width > 128:
        preferred = [Tiles(64, 32, 8, 2)]
    elif width == 128:
        preferred = (
            [Tiles(128, 32, 8, 3)]
            if num_tangents
            else [Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2)]
        )
    else:
        preferred = [Tiles(128, 64, 8, 2)]
    for tiles in (*preferred, *_SMALL_TILES):
        needed = (
            element_size
            * copies
            * (tiles.block_m * d_qk + tiles.num_stages * tiles.block_n * (d_qk + d_v))
        )
        if needed <= shared_bytes:
            return tiles
    raise ValueError(
        f"head sizes {d_qk} and {d_v} in {8 * element_size} bits need {needed >> 10} KiB of shared"
        f" memory, this card has {shared_bytes >> 10} KiB; use implementation='reference'"
    )


def triton_jvp(
    problem: Problem, *, kernel: KernelName = "auto", tiles: Tiles | None = None
) -> Results:
    """Launch a fused kernel on a checked problem; O and O_dot in the input dtype, LSE float32.

    `kernel` is "hopper" (compute capability 9.0, 16-bit, head sizes 64 or 128, strides that bulk
    copies accept), "portable", or "auto": hopper where it applies. Both compute the same function.
    `tiles` overrides the table, for benchmarks. Raises `ValueError` for head sizes outside
    16..256 and a kernel that is unknown or does not apply, `TypeError` for float64, `RuntimeError`
    without CUDA.
    """
    if kernel not in get_args(KernelName):
        raise ValueError(f"kernel must be one of {', '.join(get_args(KernelName))}, got {kernel!r}")
    check_triton(problem)
    obstacle = hopper_obstacle(problem)
    if kernel == "hopper" and obstacle:
        raise ValueError(f"the hopper kernel does not apply: {obstacle}; use kernel='portable'")
    o, o_dot, lse = allocate_outputs(problem)
    with device_of(problem.q):
        if kernel == "hopper" or (kernel == "auto" and not obstacle):
            # Gluon is imported only on the cards that run it
            from rcm.kernels.flash_jvp.launch_hopper import launch_hopper

            launch_hopper(problem, o, o_dot, lse, tiles=tiles)
        else:
            _launch_portable(problem, o, o_dot, lse, tiles=tiles)
    return o, o_dot, lse


def allocate_outputs(problem: Problem) -> Results:
    """Uninitialised O, O_dot `[B, Lq, N, Dv]` and LSE `[B, N, Lq]`; the kernels write every
    element.
    """
    batch, q_len, heads, _ = problem.q.shape
    o = problem.q.new_empty(batch, q_len, heads, problem.v.shape[3])
    return (
        o,
        torch.empty_like(o) if problem.has_tangent else None,
        o.new_empty(batch, heads, q_len, dtype=torch.float32),
    )


def check_triton(problem: Problem) -> None:
    """Raise for what no Triton kernel of this package computes."""
    q = problem.q
    if q.dtype == torch.float64:
        raise TypeError(
            "the triton kernels compute in float32; use implementation='reference' for float64"
        )
    if not problem.scale > 0:
        raise ValueError(
            f"the triton kernels need a positive scale, got {problem.scale}; use"
            " implementation='reference'"
        )
    for name, width in (("q and k", q.shape[3]), ("v", problem.v.shape[3])):
        if not MIN_HEAD <= width <= MAX_HEAD:
            raise ValueError(
                f"head size of {name} must be in [{MIN_HEAD}, {MAX_HEAD}] for triton, got {width};"
                " use implementation='reference'"
            )
    if not q.is_cuda and not _interpreted():
        raise RuntimeError(
            f"implementation='triton' needs a CUDA device, the inputs are on {q.device}; use"
            " implementation='reference'"
        )
    if _interpreted() and q.dtype == torch.bfloat16:
        raise TypeError(
            "Triton's interpreter computes bfloat16 products wrongly; test in float32 or float16"
        )


def hopper_obstacle(problem: Problem) -> str | None:
    """Why the Hopper kernel cannot run this problem, or None if it can."""
    q, v = problem.q, problem.v
    if _interpreted() or not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it needs a GPU of compute capability 9.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    if q.shape[3] not in (64, 128) or v.shape[3] not in (64, 128):
        return f"it needs head sizes of 64 or 128, got {q.shape[3]} and {v.shape[3]}"
    for name in ("q", "k", "v", "q_dot", "k_dot", "v_dot"):
        tensor = getattr(problem, name)
        if tensor is not None and not _bulk_copyable(tensor):
            return (
                f"{name} with strides {tensor.stride()} cannot be read by bulk copies (unit last"
                " stride, others multiples of 16 bytes)"
            )
    return None


def _bulk_copyable(x: Tensor) -> bool:
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    return x.stride(3) == 1 and aligned and x.data_ptr() % 16 == 0


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 17
    card = torch.cuda.get_device_properties(device)
    return card.shared_memory_per_block_optin  # type: ignore[attr-defined]  # no stub in torch


def _interpreted() -> bool:
    return triton.knobs.runtime.interpret


def _launch_portable(
    problem: Problem, o: Tensor, o_dot: Tensor | None, lse: Tensor, *, tiles: Tiles | None
) -> None:
    q, k, v = problem.q, problem.k, problem.v
    d_qk, d_v = q.shape[3], v.shape[3]
    block_qk, block_v = triton.next_power_of_2(d_qk), triton.next_power_of_2(d_v)
    if tiles is None:
        tiles = portable_tiles(
            d_qk=block_qk,
            d_v=block_v,
            element_size=q.element_size(),
            num_tangents=problem.flags.bit_count(),
            shared_bytes=_shared_bytes(q.device),
        )
    plan = plan_of(problem, tiles)

    def described(x: Tensor | None, stand_in: Tensor) -> tuple[Tensor | int, ...]:
        x = stand_in if x is None else x
        return (x, *x.stride())

    portable_forward[(plan.num_tiles * q.shape[0] * q.shape[2],)](
        described(q, q), described(problem.q_dot, q), described(k, k), described(problem.k_dot, k),
        described(v, v), described(problem.v_dot, v), described(o, o), described(o_dot, o), lse,
        plan.tiles, plan.pieces, plan.rows, plan.num_tiles, q.shape[2], q.shape[1], k.shape[1],
        problem.first_tangent_key, problem.scale_base2, problem.scale,
        FLAGS=problem.flags, CLASSES=plan.classes, EDGE=plan.edge_mode, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, D_QK=d_qk, BLOCK_QK=block_qk, D_V=d_v, BLOCK_V=block_v,
        PRECISION="ieee" if q.dtype == torch.float32 else None, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
