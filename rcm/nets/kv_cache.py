"""Keys and values of finished chunks, per layer: append, readonly and transient access, compaction.

All bookkeeping is host integers. A forward works on a `CacheView` made for it alone, which is never changed afterwards, so that
recomputation of that forward sees the same context. The cache does not know schedules, eviction policies or context parallelism
(behind the all-to-all it sees all tokens and fewer heads). spec/causal_inference.md 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rcm.core.dual import in_dual_level
from rcm.nets.layout import TokenLayout

Keys = Literal["post_rope", "pre_rope"]
_REFUSES_DUALS = "append under a dual level: a cache holds constants; fill it outside the tangent pass and read it there"


class KVCodec(Protocol):
    """Storage format of a quantised cache: one blob per layer, chunk and side."""

    def encode(self, x: Tensor, *, side: Literal["key", "value"], layer: int) -> Any:
        """Blob of `x` [B, S, N, D]."""

    def decode(self, blob: Any, *, side: Literal["key", "value"]) -> Tensor:
        """[B, S, N, D] of a blob."""


class _DenseLayer:
    """Keys and values in two buffers [B, capacity, N, D], allocated by the first write."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def write(self, start: int, k: Tensor, v: Tensor, sizes: tuple[int, ...]) -> None:
        if self._buffers is None:
            self._buffers = tuple(x.new_empty(x.shape[0], self._capacity, *x.shape[2:]) for x in (k, v))
        for buffer, x in zip(self._buffers, (k, v), strict=True):
            if (x.dtype, x.shape[0], x.shape[2:]) != (buffer.dtype, buffer.shape[0], buffer.shape[2:]):
                raise ValueError(
                    f"cache buffers are {tuple(buffer.shape)} {buffer.dtype}, got {tuple(x.shape)} {x.dtype}; "
                    "reset(free_buffers=True) before another batch"
                )
            buffer[:, start : start + x.shape[1]].copy_(x)

    def read(self, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers
        return keys[:, :tokens], values[:, :tokens]

    def clear(self, *, free_buffers: bool) -> None:
        if free_buffers:
            self._buffers = None


class _CodedLayer:
    """Keys and values as one pair of codec blobs per chunk."""

    def __init__(self, codec: KVCodec, layer: int) -> None:
        self._codec, self._layer = codec, layer
        self._chunks: list[tuple[int, Any, Any]] = []

    def write(self, start: int, k: Tensor, v: Tensor, sizes: tuple[int, ...]) -> None:
        self._chunks = [chunk for chunk in self._chunks if chunk[0] <= start]
        end = start
        for k_part, v_part in zip(k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True):
            end += k_part.shape[1]
            key, value = (self._codec.encode(x, side=side, layer=self._layer) for x, side in ((k_part, "key"), (v_part, "value")))
            self._chunks.append((end, key, value))

    def read(self, tokens: int) -> tuple[Tensor, Tensor]:
        seen = [chunk for chunk in self._chunks if chunk[0] <= tokens]
        keys = torch.cat([self._codec.decode(key, side="key") for _, key, _ in seen], dim=1)
        return keys, torch.cat([self._codec.decode(value, side="value") for _, _, value in seen], dim=1)

    def clear(self, *, free_buffers: bool) -> None:
        self._chunks = []


class KVCache:
    """Cache of `num_layers` layers with room for `capacity_tokens` tokens each.

    keys    "post_rope": keys are stored rotated, positions are final. "pre_rope": stored before rotation and rotated at every read by
            `frame_index`, which an eviction policy may set anew.
    codec   how chunks are stored; None keeps plain tensors in one buffer per layer, allocated by the first write in its dtype.
    Committed state: `num_tokens`, `chunk_ends` (cumulative tokens), `frame_index` (temporal position per cached frame; None = unknown,
    after a compaction that did not say).
    """

    def __init__(self, num_layers: int, *, capacity_tokens: int, keys: Keys = "post_rope", codec: KVCodec | None = None) -> None:
        if num_layers < 1 or capacity_tokens < 1:
            raise ValueError(
                f"a cache needs at least one layer and one token, got {num_layers} layers and capacity_tokens={capacity_tokens}"
            )
        if keys not in ("post_rope", "pre_rope"):
            raise ValueError(f"keys must be 'post_rope' or 'pre_rope', got {keys!r}")
        self.capacity_tokens, self.keys = capacity_tokens, keys
        self._layers: list[_DenseLayer | _CodedLayer] = [
            _DenseLayer(capacity_tokens) if codec is None else _CodedLayer(codec, i) for i in range(num_layers)
        ]
        self._codec = codec
        self.chunk_ends: list[int] = []
        self.frame_index: tuple[int, ...] | None = ()
        self._epoch = 0

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def num_tokens(self) -> int:
        """Committed tokens."""
        return self.chunk_ends[-1] if self.chunk_ends else 0

    @property
    def num_chunks(self) -> int:
        """Committed chunks."""
        return len(self.chunk_ends)

    def prefix_tokens(self, num_chunks: int | None = None) -> int:
        """Tokens of the first `num_chunks` chunks (None = all). `ValueError` if negative, `IndexError` beyond the committed chunks."""
        if num_chunks is None:
            return self.num_tokens
        if num_chunks < 0:
            raise ValueError(f"num_chunks must not be negative, got {num_chunks}")
        if num_chunks > self.num_chunks:
            raise IndexError(f"asked for {num_chunks} chunks of a cache that holds {self.num_chunks}")
        return self.chunk_ends[num_chunks - 1] if num_chunks else 0

    def append(self) -> CacheView:
        """View of one forward that adds its tokens. Refuses dual tensors; stores detached; `RuntimeError` beyond the capacity."""
        return CacheView(self, "append", self.num_tokens)

    def readonly(self, num_chunks: int | None = None, *, transient: bool = False) -> CacheView:
        """View of one forward that sees the first `num_chunks` chunks (None = all) before its own tokens and leaves the cache as it is.

        `transient=True` (inference only): the forward's tokens are written in place after the committed end and read from there,
        without a copy of the prefix; bookkeeping does not change and the next such forward overwrites them. Needs the whole cache as
        prefix, no codec, and room.
        """
        prefix = self.prefix_tokens(num_chunks)
        if transient and prefix != self.num_tokens:
            raise ValueError(
                f"a transient write after {prefix} tokens would overwrite committed ones ({self.num_tokens}); use transient=False"
            )
        if transient and self._codec is not None:
            raise ValueError("a cache with a codec has no transient write; use transient=False")
        return CacheView(self, "transient" if transient else "readonly", prefix)

    def reset(self, free_buffers: bool = True) -> None:
        """Forget everything; `free_buffers=False` keeps the allocations for inputs of the same shape and dtype."""
        self.chunk_ends, self.frame_index = [], ()
        self._epoch += 1
        for layer in self._layers:
            layer.clear(free_buffers=free_buffers)

    def compact_(self, index: Tensor | None, *, frame_index: Sequence[int] | None = None) -> None:
        """Keep only the tokens `index`, in that order: int [budget] for all samples or [B, budget] per sample. Afterwards all is one chunk.

        `frame_index` states the temporal positions of the kept frames; without it they are unknown, which a pre-RoPE cache refuses to read.
        None, or an empty cache, does nothing; an empty index clears. Raises `ValueError` for more than two dimensions, a wrong batch or a
        non-integer index, `IndexError` for tokens that are not cached. Reads the index on the host.
        """
        if index is None or self.num_tokens == 0:
            return
        self._check_index(index)
        if index.shape[-1] == 0:
            self.reset(free_buffers=False)
            return
        for layer in self._layers:
            k, v = (_take(x, index) for x in layer.read(self.num_tokens))
            layer.write(0, k, v, (index.shape[-1],))
        self._epoch += 1
        self.chunk_ends = [index.shape[-1]]
        self.frame_index = None if frame_index is None else tuple(frame_index)

    def _check_index(self, index: Tensor) -> None:
        if index.dim() not in (1, 2):
            raise ValueError(f"compaction index must be [budget] or [B, budget], got shape {tuple(index.shape)}")
        if index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"compaction index must be of integers, got {index.dtype}")
        if index.shape[-1] > self.capacity_tokens:
            raise ValueError(f"compaction to {index.shape[-1]} tokens exceeds the capacity of {self.capacity_tokens}")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.num_tokens):
            raise IndexError(f"compaction index spans {int(index.min())} to {int(index.max())}, the cache holds {self.num_tokens} tokens")


class CacheView:
    """What one forward may see and write. `frame_index`: temporal positions of the committed frames, None if unknown.

    Made by `KVCache.append` / `readonly`. The network calls `begin` before its first layer and `commit` after its last.
    """

    def __init__(self, cache: KVCache, mode: Literal["append", "readonly", "transient"], prefix_tokens: int) -> None:
        self._cache, self._epoch = cache, cache._epoch
        self.mode, self.prefix_tokens = mode, prefix_tokens
        self.keys, self.frame_index = cache.keys, cache.frame_index
        self._chunk_tokens: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self._cache.num_layers

    def begin(self, layout: TokenLayout) -> None:
        """Check this forward before its first layer.

        `ValueError` unless the visible tokens are what `layout` expects before its frames; `RuntimeError` if a write finds no room, if
        the view was used for another append, or if an append happens under a dual level.
        """
        expected = layout.context_frames * layout.tokens_per_frame
        if self.prefix_tokens != expected:
            raise ValueError(
                f"the layout expects {expected} cached tokens ({layout.context_frames} frames of {layout.tokens_per_frame}), "
                f"the cache view shows {self.prefix_tokens}; append earlier chunks first, or choose num_chunks in readonly()"
            )
        if self.mode == "append" and self._cache.num_tokens != self.prefix_tokens:
            raise RuntimeError("an append view serves one forward; take a fresh one from cache.append()")
        if self.mode == "append" and in_dual_level():
            raise RuntimeError(_REFUSES_DUALS)
        if self.mode != "readonly" and self.prefix_tokens + layout.num_tokens > self._cache.capacity_tokens:
            raise RuntimeError(
                f"{layout.num_tokens} tokens after {self.prefix_tokens} exceed capacity_tokens={self._cache.capacity_tokens} of the cache; "
                "make it larger or compact it"
            )
        self._chunk_tokens = tuple(frames * layout.tokens_per_frame for frames in layout.chunks or (layout.num_frames,))

    def positions(self, layout: TokenLayout) -> tuple[int, ...]:
        """Temporal positions of the visible cached frames, for keys rotated at reading. `ValueError` if they are unknown or not one
        per frame.
        """
        frames, rest = divmod(self.prefix_tokens, layout.tokens_per_frame)
        committed = self._cache.num_tokens // layout.tokens_per_frame
        if rest or self.frame_index is None or len(self.frame_index) not in (frames, committed):
            raise ValueError(
                f"a pre_rope cache needs one temporal position per cached frame ({self.prefix_tokens} tokens, "
                f"{layout.tokens_per_frame} per frame), got {self.frame_index}; pass frame_index to compact_() or set cache.frame_index"
            )
        return self.frame_index[:frames]

    def layer(self, index: int) -> LayerView:
        """View of layer `index`."""
        return LayerView(self, index)

    def commit(self, layout: TokenLayout) -> None:
        """After all layers of an append: count the new tokens, a chunk per entry of `layout.chunks`. Nothing in the other modes."""
        if self.mode != "append":
            return
        cache = self._cache
        cache.chunk_ends += [self.prefix_tokens + tokens for tokens in accumulate(self._chunk_tokens)]
        if cache.frame_index is not None:
            cache.frame_index = (*cache.frame_index, *layout.frame_index)


class LayerView:
    """One layer of a `CacheView`."""

    def __init__(self, view: CacheView, index: int) -> None:
        self._view, self._store = view, view._cache._layers[index]

    @property
    def keys(self) -> Keys:
        """Whether keys pass through `assemble` before or after rotation."""
        return self._view.keys

    @property
    def appends(self) -> bool:
        """Whether this forward writes committed tokens, so that it must run exactly once (no activation recomputation)."""
        return self._view.mode == "append"

    @property
    def prefix_tokens(self) -> int:
        """Cached tokens that precede the forward's own in the results of `assemble`."""
        return self._view.prefix_tokens

    def assemble(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, prefix + L, N, D] for the attention of this forward from its own `k`, `v` [B, L, N, D].

        Cached tokens are constants: no gradient, no tangent. Append stores detached tensors; gradients still reach this forward's own.
        """
        view, prefix = self._view, self._view.prefix_tokens
        if view._epoch != view._cache._epoch:
            raise RuntimeError("the cache was reset or compacted after this view was made; take a fresh view")
        if view.mode == "append":
            if in_dual_level():
                raise RuntimeError(_REFUSES_DUALS)
            self._store.write(prefix, k.detach(), v.detach(), view._chunk_tokens or (k.shape[1],))
            if not (k.requires_grad or v.requires_grad):
                return self._store.read(prefix + k.shape[1])
        elif view.mode == "transient":
            if in_dual_level() or k.requires_grad or v.requires_grad:
                raise RuntimeError("a transient write keeps neither tangents nor gradients; use readonly(transient=False)")
            self._store.write(prefix, k, v, (k.shape[1],))
            return self._store.read(prefix + k.shape[1])
        if prefix == 0:
            return k, v
        k_past, v_past = self._store.read(prefix)
        return torch.cat([k_past, k], dim=1), torch.cat([v_past, v], dim=1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` of `x` [B, S, N, D], a copy."""
    if index.dim() == 1:
        return x.index_select(1, index.to(x.device))
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"compaction index for {index.shape[0]} samples, the cache holds {x.shape[0]}; give [budget] or [B, budget]")
    return x.gather(1, index.to(x.device)[:, :, None, None].expand(-1, -1, *x.shape[2:]))
