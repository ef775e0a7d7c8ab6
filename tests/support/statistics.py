"""Kolmogorov-Smirnov distance from the uniform law, for seeded distribution tests."""

from __future__ import annotations

import torch


def ks_distance(u: torch.Tensor) -> float:
    """Largest gap between the empirical law of `u` (any shape, values in [0, 1]) and the uniform
    law.
    """
    u = u.flatten().sort().values
    n = u.numel()
    step = torch.arange(n, dtype=u.dtype)
    return torch.maximum((step + 1) / n - u, u - step / n).max().item()


def ks_bound(n: int) -> float:
    """Exceeded by a true uniform sample with probability about 2e-4."""
    return 2.15 / n**0.5
