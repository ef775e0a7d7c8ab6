"""Softmax attention under a mask, with gradient: one public function (contract in `api.py`, the
method in README.md).
"""

from __future__ import annotations

from rcm.kernels.masked_attention.api import masked_attention

__all__ = ["masked_attention"]
