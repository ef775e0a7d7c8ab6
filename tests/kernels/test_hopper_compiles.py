"""The Hopper kernel compiles for its card with the Triton at hand (no GPU needed), and fits the
card's shared memory.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "classes", "edge", "d_qk", "d_v", "dtype"),
    [
        (7, 0b110, 1, 128, 128, "bf16"),
        (7, 0b111, 2, 128, 128, "bf16"),
        (0, 0b110, 2, 128, 128, "bf16"),
        (1, 0b010, 0, 128, 128, "fp16"),
        (2, 0b110, 1, 128, 64, "bf16"),
        (4, 0b110, 1, 64, 128, "bf16"),
        (7, 0b110, 1, 64, 64, "fp16"),
    ],
)
def test_compiles_for_compute_capability_9(flags, classes, edge, d_qk, d_v, dtype):
    from tests.support.compile_hopper import compile_for_sm90

    kernel = compile_for_sm90(flags=flags, classes=classes, edge=edge, d_qk=d_qk, d_v=d_v, dtype=dtype)
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.num_warps == 12, "two consumer warpgroups and one that holds the producer warp"
    products = len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))
    assert products == expected_products(flags, classes, d_qk=d_qk, d_v=d_v, block_n=128 if not flags or max(d_qk, d_v) == 64 else 64)


def expected_products(flags: int, classes: int, *, d_qk: int, d_v: int, block_n: int) -> int:
    """Structural zeros cost no products: count the instructions (16 deep each) of both consumers
    over the compiled kinds of key tiles.
    """
    total = 0
    for kind in range(3):
        if classes >> kind & 1:
            present = flags & 1 if kind == 0 else flags
            over_channels = 1 + (present & 1) + (present >> 1 & 1)
            over_keys = 1 + (present >> 2 & 1) + (present & 3 != 0)
            total += over_channels * d_qk // 16 + over_keys * block_n // 16
    return 2 * total
