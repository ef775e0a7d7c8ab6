"""What stands between the projections of a cached chunk and its attention, in one pass over memory:
query and key norms, rotation, and the writing of keys and values into their slots of the cache. For
captured passes without gradient; rounding as by the separate layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm.kernels.launching import device_of


@triton.jit
def _normed_halves(row, weight, pair, inside, eps, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Even and odd channels of x / rms(x) * weight, rounded once to the stored dtype."""
    even = tl.load(row + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(row + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt((tl.sum(even * even, axis=0) + tl.sum(odd * odd, axis=0)) / WIDTH + eps)
    even = even * inverse * tl.load(weight + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    odd = odd * inverse * tl.load(weight + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    return even.to(DTYPE).to(tl.float32), odd.to(DTYPE).to(tl.float32)


@triton.jit
def _enter(
    q_ptr, k_ptr, v_ptr, q_weight, k_weight, cos_ptr, sin_ptr, slots_ptr, q_out, k_cache, v_cache,
    length, eps, q_row, k_row, v_row, cache_batch, cache_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, ROTATE_KEYS: tl.constexpr,
):  # fmt: skip
    """One token: its query to `q_out` [B, L, E], its key and value to slot `slots[token]` of the
    caches.
    """
    batch, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    inside = pair < WIDTH // 2
    angle = token * (HEAD // 2) + pair % (HEAD // 2)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    kind = q_out.dtype.element_ty
    source = batch * length + token
    even, odd = _normed_halves(q_ptr + source * q_row, q_weight, pair, inside, eps, WIDTH, kind)
    target = q_out + source * WIDTH + 2 * pair
    tl.store(target, (even * cos - odd * sin).to(kind), mask=inside)
    tl.store(target + 1, (odd * cos + even * sin).to(kind), mask=inside)
    even, odd = _normed_halves(k_ptr + source * k_row, k_weight, pair, inside, eps, WIDTH, kind)
    slot = batch * cache_batch + tl.load(slots_ptr + token) * cache_row
    target = k_cache + slot + 2 * pair
    if ROTATE_KEYS:
        turned = even * cos - odd * sin
        odd = odd * cos + even * sin
        even = turned
    tl.store(target, even.to(kind), mask=inside)
    tl.store(target + 1, odd.to(kind), mask=inside)
    column = tl.arange(0, 2 * PAIRS)
    value = tl.load(v_ptr + source * v_row + column, mask=column < WIDTH, other=0.0)
    tl.store(v_cache + slot + column, value, mask=column < WIDTH)


def enter_cache(
    projected: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    *,
    eps: float,
    rotate_keys: bool,
) -> Tensor:
    """Queries [B, L, N, D], normed and turned, of `projected` q, k, v [B, L, E]; keys (normed,
    turned if `rotate_keys`) and values go to the slots int64 [L] of `caches` [B, capacity, N, D].
    `weights` of the two norms [E], `tables` cos and sin [L, D / 2] float32.
    """
    q, k, v = (
        x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()
        for x in projected
    )
    batch, length, width = q.shape
    heads, head = caches[0].shape[2:]
    out = torch.empty(batch, length, heads, head, dtype=q.dtype, device=q.device)
    with device_of(q):
        _enter[(length, batch)](
            q, k, v, *weights, *tables, slots, out, *caches,
            length, eps, q.stride(1), k.stride(1), v.stride(1), caches[0].stride(0),
            caches[0].stride(1),
            HEAD=head, WIDTH=width, PAIRS=triton.next_power_of_2(width) // 2,
            ROTATE_KEYS=rotate_keys, num_warps=8,
        )  # fmt: skip
    return out


def enter_cache_reference(
    projected: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    *,
    eps: float,
    rotate_keys: bool,
) -> Tensor:
    """`enter_cache` by the formulas, in float32 with one rounding after the norm and one after the
    turn.
    """
    heads, head = caches[0].shape[2:]
    cos, sin = (x[None, :, None] for x in tables)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()
        return scaled.to(x.dtype).unflatten(2, (heads, head))

    def turned(x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(3, (-1, 2)).unbind(4)
        return (
            torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=4)
            .flatten(3)
            .to(x.dtype)
        )

    q, k = (normed(x, weight) for x, weight in zip(projected[:2], weights, strict=True))
    caches[0][:, slots] = turned(k) if rotate_keys else k
    caches[1][:, slots] = projected[2].unflatten(2, (heads, head))
    return turned(q)
