"""Which numbers a network is made of: a digest of every tensor, taken as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from rcm.storage.state_dicts import LazyWeights, headers_of

BYTES = 16


class DigestedWeights(LazyWeights):
    """`weights` in `dtype`, each tensor hashed (BLAKE2b, RFC 7693) as it is read.

    The digest is that of names, shapes and values in `dtype`: it does not depend on the order of
    reading, on the container, or on a wider dtype in it. About a second per gigabyte.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
        self.weights, self.dtype, self.headers = weights, dtype, headers_of(weights)
        self._seen: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name].to(self.dtype).contiguous()
        if name not in self._seen:
            values = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            told = hashlib.blake2b(f"{name}:{tuple(tensor.shape)}:".encode(), digest_size=BYTES)
            told.update(values.data)
            self._seen[name] = told.digest()
        return tensor

    @property
    def digest(self) -> str | None:
        """The digest in hexadecimal, once every tensor has been read; None before."""
        if len(self._seen) < len(self.headers):
            return None
        whole = hashlib.blake2b(digest_size=BYTES)
        for name in sorted(self._seen):
            whole.update(self._seen[name])
        return whole.hexdigest()
