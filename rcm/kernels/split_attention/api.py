"""Dense attention as several calls over parts of the keys that run beside each other on the card.

A fused kernel gives every processor a tile of 128 queries of one head and all keys. A chunk of a
stream has few queries: 1,560 of them make 156 tiles for 132 processors, two rounds of which the
second is almost empty. Cut along the keys there are more and shorter tiles, whose last round is
short. Partial results o_i with log-sum-exps l_i are merged exactly: o = sum_i exp(l_i - l) o_i, l =
logsumexp_i(l_i).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TILE = 128
"""Queries per tile of cuDNN's forward on compute capability 9.0."""
LARGEST = 5
SHORTEST = 2048
"""Keys that a part has at least: below, starting a part costs more than it fills."""
ROUND_PER_KEY = 14.0
"""Nanoseconds that one round of tiles takes per key (head size 128, one H200)."""
PART = 12000.0
"""Nanoseconds that a further part costs whatever its size: a branch, and a launch."""
BYTES_PER_NANOSECOND = 4000.0


@lru_cache(maxsize=4096)
def num_splits(q_len: int, kv_len: int, heads: int, processors: int) -> int:
    """Parts into which `heads` (batch included) of `q_len` queries and `kv_len` keys are best cut
    on a card of `processors`.
    """
    result = q_len * heads * 128 * 2  # bytes of a partial result, written once and read once

    def cost(parts: int) -> float:
        tiles = heads * -(-q_len // TILE) * parts
        rounds = -(-tiles // processors) / parts
        return rounds * kv_len * ROUND_PER_KEY + (parts - 1) * (
            PART + 2 * result / BYTES_PER_NANOSECOND
        )

    return min(range(1, max(1, min(LARGEST, kv_len // SHORTEST)) + 1), key=cost)


def split_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, parts: int) -> Tensor:
    """softmax(scale q k^T) v without gradient, `q` [B, Lq, N, D], `k`, `v` [B, Lk, N, D] in bf16 or
    fp16 on CUDA; [B, Lq, N, D].

    `parts` of nearly equal length go through cuDNN on streams of their own, which fork from the
    current stream and join it again, so that a graph that is being captured gets parallel branches.
    """
    if parts == 1:
        return _partial(q, k, v, scale)[0].transpose(1, 2)
    current = torch.cuda.current_stream(q.device)
    lanes = _lanes(q.device, current.cuda_stream, parts - 1)
    fork = current.record_event()
    found, length = [], -(-k.shape[1] // parts)
    for lane, start in zip((*lanes, current), range(0, k.shape[1], length), strict=True):
        cut = slice(start, start + length)
        # memory of a lane is used by the lane and by the merge alone, and the next fork waits for
        # the merge: nothing to record
        with torch.cuda.stream(lane):
            if lane is not current:
                lane.wait_event(fork)
            found.append(_partial(q, k[:, cut], v[:, cut], scale))
    for lane in lanes:
        current.wait_stream(lane)
    from rcm.kernels.split_attention.merge_kernel import merge  # Triton is imported only on CUDA

    return merge([o for o, _ in found], [lse for _, lse in found])


def merge_reference(outputs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """The merge as a formula: `outputs` [B, N, Lq, D], `lses` [B, N, Lq] to [B, Lq, N, D]; sums in
    float32 or wider.
    """
    compute = torch.promote_types(outputs[0].dtype, torch.float32)
    weights = torch.stack([lse.to(compute) for lse in lses]).softmax(dim=0)
    total = sum(w.unsqueeze(-1) * o.to(compute) for w, o in zip(weights, outputs, strict=True))
    return total.to(outputs[0].dtype).transpose(1, 2)


def _partial(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, Lq, D] and natural log-sum-exp [B, N, Lq] of one part."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, False, False, scale=scale
    )
    return found[0], found[1].reshape(q.shape[0], q.shape[2], q.shape[1])


@lru_cache(maxsize=64)
def _lanes(device: torch.device, stream: int, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams for the parts of calls on the stream with handle `stream`."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))
