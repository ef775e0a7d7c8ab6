"""A plain cache that attends in FP8: codes lie beside keys and values, after every write.

Scales are those of the first keys and values of a layer; after `clear` the next ones set them anew,
in the same memory. The first pass of all, which allocates, must be launched one by one (`ready`).
Codes depend on nothing but scales and what is held, so a snapshot needs only these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcm.core.dual import in_dual_level
from rcm.kernels.fp8_attention import api
from rcm.kernels.fp8_attention.codes import GROUP, Codes, Scales, new_codes, scales_of
from rcm.kernels.masks import MaskSpec
from rcm.nets.kv_store import DenseStore, Pair, Seen, Spans


class Fp8Store(DenseStore):
    """A `DenseStore` with codes. `turned`: keys are stored rotated, so their codes serve every
    later pass; where they are rotated at every read they are coded at every read.
    """

    attends = True

    def __init__(self, num_layers: int, capacity: int, *, turned: bool) -> None:
        super().__init__(num_layers, capacity)
        self.turned = turned
        self.codes: list[Codes | None] = [None] * num_layers
        self._scales: list[Scales | None] = [None] * num_layers
        self._unset = set(range(num_layers))

    @property
    def ready(self) -> bool:
        """Whether every layer has the memory for scales and codes that a captured pass uses."""
        return None not in self._scales and not (self.turned and None in self.codes)

    @property
    def unset(self) -> bool:
        """Whether the next pass sets scales; a captured one that does is followed by `settle`."""
        return bool(self._unset)

    def settle(self) -> None:
        """A captured pass has set the scales of all layers."""
        self._unset.clear()

    def attend(
        self, layer: int, q: Tensor, pair: Pair, seen: Seen, *, mask: MaskSpec | None
    ) -> Tensor:
        """See `Store`. `RuntimeError` for gradients, tangents, and a mask that is not full."""
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *pair))
        if in_dual_level() or grad:
            raise RuntimeError(
                "attention='fp8' gives neither gradients nor tangents; use attention='net'"
            )
        if mask is not None and not mask.is_full:
            raise RuntimeError(
                f"attention='fp8' lets every query see every key, this pass has {mask}; use"
                " attention='net'"
            )
        scale = q.shape[3] ** -0.5
        if seen.run is not None and (codes := self.codes[layer]) is not None:
            return api.attend(q, codes, count=seen.run, scale=scale)
        return api.attend_plain(q, *pair, self._scaled(layer, *pair), scale=scale)

    def code(self, layer: int, slots: Tensor) -> None:
        """Code what was put into `slots` int64 [L] of the layer, which may set its scales."""
        if (codes := self.codes[layer]) is not None:
            pair = self.allocated(layer)
            if layer in self._unset:
                self._scaled(layer, *(x[:, slots] for x in pair))
            api.write(codes, slots, *pair, at_slots=True)

    def put(self, layer: int, chunk: int, spans: Spans, pair: Pair, *, hot: bool = True) -> None:
        super().put(layer, chunk, spans, pair)
        if self.turned:
            self._make_room(layer, self._scaled(layer, *pair), batch=pair[0].shape[0])
            self.code(layer, _slots(spans, pair[0].device))

    def move(self, source: Spans, target: Spans) -> None:
        super().move(source, target)
        for layer, pair in enumerate(self.buffers):
            if pair is not None:
                self.code(layer, _slots(target, pair[0].device))

    def clear(self, *, free_buffers: bool) -> None:
        super().clear(free_buffers=free_buffers)
        self._unset = set(range(len(self.buffers)))
        if free_buffers:
            self.codes, self._scales = [None] * len(self.codes), [None] * len(self._scales)

    def num_bytes(self) -> int:
        held = [x for codes in self.codes if codes is not None for x in (codes.keys, codes.values)]
        held += [x for scales in self._scales for x in scales or ()]
        return super().num_bytes() + sum(x.nbytes for x in held)

    def code_bytes(self, *, batch: int, heads: int, width: int) -> int:
        """Bytes of codes and scales once every layer was written, beyond the plain tensors."""
        room = -(-self.capacity // GROUP) * GROUP if self.turned else 0
        return len(self.buffers) * (2 * batch * heads * room * width + 4 * heads * (1 + 3 * width))

    def state(self) -> Any:
        scales = [
            None if held is None or i in self._unset else Scales(*(x.clone() for x in held))
            for i, held in enumerate(self._scales)
        ]
        return super().state(), scales

    def load_state(self, state: Any) -> None:
        buffers, scales = state
        super().load_state(buffers)
        self._unset = {layer for layer, held in enumerate(scales) if held is None}
        for layer, held in enumerate(scales):
            if held is None:
                continue
            mine, pair = self._set(layer, held), self.buffers[layer]
            if self.turned and pair is not None:
                self._make_room(layer, mine, batch=pair[0].shape[0])
                self.code(layer, torch.arange(self.capacity, device=pair[0].device))

    def _make_room(self, layer: int, scales: Scales, *, batch: int) -> None:
        if self.codes[layer] is None:
            self.codes[layer] = new_codes(scales, batch=batch, capacity=self.capacity)

    def _scaled(self, layer: int, k: Tensor, v: Tensor) -> Scales:
        """The layer's scales, which are those of `k` and `v` if it has none."""
        held = self._scales[layer]
        if held is None or layer in self._unset:
            held = self._set(layer, scales_of(k, v))
            self._unset.discard(layer)
        return held

    def _set(self, layer: int, scales: Scales) -> Scales:
        """Take up `scales`, in the memory at hand (what was captured keeps reading it)."""
        held = self._scales[layer]
        if held is None:
            held = self._scales[layer] = Scales(*(x.clone() for x in scales))
        else:
            for mine, x in zip(held, scales, strict=True):
                mine.copy_(x)
        return held


def _slots(spans: Spans, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])
