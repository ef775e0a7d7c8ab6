"""The kernels that captured streams launch, for `rcm.kernels.precompile`: 4 s of a first chunk."""

from __future__ import annotations

import torch

from rcm.kernels.persistent_attention import api


def attention_plan(*, dtype: torch.dtype = torch.bfloat16) -> None:
    """Launch them on tensors of the meta device. They depend on neither the heads nor the
    lengths.
    """
    q = torch.empty(1, 130, 2, api.WIDTH, dtype=dtype, device="meta")
    api.attend(q, q, q, scale=1.0)
