"""Where parameterisations and dtypes meet: networks speak Wan's language (velocity, timestep
0..1000), objectives and samplers ask in RF or TrigFlow time.

`Guided` wraps a denoiser and is one, so no objective or sampler mentions guidance. All are
transparent to dual numbers. Causal_rCM.md section 1, docs/reference/objectives.md#wrapper,
docs/reference/wan.md#precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.diffusion.guidance import cfg, is_guided
from rcm.diffusion.time import rf_to_timestep
from rcm.diffusion.wan_as_trigflow import rf_point, trig_F
from rcm.kernels.fp8_attention.api import obstacle
from rcm.nets.condition import Condition
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_coded import KVCodec
from rcm.nets.kv_view import Attention, CacheView, Keys, Observer
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopeTables


class VelocityModel:
    """What objectives and samplers need of a denoiser; `velocity` is its only primitive."""

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView | None = None,
    ) -> Tensor:
        """RF velocity v = eps - x0 of the output frames of `layout`, [B, C, F_out, H, W].

        `x` [B, C, F, H, W] any float dtype; `t` RF time in [0, 1], float64 [B, 1] or [B, F];
        `cache` a fresh view of `new_cache`'s cache. Returns the dtype of `x`, at least float32.
        """
        raise NotImplementedError  # a model says this itself

    def mean_velocity(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView | None = None,
    ) -> Tensor:
        """Mean u of the velocity along the ODE from `t` down to `s`, x_s = x_t - (t - s) u, of a
        model with two times (arXiv 2505.13447); at s = t its `velocity`. `s` has the shape of `t`,
        the rest is as in `velocity`. `ConfigError` for a model of one time.
        """
        raise ConfigError(
            "this model has one time: it knows no mean velocity between two; train one with"
            " training_type=tf_meanflow"
        )

    def enter_context(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView,
    ) -> None:
        """The pass of `velocity` for what it leaves in `cache`; a model skips what that does not
        need.
        """
        self.velocity(x, t, cond, layout, cache=cache)

    def trig_F(
        self,
        x_tau: Tensor,
        tau: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView | None = None,
    ) -> Tensor:
        """TrigFlow velocity F at `x_tau` [B, C, F, H, W], `tau` in [0, pi/2] float64 [B, 1] or [B,
        F]; every frame of the layout is predicted.

        F = (cos - sin) x_t + v / (cos + sin), with x_t, t the RF point of (x_tau, tau). Finite on
        the closed interval.
        """
        x_t, t = rf_point(x_tau, tau)
        return trig_F(x_t, self.velocity(x_t, t, cond, layout, cache=cache), tau)

    def new_cache(
        self,
        *,
        num_frames: int,
        grid: tuple[int, int],
        keys: Keys = "post_rope",
        codec: KVCodec | None = None,
        hot_chunks: int = 0,
        attention: Attention = "net",
    ) -> KVCache | PairedCache:
        """An empty cache with room for `num_frames` frames of `grid` = (h, w) tokens; `codec`
        stores chunks quantised, except the newest `hot_chunks`. `attention="fp8"`: passes attend to
        it in FP8; `ConfigError` where that cannot be.
        """
        raise NotImplementedError  # a model says this itself

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) of a latent frame; `ConfigError` if the patch does not divide it."""
        raise NotImplementedError  # a model says this itself

    @property
    def rope(self) -> RopeTables:
        """The network's rotary tables."""
        raise NotImplementedError  # a model says this itself

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes in."""
        raise NotImplementedError  # a model says this itself

    @property
    def fused(self) -> str:
        """Where the network's fused layers run: "auto", "on" or "off"."""
        raise NotImplementedError  # a model says this itself

    def prepare(self, cond: Condition) -> Condition:
        """`cond` with everything that depends on the prompt alone computed once, for passes without
        gradient.
        """
        raise NotImplementedError  # a model says this itself

    def join_projections(self) -> None:
        """Lay weights so that captured passes need fewer products; nothing where a model has no
        such layout.
        """

    def time_rows(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """What the passes at RF time `t`, float64 [B, 1], make of it alone; None if every pass
        makes it anew. With `s`: those of `mean_velocity`.
        """
        return None

    @property
    def num_ranks(self) -> int:
        """Ranks that compute each forward together."""
        return 1


class Denoiser(VelocityModel):
    """A network with its precision policy. `net` is a `WanDiT` or a parallelised one."""

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        self.net: Any = net
        self.precision = precision

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView | None = None,
    ) -> Tensor:
        """See `VelocityModel`. Casts `x` and the condition to precision.compute and 1000 t to
        precision.time: the only casts at the network's door.
        """
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
        cache: CacheView | PairedView | None = None,
    ) -> Tensor:
        """See `VelocityModel`. The difference of the times is taken before its cast, as exact as
        they are.
        """
        if not self.net.config.two_times:
            return super().mean_velocity(x, t, s, cond, layout, cache=cache)
        u = self.net(*self._inputs(x, t, cond), layout, cache, span=self._span(t, s, x.device))
        return u.to(torch.promote_types(x.dtype, torch.float32))

    def enter_context(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView,
    ) -> None:
        """See `VelocityModel`."""
        self.net(*self._inputs(x, t, cond), layout, cache, context_only=True)

    def _inputs(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        compute = self.precision.compute
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
        """See `VelocityModel`."""
        tokens, config = num_frames * grid[0] * grid[1], self.net.config
        if (
            attention == "fp8"
            and (why := obstacle(self.net.patch_embedding.weight.device, width=config.head_dim))
            is not None
        ):
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
        """See `VelocityModel`."""
        return self.net.config.token_grid(height, width)

    @property
    def rope(self) -> RopeTables:
        """See `VelocityModel`."""
        return self.net.rope

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `VelocityModel`."""
        return self.precision.compute

    @property
    def fused(self) -> str:
        """See `VelocityModel`."""
        return self.net.fused

    def prepare(self, cond: Condition) -> Condition:
        """See `VelocityModel`; for a network that is not sharded."""
        weight = self.net.patch_embedding.weight
        return self.net.prepare(cond.to(device=weight.device, dtype=self.precision.compute))

    def join_projections(self) -> None:
        """See `VelocityModel`."""
        if hasattr(self.net, "join_projections"):
            self.net.join_projections()

    def time_rows(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """See `VelocityModel`."""
        made = getattr(self.net, "time_rows", None)
        span = {} if s is None else {"span": self._span(t, s, t.device)}
        return (
            None
            if made is None
            else made(
                rf_to_timestep(t).to(self.precision.time), dtype=self.precision.compute, **span
            )
        )

    @property
    def num_ranks(self) -> int:
        """See `VelocityModel`."""
        group = getattr(getattr(self.net, "enter", None), "group", None)
        return 1 if group is None else group.size()

    def eval_params(self) -> Self:
        """Freeze the network's parameters and set it to evaluation, for teachers; returns
        itself.
        """
        self.net.requires_grad_(False).eval()
        return self


class Guided(VelocityModel):
    """Classifier-free guidance: v = v_neg + scale (v_cond - v_neg), the negative pass skipped for
    scale <= 1.

    `negative` has a batch of 1 or that of the sample; image conditioning is taken from the sample
    where the negative has none.
    """

    def __init__(self, denoiser: VelocityModel, negative: Condition, scale: float) -> None:
        self.denoiser, self.negative, self.scale = denoiser, negative, scale

    @property
    def active(self) -> bool:
        """Whether there is a negative pass."""
        return is_guided(self.scale)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView | None = None,
    ) -> Tensor:
        """See `VelocityModel`; `cache` is a view of a `PairedCache`. Raises `TypeError` for
        another.
        """
        if cache is not None and not isinstance(cache, PairedView):
            raise TypeError(
                "a guided denoiser takes views of its own new_cache(), a PairedCache, got"
                f" {type(cache).__name__}"
            )
        v = self.denoiser.velocity(x, t, cond, layout, cache=None if cache is None else cache.cond)
        if not self.active:
            return v
        negative = self._negative(x, cond, cache)
        return cfg(
            v,
            self.denoiser.velocity(
                x, t, negative, layout, cache=None if cache is None else cache.negative
            ),
            self.scale,
        )

    def enter_context(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: CacheView | PairedView,
    ) -> None:
        """See `VelocityModel`; `cache` as in `velocity`."""
        if not isinstance(cache, PairedView):
            raise TypeError(
                "a guided denoiser takes views of its own new_cache(), a PairedCache, got"
                f" {type(cache).__name__}"
            )
        self.denoiser.enter_context(x, t, cond, layout, cache=cache.cond)
        if self.active:
            negative = self._negative(x, cond, cache)
            assert cache.negative is not None
            self.denoiser.enter_context(x, t, negative, layout, cache=cache.negative)

    def _negative(self, x: Tensor, cond: Condition, cache: PairedView | None) -> Condition:
        if cache is not None and cache.negative is None:
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
        """See `VelocityModel`: one cache per branch, the negative one only if it is used; a codec's
        warm state is not shared.
        """

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

        return PairedCache(
            branch(codec), branch(codec if codec is None else codec.fork()) if self.active else None
        )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """See `VelocityModel`."""
        return self.denoiser.token_grid(height, width)

    @property
    def rope(self) -> RopeTables:
        """See `VelocityModel`."""
        return self.denoiser.rope

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `VelocityModel`."""
        return self.denoiser.compute_dtype

    @property
    def fused(self) -> str:
        """See `VelocityModel`."""
        return self.denoiser.fused

    def join_projections(self) -> None:
        """See `VelocityModel`."""
        self.denoiser.join_projections()

    def time_rows(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """See `VelocityModel`."""
        return self.denoiser.time_rows(t, s)

    @property
    def num_ranks(self) -> int:
        """See `VelocityModel`."""
        return self.denoiser.num_ranks

    def prepare(self, cond: Condition) -> Condition:
        """See `VelocityModel`. Prepares the positive branch; give the constructor a prepared
        negative for the other.
        """
        return self.denoiser.prepare(cond)


@dataclass(frozen=True)
class PairedView:
    """Views of both branches for one guided forward."""

    cond: CacheView
    negative: CacheView | None

    @property
    def prefix_tokens(self) -> int:
        """Visible cached tokens, as many in either branch."""
        return self.cond.prefix_tokens


class PairedCache:
    """Caches of the conditional and the negative branch, moved in step; `negative` is None without
    guidance.
    """

    def __init__(self, cond: KVCache, negative: KVCache | None = None) -> None:
        self.cond, self.negative = cond, negative

    @property
    def num_tokens(self) -> int:
        """Committed tokens of either branch."""
        return self.cond.num_tokens

    @property
    def num_chunks(self) -> int:
        """Committed chunks of either branch."""
        return self.cond.num_chunks

    @property
    def branches(self) -> tuple[KVCache, ...]:
        """The caches that exist."""
        return (self.cond,) if self.negative is None else (self.cond, self.negative)

    def append(
        self,
        visible: Sequence[int] | None = None,
        *,
        observers: Sequence[Observer | None] = (),
        as_id: int | None = None,
    ) -> PairedView:
        """As `KVCache.append`, for both."""
        given = observers or (None, None)
        views = [
            c.append(visible, observers=(o,), as_id=as_id)
            for c, o in zip(self.branches, given, strict=False)
        ]
        return PairedView(views[0], views[1] if len(views) > 1 else None)

    def readonly(
        self,
        num_chunks: int | None = None,
        *,
        visible: Sequence[int] | None = None,
        transient: bool = False,
    ) -> PairedView:
        """As `KVCache.readonly`, for both."""
        views = [
            branch.readonly(num_chunks, visible=visible, transient=transient)
            for branch in self.branches
        ]
        return PairedView(views[0], views[1] if len(views) > 1 else None)

    def reset(self, free_buffers: bool = True) -> None:
        """As `KVCache.reset`, for both."""
        for branch in self.branches:
            branch.reset(free_buffers)
