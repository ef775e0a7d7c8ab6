"""The codec that a cache of keys and values calls: blobs of chunks, restored as they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec import fused as fused_kernels
from rcm.kernels.kv_codec.clusters import Clustering, Clusters, add_back, cluster, members
from rcm.kernels.kv_codec.codes import CodeFormat, Codes
from rcm.kernels.kv_codec.smoothing import Undo, smooth, unsmooth
from rcm.kernels.kv_codec.spec import KVCodecSpec, Side


@dataclass(frozen=True)
class Blob:
    """Keys or values of one chunk and layer: `codes`, or the plain bf16 tensor; what undoes the smoothing; clusters.

    `dtype` is what was encoded.
    """

    codes: Codes | Tensor
    undo: Undo
    clusters: Clusters | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, S, N, D]."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return self.codes.nbytes + self.undo.nbytes + (0 if self.clusters is None else self.clusters.nbytes)


class KVCodec:
    """Encodes and restores chunks [B, S, N, D] after `spec`. Holds nothing but the cluster centres that the next chunk of a layer starts
    from; a second stream takes a `fork`.
    """

    def __init__(self, spec: KVCodecSpec) -> None:
        self.spec = spec
        self._centres: dict[tuple[str, int], list[Tensor]] = {}

    def encode(self, x: Tensor, *, side: Side, layer: int) -> Blob:
        """Blob of `x` [B, S, N, D] (any floating dtype and strides)."""
        blob, centres = self._encode(x.detach(), side, self._centres.get((side, layer)))
        if centres and self.spec.qvg_warm_start:
            self._centres[side, layer] = centres
        return blob

    def decode(self, blob: Blob, *, side: Side) -> Tensor:
        """[B, S, N, D] in the dtype that was encoded."""
        out = torch.empty(blob.shape, dtype=blob.dtype, device=_device(blob))
        self.decode_into(blob, out, side=side)
        return out

    def decode_into(self, blob: Blob, out: Tensor, *, side: Side) -> None:
        """`decode` written into `out` [B, S, N, D] of any strides and floating dtype."""
        if out.shape != blob.shape:
            raise ValueError(f"the blob holds {list(blob.shape)}, out is {list(out.shape)}")
        fused = self.spec.triton_restore and isinstance(blob.codes, Codes) and blob.undo.kind == "none"
        if not (fused and fused_kernels.restore_into(blob.codes, blob.clusters, out)):
            out.copy_(reference(blob))

    def blob_bytes(self, blob: Blob) -> int:
        """Bytes that the blob takes on its device."""
        return blob.nbytes

    def select(self, blob: Blob, index: Tensor, *, side: Side) -> Blob:
        """A blob of the tokens `index` ([K], or [B, K] per sample), decoded, gathered and coded anew; leaves the warm start as it is."""
        whole = self.decode(blob, side=side)
        kept = whole[:, index] if index.dim() == 1 else whole.gather(1, index[:, :, None, None].expand(-1, -1, *whole.shape[2:]))
        return self._encode(kept, side, None)[0]

    def fork(self) -> KVCodec:
        """The same settings, no centres."""
        return KVCodec(self.spec)

    def state(self) -> dict[str, Any]:
        """Centres of the warm start, by (side, layer). They are never written in place, so the tensors are shared, not copied."""
        return {"centres": {key: list(stages) for key, stages in self._centres.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a `state`."""
        self._centres = {key: list(stages) for key, stages in state["centres"].items()}

    def reset(self) -> None:
        """Forget the centres: a new video begins."""
        self._centres = {}

    def _encode(self, x: Tensor, side: Side, warm: list[Tensor] | None) -> tuple[Blob, list[Tensor]]:
        spec, how = self.spec, self.spec.side(side)
        clusters, centres, undo, smoothed, subtract = None, [], Undo(), x, None
        if how.smoothing == "qvg":
            settings = Clustering(spec.qvg_clusters, spec.qvg_iters, spec.qvg_stages, spec.qvg_share_assignments, spec.mode)
            smoothed, subtract, clusters, centres = cluster(x, settings, warm if spec.qvg_warm_start else None)
        elif how.smoothing != "none":
            smoothed, undo = smooth(x.float(), how.smoothing, alpha=spec.smooth_alpha, percentile=spec.clip_percentile)
        if how.dtype == "bf16":
            smoothed = smoothed if subtract is None else smoothed - members(*subtract)
            held = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device).copy_(smoothed)
            return Blob(held, undo, clusters, x.dtype), centres
        fmt = CodeFormat(how.dtype, how.group_size, spec.granularity(side), how.asymmetric, spec.mode)
        if spec.mode == "official":
            fmt = coding.check_official(x.shape, fmt, flag=f"kv_group_size_{side[0]}")
            if subtract is not None:  # rounds the residual to the dtype of x, which the kernel does not
                smoothed, subtract = smoothed - members(*subtract), None
        codes = fused_kernels.encode(smoothed, fmt, subtract) if spec.triton_restore else None
        if codes is None:
            codes = coding.encode(smoothed if subtract is None else smoothed - members(*subtract), fmt)
        return Blob(codes, undo, clusters, x.dtype), centres


def reference(blob: Blob) -> Tensor:
    """float32 [B, S, N, D] by plain torch: what every other way of restoring must equal once rounded to the same dtype."""
    plain = coding.decode(blob.codes) if isinstance(blob.codes, Codes) else blob.codes.float()
    plain = unsmooth(plain, blob.undo)
    return plain if blob.clusters is None else add_back(plain, blob.clusters)


def _device(blob: Blob) -> torch.device:
    return blob.codes.data.device if isinstance(blob.codes, Codes) else blob.codes.device
