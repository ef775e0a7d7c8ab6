"""Where objectives' time and dtypes become Wan's: velocity, timestep 0..1000.

`Guided` wraps a denoiser and is one, so no objective or sampler mentions guidance. All are
transparent to dual numbers. Causal_rCM.md section 1, docs/reference/objectives.md#wrapper,
docs/reference/wan.md#precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from rcm.core.dtypes import Precision, as_written
from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.diffusion.guidance import cfg, is_guided
from rcm.diffusion.time import rf_to_timestep
from rcm.kernels.fp8_attention.api import obstacle
from rcm.nets.condition import Condition
from rcm.nets.gan_head import Taps
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_coded import KVCodec
from rcm.nets.kv_view import Attention, CacheView, Keys
from rcm.nets.layout import TokenLayout
from rcm.nets.paired_cache import PairedCache, PairedView, Past, View
from rcm.nets.rope import RopeTables
from rcm.nets.velocity_model import VelocityModel


class Denoiser(VelocityModel):
    """A network with its precision policy, which an autocast around its calls does not change.
    `net` is a `WanDiT` or a parallelised one.
    """

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        self.net: Any = net
        self.precision = precision

    def velocity(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: Past = None
    ) -> Tensor:
        """See `VelocityModel`. Casts `x` and the condition to precision.compute and 1000 t to
        precision.time: the only casts at the network's door. `TypeError` for an `x` of integers.
        """
        with as_written(x.device):
            v = self.net(*self._inputs(x, t, cond), layout, cache)
        return v.to(torch.promote_types(x.dtype, torch.float32))

    def mean_velocity(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: Past = None,
    ) -> Tensor:
        """See `VelocityModel`. Times are subtracted before the cast, so as exactly as they are."""
        if not self.net.config.two_times:
            return super().mean_velocity(x, t, s, cond, layout, cache=cache)
        span = self._span(t, s, x.device)
        with as_written(x.device):
            u = self.net(*self._inputs(x, t, cond), layout, cache, span=span)
        return u.to(torch.promote_types(x.dtype, torch.float32))

    def enter_context(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: View
    ) -> None:
        with as_written(x.device):
            self.net(*self._inputs(x, t, cond), layout, cache, context_only=True)

    def velocity_and_tokens(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, taps: Taps
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The pass of `velocity` (None if the taps are alone), and the tokens [B, F, S, E] that it
        leaves behind the tapped blocks, in the compute dtype; those of this rank.
        """
        with as_written(x.device):
            v, tokens = self.net(*self._inputs(x, t, cond), layout, taps=taps)
        return None if v is None else v.to(torch.promote_types(x.dtype, torch.float32)), tokens

    def _inputs(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        compute = self.precision.compute
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}, expected latents of a floating dtype")
        timestep = rf_to_timestep(t).to(device=x.device, dtype=self.precision.time)
        return x.to(compute), timestep, cond.to(device=x.device, dtype=compute)

    def _span(self, t: Tensor, s: Tensor, device: torch.device) -> Tensor:
        return rf_to_timestep(t - s).to(device=device, dtype=self.precision.time)

    def new_cache(
        self,
        *,
        num_frames: int,
        grid: tuple[int, int],
        keys: Keys = "post_rope",
        codec: KVCodec | None = None,
        hot_chunks: int = 0,
        attention: Attention = "net",
    ) -> KVCache:
        tokens, config = num_frames * grid[0] * grid[1], self.net.config
        device = self.net.patch_embedding.weight.device
        if attention == "fp8" and (why := obstacle(device, width=config.head_dim)):
            raise ConfigError(f"attention='fp8' is not possible here: {why}; use attention='net'")
        return KVCache(
            config.num_layers,
            capacity_tokens=tokens,
            keys=keys,
            codec=codec,
            hot_chunks=hot_chunks,
            attention=attention,
        )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return self.net.config.token_grid(height, width)

    @property
    def rope(self) -> RopeTables:
        return self.net.rope

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.precision.compute

    @property
    def fused(self) -> str:
        return self.net.fused

    def prepare(self, cond: Condition) -> Condition:
        """See `VelocityModel`; for a network that is not sharded."""
        weight = self.net.patch_embedding.weight
        with as_written(weight.device):
            return self.net.prepare(cond.to(device=weight.device, dtype=self.precision.compute))

    def join_projections(self) -> None:
        if hasattr(self.net, "join_projections"):
            self.net.join_projections()

    def time_rows(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...] | None:
        if not hasattr(self.net, "time_rows"):
            return None
        span = {} if s is None else {"span": self._span(t, s, t.device)}
        timestep = rf_to_timestep(t).to(self.precision.time)
        with as_written(t.device):
            return self.net.time_rows(timestep, dtype=self.precision.compute, **span)

    @property
    def group(self) -> Any:
        return getattr(getattr(self.net, "enter", None), "group", None)

    def eval_params(self) -> Self:
        """Freeze the network and set it to evaluation, for teachers; returns itself."""
        self.net.requires_grad_(False).eval()
        return self


class Guided(VelocityModel):
    """Guidance: v = v_neg + scale (v_cond - v_neg), without the negative pass for scale <= 1.

    `negative` has a batch of 1 or that of the sample; image conditioning is taken from the sample
    where the negative has none. Raises `ConfigError` unless `scale` is a finite number.
    """

    def __init__(self, denoiser: VelocityModel, negative: Condition, scale: float) -> None:
        require_kind("guidance scale", scale, float)
        self.denoiser, self.negative, self.scale = denoiser, negative, scale

    @property
    def active(self) -> bool:
        """Whether there is a negative pass."""
        return is_guided(self.scale)

    def velocity(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: Past = None
    ) -> Tensor:
        """See `VelocityModel`; `cache` is a view of a `PairedCache`, others are `TypeError`."""
        positive, negative = self._branches(cache)
        v = self.denoiser.velocity(x, t, cond, layout, cache=positive)
        if not self.active:
            return v
        other = self._negative(x, cond, cache)
        return cfg(v, self.denoiser.velocity(x, t, other, layout, cache=negative), self.scale)

    def enter_context(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: View
    ) -> None:
        """See `VelocityModel`; `cache` as in `velocity`."""
        positive, negative = self._branches(cache)
        assert positive is not None
        self.denoiser.enter_context(x, t, cond, layout, cache=positive)
        if self.active:
            other = self._negative(x, cond, cache)
            assert negative is not None
            self.denoiser.enter_context(x, t, other, layout, cache=negative)

    @staticmethod
    def _branches(cache: Past) -> tuple[CacheView | None, CacheView | None]:
        if cache is None:
            return None, None
        if not isinstance(cache, PairedView):
            raise TypeError(
                "a guided denoiser takes views of its own new_cache(), a PairedCache, got"
                f" {type(cache).__name__}"
            )
        return cache.cond, cache.negative

    def _negative(self, x: Tensor, cond: Condition, cache: Past) -> Condition:
        if isinstance(cache, PairedView) and cache.negative is None:
            raise ValueError(
                f"guidance scale {self.scale} needs the negative half of the cache, which was made"
                " without; make a new_cache()"
            )
        return self.negative.expand(x.shape[0]).to(device=x.device).with_images_of(cond)

    def new_cache(
        self,
        *,
        num_frames: int,
        grid: tuple[int, int],
        keys: Keys = "post_rope",
        codec: KVCodec | None = None,
        hot_chunks: int = 0,
        attention: Attention = "net",
    ) -> PairedCache:
        """See `VelocityModel`: a cache per branch that is used, each with its own codec state."""

        def branch(codec: KVCodec | None) -> KVCache:
            cache = self.denoiser.new_cache(
                num_frames=num_frames,
                grid=grid,
                keys=keys,
                codec=codec,
                hot_chunks=hot_chunks,
                attention=attention,
            )
            assert isinstance(cache, KVCache), "guidance is around one network, not around guidance"
            return cache

        if not self.active:
            return PairedCache(branch(codec))
        return PairedCache(branch(codec), branch(None if codec is None else codec.fork()))

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return self.denoiser.token_grid(height, width)

    @property
    def rope(self) -> RopeTables:
        return self.denoiser.rope

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.denoiser.compute_dtype

    @property
    def fused(self) -> str:
        return self.denoiser.fused

    def join_projections(self) -> None:
        self.denoiser.join_projections()

    def time_rows(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...] | None:
        return self.denoiser.time_rows(t, s)

    @property
    def group(self) -> Any:
        return self.denoiser.group

    def prepare(self, cond: Condition) -> Condition:
        """See `VelocityModel`: the positive branch; construct with a prepared negative."""
        return self.denoiser.prepare(cond)


def guided(
    model: VelocityModel, negative: Callable[[], Condition] | None, scale: float
) -> VelocityModel:
    """`model` guided away from the condition that `negative` makes; itself, and nothing made, where
    there is none or the scale asks for no guidance.
    """
    return model if negative is None or not is_guided(scale) else Guided(model, negative(), scale)
