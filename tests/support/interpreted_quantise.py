"""Rounds rows to e4m3 in Triton's interpreter and compares with the plain formula; a process of its
own: it is chosen at import.

TRITON_INTERPRET=1 python -m tests.support.interpreted_quantise
"""

from __future__ import annotations

import json
import sys

import torch

from rcm.kernels.fused import quantise
from rcm.kernels.fused.reference import gelu_tanh


def differing(x: torch.Tensor, *, gelu: bool = False) -> dict[str, float]:
    """Greatest relative difference of scales, and the share of rounded values that differ.

    Triton's interpreter loses the carry of a mantissa that rounds up into the exponent (seen in 3.6
    and 3.7): values that round to a power of two are compared with the half that it leaves, too.
    """
    return compared(quantise.launch(x, gelu=gelu), quantise.reference(gelu_tanh(x) if gelu else x))


def compared(found: quantise.Rows, wanted: quantise.Rows) -> dict[str, float]:
    """Differences of two roundings."""
    (q, scale), (expected, expected_scale) = found, wanted
    q, expected = q.float(), expected.float()
    power_of_two = torch.frexp(expected).mantissa.abs() == 0.5
    same = (q == expected) | (power_of_two & (q == expected / 2))
    return {
        "scale": ((scale - expected_scale).abs() / expected_scale).max().item(),
        "differing": (~same).float().mean().item(),
    }


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    # fills fresh memory with NaN: elements that no program writes are noticed
    torch.use_deterministic_algorithms(True)
    x = torch.randn(7, 200, generator=generator)
    found = {
        "loud and quiet rows": differing(x * torch.logspace(-6, 6, 7)[:, None]),
        "rows of a slice": differing(x[:, 16:64]),
        "channels not fastest": differing(x.t()),
        "gelu": differing(2 * x, gelu=True),
        "zeros": differing(torch.zeros(2, 32)),
    }
    json.dump(found, sys.stdout)
