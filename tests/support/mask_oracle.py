"""Masks token by token, from Causal_rCM.md section 2: slow, independent of `rcm.kernels.masks` and
of `BlockPattern`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frame_blocks(*, first: int, chunk: int, num_frames: int) -> list[int]:
    """Block number of every frame: `first` frames make block 0, then each `chunk` frames make the
    next.
    """
    blocks, current, left = [], 0, first
    for _ in range(num_frames):
        if left == 0:
            current, left = current + 1, chunk
        blocks.append(current)
        left -= 1
    assert left == 0, "the oracle was asked for a pattern with a remainder"
    return blocks


def _token_blocks(*, first: int, chunk: int, num_frames: int, tokens_per_frame: int) -> list[int]:
    return [block for block in frame_blocks(first=first, chunk=chunk, num_frames=num_frames) for _ in range(tokens_per_frame)]


def _kept_by_window_and_sinks(query: int, key: int, *, window: int | None, sinks: int) -> bool:
    if window is None:
        return True
    # the query's own block is the first of them
    last_window_blocks = [query - back for back in range(window)]
    first_blocks = list(range(sinks))
    return key in last_window_blocks or key in first_blocks


def block_causal(
    *, first: int, chunk: int, num_frames: int, tokens_per_frame: int, q_block_offset: int = 0, window: int | None = None, sinks: int = 0
) -> Tensor:
    """Bool [queries, keys]: a token sees its own block and every earlier one, as far as window and
    sinks keep it.
    """
    keys = _token_blocks(first=first, chunk=chunk, num_frames=num_frames, tokens_per_frame=tokens_per_frame)
    rows = []
    for query in keys:
        if query < q_block_offset:
            continue
        row = []
        for key in keys:
            is_future = key > query
            row.append(not is_future and _kept_by_window_and_sinks(query, key, window=window, sinks=sinks))
        rows.append(row)
    return torch.tensor(rows)


def teacher_forcing(
    *, first: int, chunk: int, num_frames: int, tokens_per_frame: int, queries: str = "both", window: int | None = None, sinks: int = 0
) -> Tensor:
    """Bool [queries, keys] over the packed sequence: all clean tokens, then all noisy tokens."""
    blocks = _token_blocks(first=first, chunk=chunk, num_frames=num_frames, tokens_per_frame=tokens_per_frame)
    packed = [("clean", block) for block in blocks] + [("noisy", block) for block in blocks]
    rows = []
    for q_half, query in packed:
        if queries == "noisy" and q_half == "clean":
            continue
        row = []
        for k_half, key in packed:
            if q_half == "clean" and k_half == "noisy":
                sees = False
            elif q_half == "noisy" and k_half == "noisy":
                sees = query == key
            elif q_half == "noisy" and k_half == "clean":
                earlier = key in range(query)
                sees = earlier and _kept_by_window_and_sinks(query, key, window=window, sinks=sinks)
            else:
                sees = key == query or (key in range(query) and _kept_by_window_and_sinks(query, key, window=window, sinks=sinks))
            row.append(sees)
        rows.append(row)
    return torch.tensor(rows)


def from_intervals(rows: list[tuple[int, int, tuple[tuple[int, int], ...]]], *, q_len: int, kv_len: int) -> Tensor:
    """Paint (q_start, q_stop, intervals) rectangles into a bool matrix."""
    dense = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for q_start, q_stop, intervals in rows:
        for kv_start, kv_stop in intervals:
            dense[q_start:q_stop, kv_start:kv_stop] = True
    return dense
