"""What each constructor says about its frames, and layouts that contradict themselves."""

from __future__ import annotations

import pytest

from rcm.core.errors import ConfigError
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from rcm.nets.layout import TokenLayout
from tests.support.tiny_nets import pattern

GRID = (2, 3)


def test_constructors():
    layout = TokenLayout.bidirectional(3, grid=GRID)
    assert (layout.frame_index, layout.output, layout.mask, layout.context_tokens) == ((0, 1, 2), (0, 3), Full(18, 18), 0)
    assert (layout.tokens_per_frame, layout.num_frames, layout.num_tokens, layout.num_output_frames) == (6, 3, 18, 3)

    c14 = pattern("c1-4")
    layout = TokenLayout.block_causal(9, grid=GRID, pattern=c14, window=2, sinks=1)
    assert layout.mask == BlockCausal(c14, 9, 6, window=2, sinks=1)
    assert layout.chunks == (1, 4, 4) and layout.output == (0, 9)
    assert layout == TokenLayout.context(9, grid=GRID, pattern=c14, window=2, sinks=1)

    layout = TokenLayout.teacher_forcing(5, grid=GRID, pattern=c14)
    assert layout.frame_index == (0, 1, 2, 3, 4) * 2 and layout.output == (5, 10)
    assert layout.mask == TeacherForcing(c14, 5, 6)

    layout = TokenLayout.cached_chunk(1, grid=GRID, pattern=c14, num_frames=9)
    assert (layout.frame_index, layout.output, layout.context_tokens) == ((1, 2, 3, 4), (0, 4), 6)
    assert layout.mask.is_full and layout.mask.kv_len == 30
    assert not TokenLayout.cached_chunk(2, grid=GRID, pattern=c14, num_frames=9, window=2).mask.is_full

    layout = TokenLayout.noisy_over_context(5, grid=GRID, pattern=c14, window=1, sinks=1)
    assert layout.mask == TeacherForcing(c14, 5, 6, queries="noisy", window=1, sinks=1)
    assert (layout.frame_index, layout.context_tokens, layout.output) == ((0, 1, 2, 3, 4), 30, (0, 5))


def test_contradictions_raise():
    full = Full(12, 12)
    for message, arguments in {
        "covers 12 queries x 12 keys": (GRID, (0, 1, 2), full, (0, 3)),
        "output frames": (GRID, (0, 1), full, (1, 1)),
        r"chunks \(1, 2\)": (GRID, (0, 1), full, (0, 2), 0, (1, 2)),
        r"chunks \(-1, 3\) must be of at least one frame": (GRID, (0, 1), full, (0, 2), 0, (-1, 3)),
        "positive grid": ((0, 3), (0, 1), full, (0, 2)),
    }.items():
        with pytest.raises(ConfigError, match=message):
            TokenLayout(*arguments)
    with pytest.raises(ConfigError, match="6 cached tokens"):
        TokenLayout(GRID, (0, 1), full, (0, 2), context_tokens=6)
    with pytest.raises(ConfigError, match=r"block must be in \[0, 3\)"):
        TokenLayout.cached_chunk(3, grid=GRID, pattern=pattern("c1-4"), num_frames=9)
    with pytest.raises(ConfigError, match="does not split"):
        TokenLayout.teacher_forcing(4, grid=GRID, pattern=pattern("c1-4"))
