"""The codec that a cache of keys and values calls: blobs of chunks, restored as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from rcm.kernels.kv_codec import bias
from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec import fused as fused_kernels
from rcm.kernels.kv_codec.blob import Blob, reference
from rcm.kernels.kv_codec.clusters import Clustering, cluster, members
from rcm.kernels.kv_codec.formats import CodeFormat
from rcm.kernels.kv_codec.smoothing import Undo, smooth
from rcm.kernels.kv_codec.spec import KVCodecSpec, Side

Centres = dict[tuple[Side, int], list[Tensor]]
"""Cluster centres of the stages, by side and layer."""
_BY_ADDRESS: WeakValueDictionary[int, Blob] = WeakValueDictionary()
"""Blobs whose addresses were asked for, on devices whose kernels do not follow addresses."""


class KVCodec:
    """Encodes and restores chunks [B, S, N, D] after `spec`. Holds nothing but the cluster centres
    that the next chunk of a layer starts from; a second stream takes a `fork`.

    Blobs can also be read and written by address (`table`, `restore`, `encode_to`): which blobs is
    then device data, so that a captured graph serves one chunk after another. Centres stay where
    they are for that; `generation` counts how often they could not.
    """

    def __init__(self, spec: KVCodecSpec) -> None:
        self.spec = spec
        self.generation = 0
        self._centres: Centres = {}
        self._warm: set[tuple[Side, int]] = set()
        self._variances: WeakKeyDictionary[Blob, Tensor] = WeakKeyDictionary()

    @property
    def corrects_bias(self) -> bool:
        """Whether attention is to take off what `key_gain` says."""
        return self.spec.bias_correction

    def key_gain(self, q: Tensor, blob: Blob, *, scale: float, rotated: bool) -> Tensor:
        """`bias.segment_gain` of the keys in `blob`, [B, N, L]; what does not depend on `q` is kept
        as long as the blob lives.
        """
        if blob not in self._variances:
            self._variances[blob] = bias.segment_variance(blob)
        return bias.gain_of(q, self._variances[blob], scale=scale, rotated=rotated)

    def encode(self, x: Tensor, *, side: Side, layer: int) -> Blob:
        """Blob of `x` [B, S, N, D] (any floating dtype and strides)."""
        key = (side, layer)
        blob, centres = self._encode(
            x.detach(), side, self._centres[key] if key in self._warm else None
        )
        if centres and self.spec.qvg_warm_start:
            self._keep(key, centres)
        return blob

    def decode(self, blob: Blob, *, side: Side) -> Tensor:
        """[B, S, N, D] in the dtype that was encoded."""
        out = torch.empty(blob.shape, dtype=blob.dtype, device=blob.device)
        self.decode_into(blob, out, side=side)
        return out

    def decode_into(self, blob: Blob, out: Tensor, *, side: Side) -> None:
        """`decode` written into `out` [B, S, N, D] of any strides and floating dtype."""
        if out.shape != blob.shape:
            raise ValueError(f"the blob holds {list(blob.shape)}, out is {list(out.shape)}")
        if self._fused(out):
            row = fused_kernels.row_of(blob)
            if fused_kernels.restore(blob, row[None, :-1], row[-1:], out):
                return
        out.copy_(reference(blob))

    def captures(self, device: torch.device) -> bool:
        """Whether `restore` and `encode_to` can be part of a captured graph on `device`: not
        without the Triton launches.
        """
        return device.type != "cuda" or self.spec.triton_restore

    def addresses(self, blobs: Sequence[Blob]) -> Tensor:
        """Where blobs lie, int64 [blobs, 7] on the host. They must outlive what reads it."""
        for blob in blobs:
            if blob.device.type != "cuda":
                _BY_ADDRESS[blob.addresses[0]] = blob
        return torch.tensor([blob.addresses for blob in blobs], dtype=torch.int64)

    def restore(
        self,
        like: Blob,
        table: Tensor,
        starts: Tensor,
        out: Tensor,
        *,
        side: Side,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write the blobs at the addresses in `table` int64 [P, 7], all in the form of `like`, into
        `out` [B, L, N, D] from its tokens `starts` int64 [P] on. `turn`: cos and sin [L, D / 2] of
        a rotation of what was restored, on CUDA.
        """
        if self._fused(out) and fused_kernels.restore(like, table, starts, out, turn=turn):
            return
        if turn is not None:
            raise ValueError(
                "restored keys are turned by a Triton launch only; rotate them afterwards"
            )
        for start, row in zip(starts.tolist(), table.tolist(), strict=True):
            out[:, start : start + like.shape[1]].copy_(reference(_BY_ADDRESS[row[0]]))

    def encode_to(self, row: Tensor, x: Tensor, *, side: Side, layer: int) -> None:
        """`encode`, written to the blob whose addresses are in `row` int64 [7]."""
        if (
            self._fused(x)
            and self.spec.side(side).smoothing == "none"
            and self.spec.side(side).dtype != "bf16"
            and fused_kernels.encode_at(row, x.detach(), self._format(side))
        ):
            return
        blob = self.encode(x, side=side, layer=layer)
        if self._fused(x):
            fused_kernels.deposit(blob, row)
        else:
            _BY_ADDRESS[int(row[0])].copy_(blob)

    def is_ready(self, like: Blob, *, side: Side, layer: int) -> bool:
        """Whether `encode_to` of a chunk in the form of `like` can be captured: its centres, if
        any, are at hand.
        """
        if (
            self.spec.side(side).smoothing != "qvg"
            or not self.spec.qvg_warm_start
            or like.clusters is None
        ):
            return True
        if like.clusters.assignments is None:
            return True
        key, k = (side, layer), like.clusters.centroids.shape[2]
        return key in self._warm and all(centre.shape[2] == k for centre in self._centres[key])

    def blob_bytes(self, blob: Blob) -> int:
        """Bytes that the blob takes on its device."""
        return blob.nbytes

    def fork(self) -> KVCodec:
        """The same settings, no centres."""
        return KVCodec(self.spec)

    def num_bytes(self) -> int:
        """Bytes of the centres, and of what `key_gain` keeps."""
        centres = sum(x.nbytes for stages in self._centres.values() for x in stages)
        return centres + sum(x.nbytes for x in self._variances.values())

    def state(self) -> dict[str, Centres]:
        """A copy of the centres of the warm start, by (side, layer)."""
        return {
            "centres": {key: [x.clone() for x in self._centres[key]] for key in sorted(self._warm)}
        }

    def load_state(self, state: dict[str, Centres]) -> None:
        """Take up a `state`."""
        self._warm.clear()
        for key, stages in state["centres"].items():
            self._keep(key, stages)

    def reset(self) -> None:
        """Forget the centres: a new video begins. Their memory stays."""
        self._warm.clear()

    def _keep(self, key: tuple[Side, int], centres: Sequence[Tensor]) -> None:
        """Centres for the next chunk, in the memory of the last ones where they fit."""
        held = self._centres.get(key, [])
        if [(x.shape, x.dtype) for x in held] != [(x.shape, x.dtype) for x in centres]:
            self._centres[key] = held = [
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in centres
            ]
            self.generation += 1
        for mine, x in zip(held, centres, strict=True):
            mine.copy_(x)
        self._warm.add(key)

    def _fused(self, out: Tensor) -> bool:
        return self.spec.triton_restore and fused_kernels.runs_on(out)

    def _format(self, side: Side) -> CodeFormat:
        how, spec = self.spec.side(side), self.spec
        return CodeFormat(
            how.dtype,
            how.group_size,
            spec.granularity(side),
            how.asymmetric,
            spec.mode,
            fit=how.scale_fit == "search",
        )

    def _encode(
        self, x: Tensor, side: Side, warm: list[Tensor] | None
    ) -> tuple[Blob, list[Tensor]]:
        spec, how = self.spec, self.spec.side(side)
        clusters, undo, smoothed, subtract = None, Undo(), x, None
        centres: list[Tensor] = []
        if how.smoothing == "qvg":
            settings = Clustering(
                spec.qvg_clusters,
                spec.qvg_iters,
                spec.qvg_stages,
                spec.qvg_share_assignments,
                spec.mode,
                fused=spec.triton_restore,
            )
            smoothed, subtract, clusters, centres = cluster(
                x, settings, warm if spec.qvg_warm_start else None
            )
        elif how.smoothing != "none":
            smoothed, undo = smooth(
                x.float(), how.smoothing, alpha=spec.smooth_alpha, percentile=spec.clip_percentile
            )
        if how.dtype == "bf16":
            smoothed = smoothed if subtract is None else smoothed - members(*subtract)
            held = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device).copy_(smoothed)
            return Blob(held, undo, clusters, x.dtype).packed(), centres
        fmt = self._format(side)
        if spec.mode == "official":
            fmt = coding.check_official(x.shape, fmt, flag=f"kv_group_size_{side[0]}")
            # rounds the residual to the dtype of x, which the kernel does not
            if subtract is not None:
                smoothed, subtract = smoothed - members(*subtract), None
        codes = fused_kernels.encode(smoothed, fmt, subtract) if spec.triton_restore else None
        if codes is None:
            codes = coding.encode(
                smoothed if subtract is None else smoothed - members(*subtract), fmt
            )
        return Blob(codes, undo, clusters, x.dtype).packed(), centres
