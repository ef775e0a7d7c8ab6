"""One transformer block of Wan: modulated self-attention, cross-attention to text (and image),
modulated feed-forward. docs/reference/wan.md#forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import pack, unpack
from rcm.nets.attention import AttentionBackend, AttentionCore
from rcm.nets.kv_view import EnteredLayer, LayerView
from rcm.nets.layers import AffineLayerNorm, GatedAdd, Gelu, Linear, ModulatedNorm, RMSNorm
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopePair, Rotate
from rcm.nets.wan.config import WanConfig


class ContextTokens(NamedTuple):
    """Embedded conditioning: text [B, L_text, E], image [B, L_image, E] or None."""

    text: Tensor
    image: Tensor | None = None


class ContextKV(NamedTuple):
    """A block's keys and values [B, L, N, D] of `ContextTokens`; depend on the prompt alone."""

    text: tuple[Tensor, Tensor]
    image: tuple[Tensor, Tensor] | None = None


class Modulation(NamedTuple):
    """Shift, scale and gate [B, F or 1, 1, E] of a block's attention, then of its feed-forward."""

    attn_shift: Tensor
    attn_scale: Tensor
    attn_gate: Tensor
    ffn_shift: Tensor
    ffn_scale: Tensor
    ffn_gate: Tensor


class SelfAttentionCore(nn.Module):
    """Rotation, cache, attention over the heads at hand; context parallelism wraps this."""

    def __init__(self, attention: AttentionCore) -> None:
        super().__init__()
        self.rotate = Rotate()
        self.attention = attention

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        rope: RopePair,
        cached: LayerView | None = None,
        attend: bool = True,
    ) -> Tensor | None:
        """`q`, `k`, `v` [B, L, N, D] with the L tokens of `layout`, not yet rotated, to [B, L, N,
        D]. `attend=False`: only what the cache takes and its observer sees; nothing is returned.
        """
        q = self.rotate(q, rope.query)
        if cached is None:
            return self.attention(q, self.rotate(k, rope.key), v, layout.mask)
        if cached.keys == "post_rope":
            k, v = _behind_cached(self.rotate(k, rope.key), v, cached)
        else:
            k, v = _behind_cached(k, v, cached)
            k = self.rotate(k, rope.key)
        cached.observe(q, k)
        return self._attended(q, k, v, layout, cached) if attend else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        rope: RopePair,
        cached: EnteredLayer,
    ) -> Tensor:
        """Attention of turned queries over what `cached.enter` returned."""
        if not cached.enters_turned:
            k = self.rotate(k, rope.key)
        return self._attended(q, k, v, layout, cached)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, cached: LayerView
    ) -> Tensor:
        if cached.attends:
            return cached.attend(q, k, v, mask=layout.mask)
        return self.attention(q, k, v, layout.mask, cached.prefix_tokens)


def _behind_cached(k: Tensor, v: Tensor, cached: LayerView) -> tuple[Tensor, Tensor]:
    """`cached.assemble`, tangents padded in one pass: torch joins plain and dual in several."""
    (k, k_dot), (v, v_dot) = unpack(k), unpack(v)
    whole = cached.assemble(k, v)
    behind = (0, 0, 0, 0, cached.prefix_tokens, 0)
    k, v = (
        pack(x, None if x_dot is None else F.pad(x_dot, behind))
        for x, x_dot in zip(whole, (k_dot, v_dot), strict=True)
    )
    return k, v


class _Projections(nn.Module):
    """What both attentions of a block have: projections, query and key norms of full width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, eps=config.eps)
        self.norm_k = RMSNorm(config.dim, eps=config.eps)

    def _heads(self, y: Tensor) -> Tensor:
        """[..., E] to [..., N, D]."""
        return y.unflatten(-1, (self.num_heads, self.head_dim))


class SelfAttention(_Projections):
    """Self-attention of all tokens."""

    def __init__(self, config: WanConfig, backend: AttentionBackend) -> None:
        super().__init__(config)
        self.core = SelfAttentionCore(AttentionCore(backend))
        self._joined: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        rope: RopePair,
        cached: LayerView | None,
        attend: bool = True,
    ) -> Tensor | None:
        """`x` [B, F, S, E] to the same shape; `attend` as in `SelfAttentionCore`."""
        captured = cached if isinstance(cached, EnteredLayer) and cached.takes_projections else None
        joined = None if captured is None else self.joined
        if joined is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = F.linear(x, *joined).chunk(3, dim=-1)
        if captured is not None and isinstance(self.core, SelfAttentionCore):
            # norms, rotation and the cache's slots in one kernel
            projected = (q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))
            q, k, v = captured.enter(projected, (self.norm_q, self.norm_k), rope.query)
            if not attend:
                return None
            return self.o(self.core.attend(q, k, v, layout, rope, captured).reshape(x.shape))
        q, k, v = (self._heads(y).flatten(1, 2) for y in (self.norm_q(q), self.norm_k(k), v))
        if not attend:
            return self.core(q, k, v, layout, rope, cached, attend=False)
        return self.o(self.core(q, k, v, layout, rope, cached).reshape(x.shape))

    @property
    def joined(self) -> tuple[Tensor, Tensor] | None:
        """Weights [3 E, E], biases [3 E] of q, k, v, while they lie as `join` laid them."""
        if self._joined is None or any(
            type(layer) is not Linear for layer in (self.q, self.k, self.v)
        ):
            return None
        width = self.q.out_features
        for name, whole in zip(("weight", "bias"), self._joined, strict=True):
            mine = [getattr(layer, name) for layer in (self.q, self.k, self.v)]
            places = [part.data_ptr() for part in whole.split(width)]
            if [x.data_ptr() for x in mine] != places or mine[0].dtype != whole.dtype:
                return None
        return self._joined

    @torch.no_grad()
    def join(self) -> None:
        """Lay the weights of q, k and v side by side, so that captured passes take one product for
        them: with few tokens three small ones leave a card half idle. Values, names and shapes
        stay. Only plain layers without gradient.
        """
        layers = (self.q, self.k, self.v)
        held = [p for layer in layers for p in layer.parameters(recurse=False)]
        plain = len(held) == 6 and all(type(layer) is Linear for layer in layers)
        if self.joined is not None or not plain:
            return
        if any(p.requires_grad or p.is_inference() or type(p) is not nn.Parameter for p in held):
            return
        joined = []
        for name in ("weight", "bias"):
            whole = torch.cat([getattr(layer, name) for layer in layers])
            for layer, part in zip(layers, whole.split(self.q.out_features), strict=True):
                getattr(layer, name).set_(part)
            joined.append(whole)
        self._joined = joined[0], joined[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfAttention:
        self._joined = None  # what moves elsewhere leaves nothing behind
        return super()._apply(fn, recurse)


class CrossAttention(_Projections):
    """Attention of video tokens to text, and to the image if any; their sum is projected."""

    def __init__(self, config: WanConfig, backend: AttentionBackend) -> None:
        super().__init__(config)
        self.has_image = config.image_branch
        if self.has_image:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps)
        self.attention = AttentionCore(backend)

    def keys_values(self, context: ContextTokens) -> ContextKV:
        """Keys and values of a prompt; reusable for every pass with that prompt."""
        text = (self._heads(self.norm_k(self.k(context.text))), self._heads(self.v(context.text)))
        if not self.has_image:
            return ContextKV(text)
        keys, values = self.norm_k_img(self.k_img(context.image)), self.v_img(context.image)
        return ContextKV(text, (self._heads(keys), self._heads(values)))

    def forward(self, x: Tensor, context: ContextTokens | ContextKV) -> Tensor:
        """`x` [B, F, S, E] to the same shape."""
        known = context if isinstance(context, ContextKV) else self.keys_values(context)
        q = self._heads(self.norm_q(self.q(x)).flatten(1, 2))
        out = self.attention(q, *known.text)
        if known.image is not None:
            out = out + self.attention(q, *known.image)
        return self.o(out.reshape(x.shape))


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU. In captured passes the GELU is part of the first product,
    which rounds once less; in passes with gradient its kernel takes the bias along.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, F, S, E] to the same shape."""
        grow, gelu, shrink = self
        if not (type(grow) is Linear and isinstance(gelu, Gelu)):
            return super().forward(x)
        if gelu.sums_bias_of(grow, x):
            return shrink(gelu.after(grow, x))
        if not gelu.joins_product(x):
            return super().forward(x)
        # the tanh form
        rows = torch._addmm_activation(grow.bias, x.flatten(0, -2), grow.weight.t(), use_gelu=True)
        return shrink(rows.unflatten(0, x.shape[:-1]))


class WanBlock(nn.Module):
    """One block; `modulation` plus projected time give shift, scale, gate of both branches."""

    def __init__(self, config: WanConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.norm1 = ModulatedNorm(config.dim, eps=config.eps)
        self.self_attn = SelfAttention(config, backend)
        self.gate1 = GatedAdd()
        self.norm3 = AffineLayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, backend)
        self.norm2 = ModulatedNorm(config.dim, eps=config.eps)
        self.ffn = FeedForward(
            Linear(config.dim, config.ffn_dim), Gelu(), Linear(config.ffn_dim, config.dim)
        )
        self.gate2 = GatedAdd()

    def forward(
        self,
        x: Tensor,
        time: Tensor | Modulation,
        context: ContextTokens | ContextKV,
        layout: TokenLayout,
        rope: RopePair,
        cached: LayerView | None = None,
        keys_only: bool = False,
    ) -> Tensor | None:
        """`x` [B, F, S, E] to the same; `time` the projected embedding [B, F or 1, 6, E], float32
        or wider, or what `modulate` made of it. `keys_only`: keys and values go to the cache, and
        nothing else is computed or returned.
        """
        attn_shift, attn_scale, attn_gate, ffn_shift, ffn_scale, ffn_gate = (
            time if isinstance(time, Modulation) else self.modulate(time)
        )
        x, rows = self.norm1(x, attn_shift, attn_scale, dtype=x.dtype, carry=True)
        rows = self.self_attn(rows, layout, rope, cached, attend=not keys_only)
        if keys_only:
            return rows
        x = self.gate1(x, rows, attn_gate)
        x, rows = self.norm3(x, carry=True)
        x = x + self.cross_attn(rows, context)
        x, rows = self.norm2(x, ffn_shift, ffn_scale, dtype=x.dtype, carry=True)
        rows = self.ffn(rows)
        return self.gate2(x, rows, ffn_gate)

    def modulate(self, time: Tensor) -> Modulation:
        """The block's own modulation added to the projected embedding [B, F or 1, 6, E]."""
        return Modulation(*(self.modulation.to(time.dtype) + time).unsqueeze(3).unbind(2))
