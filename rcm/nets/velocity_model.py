"""What objectives, samplers and rollouts ask of a model, whatever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.diffusion.wan_as_trigflow import rf_point, trig_F
from rcm.nets.condition import Condition
from rcm.nets.kv_coded import KVCodec
from rcm.nets.kv_view import Attention, Keys
from rcm.nets.layout import TokenLayout
from rcm.nets.paired_cache import Cache, Past, View
from rcm.nets.rope import RopeTables


class VelocityModel(ABC):
    """What objectives and samplers need of a denoiser; `velocity` is its only primitive. Methods
    that raise here need a network: see `rcm.nets.denoiser.Denoiser`.
    """

    @abstractmethod
    def velocity(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: Past = None
    ) -> Tensor:
        """RF velocity v = eps - x0 of the output frames of `layout`, [B, C, F_out, H, W].

        `x` [B, C, F, H, W] any float dtype; `t` RF time in [0, 1], float64 [B, 1] or [B, F];
        `cache` a fresh view of `new_cache`'s cache. Returns the dtype of `x`, at least float32.
        """

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
        """Mean u of the velocity along the ODE from `t` down to `s`, x_s = x_t - (t - s) u, of a
        model with two times (arXiv 2505.13447); at s = t its `velocity`. `s` has the shape of `t`,
        the rest is as in `velocity`. `ConfigError` for a model of one time.
        """
        raise ConfigError(
            "this model has one time: it knows no mean velocity between two; train one with"
            " training_type=tf_meanflow"
        )

    def enter_context(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: View
    ) -> None:
        """The pass of `velocity` for `cache` alone; a model skips what that does not need."""
        self.velocity(x, t, cond, layout, cache=cache)

    def trig_F(
        self,
        x_tau: Tensor,
        tau: Tensor,
        cond: Condition,
        layout: TokenLayout,
        *,
        cache: Past = None,
    ) -> Tensor:
        """TrigFlow F of all frames at `x_tau` [B, C, F, H, W], `tau` in [0, pi/2] like `t`.

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
    ) -> Cache:
        """An empty cache with room for `num_frames` frames of `grid` = (h, w) tokens; `codec`
        stores chunks quantised, except the newest `hot_chunks`. `attention="fp8"`: passes attend to
        it in FP8; `ConfigError` where that cannot be.
        """
        raise self._unsaid("new_cache")

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) of a latent frame; `ConfigError` if the patch does not divide it."""
        raise self._unsaid("token_grid")

    @property
    def rope(self) -> RopeTables:
        """The network's rotary tables."""
        raise self._unsaid("rope")

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes in."""
        raise self._unsaid("compute_dtype")

    @property
    def fused(self) -> str:
        """Where the network's fused layers run: "auto", "on" or "off"."""
        raise self._unsaid("fused")

    def prepare(self, cond: Condition) -> Condition:
        """`cond` with all that only the prompt decides computed, for gradient-free passes."""
        raise self._unsaid("prepare")

    def join_projections(self) -> None:
        """Lay weights so that captured passes need fewer products, where the model can."""
        return

    def time_rows(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """What the passes at RF time `t`, float64 [B, 1], make of it alone; None if every pass
        makes it anew. With `s`: those of `mean_velocity`.
        """
        return None

    @property
    def group(self) -> Any:
        """The process group of the ranks that compute each forward together, None for one rank."""
        return None

    @property
    def num_ranks(self) -> int:
        """Ranks that compute each forward together."""
        return 1 if self.group is None else self.group.size()

    def _unsaid(self, what: str) -> NotImplementedError:
        # not abstract: a model that only trains, or only streams, need not have all of them
        return NotImplementedError(
            f"{type(self).__name__} has no `{what}`, which this use of a model needs; see"
            " docs/extending.md, 'A backbone'"
        )
