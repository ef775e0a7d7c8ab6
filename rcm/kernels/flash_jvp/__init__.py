"""Exact softmax attention with its forward-mode tangent: one public function (contract in `api.py`,
derivation in README.md).
"""

from rcm.kernels.flash_jvp.api import flash_jvp

__all__ = ["flash_jvp"]
