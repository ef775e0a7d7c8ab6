"""Views of a cache for captured passes: which slots, rotary tables and codes they touch is data on
the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rcm.kernels.masks import MaskSpec
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_coded import SIDES, CodedStore, Group
from rcm.nets.kv_fp8 import Fp8Store
from rcm.nets.kv_store import DenseStore, Seen
from rcm.nets.kv_view import CacheView, EnteredLayer, LayerView
from rcm.nets.layers import RMSNorm
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopeTable
from rcm.pipelines.captured_inputs import CapturedInputs


def has_kernels(x: Tensor) -> bool:
    """Whether Triton launches serve tensors like `x`."""
    return x.is_cuda and x.element_size() < 8


class StaticView(CacheView):
    """A view whose slots and tables are device data: what it writes and reads was found by the view
    of the pass at hand.
    """

    def __init__(
        self, cache: KVCache, inputs: CapturedInputs, branch: int, layout: TokenLayout
    ) -> None:
        super().__init__(cache, "transient", ())
        self.prefix_tokens = layout.context_tokens
        self.inputs, self.total = inputs, layout.context_tokens + layout.num_tokens
        self.tables, self.times = inputs.tables(branch, layout.context_tokens), inputs.times

    def begin(self, layout: TokenLayout) -> None:
        """Nothing: see the class."""

    def layer(self, index: int) -> LayerView:
        """See `CacheView`."""
        return _DenseLayer(self, index)


class CodedView(StaticView):
    """The same over a coded cache: its chunks are those at the addresses in `groups`, this pass's
    own among them if it `appends`.
    """

    def __init__(
        self,
        cache: KVCache,
        inputs: CapturedInputs,
        branch: int,
        layout: TokenLayout,
        *,
        groups: Sequence[Group],
        appends: bool,
    ) -> None:
        super().__init__(cache, inputs, branch, layout)
        self.groups, self.adds = groups, appends

    def layer(self, index: int) -> LayerView:
        """See `CacheView`."""
        return _CodedLayer(self, index)


class _StaticLayer(EnteredLayer):
    """What layers of captured passes have in common: where keys and values are gathered."""

    appends = False

    def __init__(self, view: StaticView, index: int, pair: tuple[Tensor, Tensor]) -> None:
        super().__init__(view, index)
        self._pair, self._slots, self._total = pair, view.inputs.slots, view.total
        self.takes_projections = view.inputs.fused and has_kernels(pair[0])

    def observe(self, q: Tensor, k: Tensor) -> None:
        """Nobody asked."""

    def _entered(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm],
        table: RopeTable,
        *,
        rotate_keys: bool,
    ) -> Tensor:
        """Turned queries; keys and values at the pass's slots."""
        from rcm.kernels.fused.enter_cache import enter_cache  # Triton is imported only on CUDA

        weights = (norms[0].weight, norms[1].weight)
        return enter_cache(
            projected,
            weights,
            table.per_pair,
            self._slots,
            self._pair,
            eps=norms[0].eps,
            rotate_keys=rotate_keys,
        )

    def _gathered(self) -> tuple[Tensor, Tensor]:
        keys, values = self._pair
        return keys[:, : self._total], values[:, : self._total]


class _DenseLayer(_StaticLayer):
    """Keys and values lie in the cache's buffers, and this pass's own are written among them."""

    def __init__(self, view: StaticView, index: int) -> None:
        store = view._cache.store
        assert isinstance(store, DenseStore)
        super().__init__(view, index, store.allocated(index))
        self.enters_turned = view.keys == "post_rope"

    def enter(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm],
        table: RopeTable,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `EnteredLayer`."""
        q = self._entered(projected, norms, table, rotate_keys=self.enters_turned)
        self._code()
        return q, *self._gathered()

    def assemble(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerView`."""
        for buffer, x in zip(self._pair, (k, v), strict=True):
            buffer.index_copy_(1, self._slots, x)
        self._code()
        return self._gathered()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None) -> Tensor:
        """See `LayerView`."""
        store = self._view.store
        assert isinstance(store, Fp8Store)
        return store.attend(self._index, q, (k, v), Seen(run=self._total), mask=mask)

    def _code(self) -> None:
        if isinstance(store := self._view.store, Fp8Store):
            store.code(self._index, self._slots)


class _CodedLayer(_StaticLayer):
    """Cold chunks are restored into the scratch buffer, and this pass's own keys and values stand
    behind them: coded and restored, too, if the pass appends. Where projections are taken, restored
    keys are turned as they are written.
    """

    enters_turned = True

    def __init__(self, view: CodedView, index: int) -> None:
        store = view._cache.store
        assert isinstance(store, CodedStore)
        super().__init__(view, index, store.scratch)
        self._store, self._groups, self._adds = store, view.groups, view.adds
        head = self._pair[0].shape[3]
        # as the launch that turns restored keys needs
        self.takes_projections = self.takes_projections and head & (head - 1) == 0
        self._turn = (
            view.tables.key.per_pair if view.keys == "pre_rope" and self.takes_projections else None
        )

    def enter(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm],
        table: RopeTable,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `EnteredLayer`."""
        q = self._entered(
            projected, norms, table, rotate_keys=self.keys == "post_rope" or not self._adds
        )
        own = slice(self.prefix_tokens, self._total)
        if self._adds:
            self._encode(*(x[:, own] for x in self._pair))
        self._restore()
        return q, *self._gathered()

    def assemble(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerView`."""
        if self._adds:
            self._encode(k, v)
        else:
            for out, x in zip(self._pair, (k, v), strict=True):
                out[:, self.prefix_tokens : self._total].copy_(x)
        self._restore()
        return self._gathered()

    def _encode(self, k: Tensor, v: Tensor) -> None:
        rows = self._groups_of_own().addresses[self._index, :, -1]
        for row, x, side in zip(rows, (k, v), SIDES, strict=True):
            self._store.addressed.encode_to(row, x, side=side, layer=self._index)

    def _groups_of_own(self) -> Group:
        """The group that the pass's own chunk belongs to, as its last: the one whose last chunk
        stands behind all others.
        """
        tokens = self._total - self.prefix_tokens
        return next(group for group in self._groups if group.like[0].shape[1] == tokens)

    def _restore(self) -> None:
        for group in self._groups:
            group.restore(self._store.addressed, self._index, self._pair, turn=self._turn)
