"""What one chunk's keys or values become: tensors, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.clusters import Clusters, add_back
from rcm.kernels.kv_codec.codes import Codes
from rcm.kernels.kv_codec.smoothing import Undo, unsmooth

FIELDS = 7
"""Tensors of a blob, absent ones included: codes, scales, zeros, unit, centroids, assignments, what
undoes the smoothing.
"""


ALIGNMENT = 16
"""Bytes that the address of a field is a multiple of."""


@dataclass(frozen=True, eq=False)
class Blob:
    """Keys or values of one chunk and layer: `codes`, or the plain bf16 tensor; what undoes the
    smoothing; clusters.

    `dtype` is what was encoded.
    """

    codes: Codes | Tensor
    undo: Undo
    clusters: Clusters | None
    dtype: torch.dtype

    @property
    def shape(self) -> coding.Shape:
        """[B, S, N, D]."""
        return coding.shape_of(self.codes)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.codes.data.device if isinstance(self.codes, Codes) else self.codes.device

    @property
    def fields(self) -> tuple[Tensor | None, ...]:
        """Its FIELDS tensors, in their order."""
        codes, clusters = self.codes, self.clusters
        held = (
            (codes.data, codes.scales, codes.zeros, codes.unit)
            if isinstance(codes, Codes)
            else (codes, None, None, None)
        )
        return (
            *held,
            *((None, None) if clusters is None else (clusters.centroids, clusters.assignments)),
            self.undo.tensor,
        )

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where its fields lie; 0 for what is absent. Every tensor is one block of memory from
        there.
        """
        return tuple(0 if x is None else x.data_ptr() for x in self.fields)

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(x.nbytes for x in self.fields if x is not None)

    def likes(self, count: int, device: torch.device | str) -> list[Blob]:
        """`count` blobs of the same form with tensors not yet written, on `device`, in few
        allocations; on "meta", the form alone.
        """
        fields: list[Sequence[Tensor | None]] = []
        for x in self.fields:
            if x is None:
                fields.append([None] * count)
            elif x.nbytes % ALIGNMENT:
                fields.append(
                    [torch.empty(x.shape, dtype=x.dtype, device=device) for _ in range(count)]
                )
            else:
                fields.append(torch.empty(count, *x.shape, dtype=x.dtype, device=device).unbind(0))
        return [self._with(held) for held in zip(*fields, strict=True)]

    def packed(self) -> Blob:
        """The same, every tensor one block of memory."""
        return self._with([None if x is None else x.contiguous() for x in self.fields])

    def copy_(self, other: Blob) -> None:
        """Take over the tensors of a blob of the same form."""
        for mine, x in zip(self.fields, other.fields, strict=True):
            if mine is not None and x is not None:
                mine.copy_(x)

    def _with(self, fields: Sequence[Tensor | None]) -> Blob:
        data, scales, zeros, unit, centroids, assignments, undo = fields
        assert data is not None
        codes: Codes | Tensor = data
        if isinstance(self.codes, Codes):
            assert scales is not None
            codes = replace(self.codes, data=data, scales=scales, zeros=zeros, unit=unit)
        clusters = self.clusters
        if clusters is not None:
            assert centroids is not None
            clusters = replace(clusters, centroids=centroids, assignments=assignments)
        return replace(self, codes=codes, undo=replace(self.undo, tensor=undo), clusters=clusters)


def reference(blob: Blob) -> Tensor:
    """float32 [B, S, N, D] by plain torch: what every other way of restoring must equal once
    rounded to the same dtype.
    """
    plain = coding.decode(blob.codes) if isinstance(blob.codes, Codes) else blob.codes.float()
    plain = unsmooth(plain, blob.undo)
    return plain if blob.clusters is None else add_back(plain, blob.clusters)
