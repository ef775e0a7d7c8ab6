"""Launch of the Hopper kernel: bulk-copy descriptors, ring depth, grid."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rcm.kernels.flash_jvp.hopper import hopper_forward
from rcm.kernels.flash_jvp.schedule import Tiles, plan_of
from rcm.kernels.flash_jvp.validation import Problem

SHARED_BYTES = 225 * 1024
"""Shared memory for tiles; the rest of Hopper's 227 KiB holds barriers."""
REGISTERS = 168
"""Per thread at launch, for 12 warps; the consumers take 240 of the pool and the producer keeps
24.
"""
ROWS = 64


def hopper_tiles(*, d_qk: int, d_v: int, flags: int) -> Tiles:
    """Tile sizes: 128 query rows; keys as many as the registers of two accumulators allow; as many
    ring slots as fit, at most four.
    """
    block_n = 128 if not flags or max(d_qk, d_v) == 64 else 64
    q_bytes = 2 * 2 * ROWS * d_qk * (1 + (flags & 1))
    slot_bytes = 2 * block_n * (d_qk * (1 + (flags >> 1 & 1)) + d_v * (1 + (flags >> 2 & 1)))
    return Tiles(2 * ROWS, block_n, 4, min(4, (SHARED_BYTES - q_bytes) // slot_bytes))


def launch_hopper(
    problem: Problem, o: Tensor, o_dot: Tensor | None, lse: Tensor, *, tiles: Tiles | None = None
) -> None:
    """Run the kernel on a problem for which `launch.hopper_obstacle` is None; writes into the three
    outputs.
    """
    q, k, v = problem.q, problem.k, problem.v
    d_qk, d_v = q.shape[3], v.shape[3]
    tiles = tiles or hopper_tiles(d_qk=d_qk, d_v=d_v, flags=problem.flags)
    plan = plan_of(problem, tiles)

    def described(x: Tensor | None, stand_in: Tensor, rows: int) -> TensorDescriptor:
        x = stand_in if x is None else x
        block = [1, rows, 1, x.shape[3]]
        layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        return TensorDescriptor(x, list(x.shape), _copyable_strides(x), block, layout)

    hopper_forward[(plan.num_tiles * q.shape[0] * q.shape[2],)](
        described(q, q, ROWS), described(problem.q_dot, q, ROWS), described(k, k, tiles.block_n),
        described(problem.k_dot, k, tiles.block_n), described(v, v, tiles.block_n),
        described(problem.v_dot, v, tiles.block_n), o, o if o_dot is None else o_dot, lse,
        plan.tiles, plan.pieces, plan.rows, plan.num_tiles, q.shape[2], q.shape[1],
        problem.first_tangent_key, *o.stride()[:3], problem.scale_base2, problem.scale,
        FLAGS=problem.flags, CLASSES=plan.classes, EDGE=plan.edge_mode, BLOCK_N=tiles.block_n,
        D_QK=d_qk, D_V=d_v, STAGES=tiles.num_stages, num_warps=tiles.num_warps, maxnreg=REGISTERS,
    )  # fmt: skip


def _copyable_strides(x: Tensor) -> list[int]:
    """Strides as a descriptor takes them: an axis of size one may carry any number, which becomes a
    legal one.
    """
    return [
        stride if size > 1 else 16 // x.element_size()
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ] + [1]
