"""The Wan diffusion transformer: one forward for every `TokenLayout`. docs/reference/wan.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.kernels.flash_jvp.api import Implementation
from rcm.kernels.fused.choice import check_setting
from rcm.nets.attention import AttentionBackend, AttentionCore, resolve
from rcm.nets.condition import Condition
from rcm.nets.gan_head import Taps
from rcm.nets.kv_view import CacheView
from rcm.nets.layers import (
    AffineLayerNorm,
    FusedLayer,
    ModulatedNorm,
    Patchify,
    PromotedLinear,
    Sinusoid,
    Unpatchify,
    accumulate_dtype,
)
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopePair, RopeTables
from rcm.nets.wan.block import ContextKV, ContextTokens, Modulation, WanBlock
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.inputs import check_cache, check_embedded, check_inputs, concat_frames
from rcm.nets.wan.two_times import SpanEmbedding

IMAGE_NORM_EPS = 1e-5


class ImageEmbedding(nn.Module):
    """CLIP tokens to network width, after a table of positions where there are two images."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        if config.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_positions, config.image_dim))
        self.proj = nn.Sequential(
            AffineLayerNorm(config.image_dim, eps=IMAGE_NORM_EPS),
            nn.Linear(config.image_dim, config.image_dim),
            nn.GELU(),
            nn.Linear(config.image_dim, config.dim),
            AffineLayerNorm(config.dim, eps=IMAGE_NORM_EPS),
        )

    def forward(self, image: Tensor) -> Tensor:
        """`image` [B, L_image, image_dim] to [B, L_image, E]."""
        return self.proj(image + self.emb_pos if hasattr(self, "emb_pos") else image)


class TimeRows(NamedTuple):
    """All that depends on the time of a pass alone: its embedding [B, F or 1, E], and the
    modulation of every block [L, B, F or 1, 6, 1, E].
    """

    embedding: Tensor
    blocks: Tensor


class Head(nn.Module):
    """Modulated norm and projection to the patch, in float32 or wider; its modulation is added to
    the time embedding itself, not the projected one.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.norm = ModulatedNorm(config.dim, eps=config.eps)
        self.head = PromotedLinear(config.dim, config.out_dim * config.patch_area)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`x` [B, F, S, E], `time` [B, F or 1, E] to [B, F, S, patch_area * out_dim], as `time`."""
        shift, scale = (self.modulation.to(time.dtype) + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(self.norm(x, shift, scale))


class WanDiT(nn.Module):
    """Wan's transformer: predicts the rectified-flow velocity v = eps - x0 of latent frames.

    `attention` is a back end of `nets/attention.py` or its name ("auto": the environment's, else
    chosen per call); `fused` says where the fused elementwise kernels run ("auto": on CUDA; see
    `rcm.kernels.fused.choice`). State-dict keys are those of the original weights, with
    `patch_embedding` stored as a linear layer on flattened patches. `enter` and `leave` (identities
    on [B, F, S, E] tokens) and `block.self_attn.core` are the places where context parallelism
    attaches from outside. Construct, then load weights or call `init_weights`.
    """

    def __init__(
        self, config: WanConfig, attention: str | AttentionBackend = "auto", *, fused: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        backend = resolve(attention)
        self.attention_backend = backend.name
        self.patchify = Patchify(config.patch[1:])
        self.patch_embedding = nn.Linear(config.in_dim * config.patch_area, config.dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.dim, config.dim),
        )
        self.sinusoid = Sinusoid(config.freq_dim)
        self.time_embedding = nn.Sequential(
            PromotedLinear(config.freq_dim, config.dim),
            nn.SiLU(),
            PromotedLinear(config.dim, config.dim),
        )
        self.time_projection = nn.Sequential(nn.SiLU(), PromotedLinear(config.dim, 6 * config.dim))
        if config.image_branch:
            self.img_emb = ImageEmbedding(config)
        self.enter = nn.Identity()
        self.blocks = nn.ModuleList(WanBlock(config, backend) for _ in range(config.num_layers))
        self.head = Head(config)
        self.leave = nn.Identity()
        self.unpatchify = Unpatchify(config.patch[1:])
        self.set_fused(fused)
        self.rope = RopeTables(
            config.head_dim, max_rows=config.max_rows, max_columns=config.max_columns
        )
        # last, so that random weights of the rest are those of the network with one time
        self.span_embedding = SpanEmbedding(config) if config.two_times else None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Condition,
        layout: TokenLayout,
        cache: CacheView | None = None,
        *,
        context_only: bool = False,
        span: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor | None | tuple[Tensor | None, tuple[Tensor, ...]]:
        """Velocity of the output frames, [B, out_dim, F_out, H, W], in float32 (float64 for
        float64).

        x          [B, C, F, H, W] packed latents in the compute dtype; with `cond.concat`, C plus
                   its channels make in_dim.
        timestep   [B, 1] or [B, F], 0..1000 (1000 = noise), any float dtype.
        cond       text (and image) condition of batch B, in the compute dtype.
        layout     what the F frames are; `cache`, a view made for this forward, holds the tokens
                   that the layout expects before them.
        context_only   the pass is for the cache alone: nothing is returned, and nothing computed
                       behind the keys of the last block.
        span       shape and scale of `timestep`, for a network with `two_times`: how far below it
                   the frames' second time lies, up to where the velocity is a mean. None: 0.
        Raises `ValueError` for shapes that do not fit each other, the configuration or the cache.
        """
        check_inputs(self.config, x, timestep, cond, layout, span=span, taps=taps)
        if cache is None and max(layout.frame_index) >= self.config.max_frames:
            raise ValueError(
                f"a whole video of {max(layout.frame_index) + 1} latent frames is longer than"
                f" WanConfig.max_frames={self.config.max_frames}; shorten it, or stream it over a"
                " cache, which has no limit"
            )
        if cache is not None:
            check_cache(self.config, cache)
            cache.begin(layout)
        elif layout.context_tokens or context_only:
            raise ValueError(
                f"the layout expects {layout.context_tokens} cached tokens; pass cache="
            )
        if cond.concat is not None:
            x = torch.cat([x, concat_frames(cond.concat, layout)], dim=1)
        if cache is not None and cache.times is not None:
            time = cache.times.embedding
            rows = [Modulation(*known.unbind(2)) for known in cache.times.blocks]
        else:
            time = self._time(timestep, span, accumulate_dtype(x.dtype))
            rows = [self.time_projection(time).unflatten(2, (6, -1))] * len(self.blocks)
        contexts = self._contexts(cond)
        tokens = self.enter(self.patch_embedding(self.patchify(x)))
        rope = self._rope_pair(layout, cache, device=x.device, dtype=time.dtype)
        last, tapped = len(self.blocks) - 1, []
        for i, block in enumerate(self.blocks):
            view = None if cache is None else cache.layer(i)
            keys_only = context_only and i == last
            tokens = block(tokens, rows[i], contexts[i], layout, rope, view, keys_only=keys_only)
            if taps is not None and i in taps.blocks:
                tapped.append(tokens)
                if taps.alone and i == taps.blocks[-1]:
                    return None, tuple(tapped)
        if cache is not None:
            cache.commit(layout)
        if context_only:
            return None
        start, stop = layout.output
        time = time if time.shape[1] == 1 else time[:, start:stop]
        v = self.unpatchify(self.leave(self.head(tokens[:, start:stop], time)), layout.grid)
        return v if taps is None else (v, tuple(tapped))

    @torch.no_grad()
    def prepare(self, cond: Condition) -> Condition:
        """`cond` with cross-attention keys and values, for gradient-free passes of this net.
        `ValueError` for one that is not of its sizes.
        """
        check_embedded(self.config, cond)
        tokens = self._embed(cond)
        made = (cast(WanBlock, block).cross_attn.keys_values(tokens) for block in self.blocks)
        return replace(cond, prepared=tuple(made))

    def join_projections(self) -> None:
        """See `SelfAttention.join`, for every block."""
        for block in self.blocks:
            cast(WanBlock, block).self_attn.join()

    @torch.no_grad()
    def time_rows(
        self, timestep: Tensor, *, dtype: torch.dtype, span: Tensor | None = None
    ) -> TimeRows:
        """All that `timestep` and `span` alone decide, in dtype `dtype`; not if sharded."""
        time = self._time(timestep, span, accumulate_dtype(dtype))
        rows = self.time_projection(time).unflatten(2, (6, -1))
        made = [torch.stack(cast(WanBlock, block).modulate(rows), dim=2) for block in self.blocks]
        return TimeRows(time, torch.stack(made))

    def set_jvp_implementation(self, name: Implementation | Literal["auto"]) -> None:
        """Choose tangent attention: "reference", "triton", "auto" (`AttentionCore`)."""
        for module in self.modules():
            if isinstance(module, AttentionCore):
                module.jvp_implementation = name

    def set_fused(self, name: str) -> None:
        """Where fused layers run: "auto", "on" or "off"; `ConfigError` for others."""
        self.fused = check_setting(name)
        for module in self.modules():
            if isinstance(module, FusedLayer):
                module.fused = name

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise in place: Xavier-uniform linears with zero bias, N(0, 0.02^2) text and time
        embeddings and time projection, N(0, 1/E) modulation, zero output head.

        Draws are float32 on the generator's device, then copied, so weights do not depend on where
        the network lives. docs/reference/wan.md#random-weights.
        """
        device = torch.device("cpu") if generator is None else generator.device
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                embeds = name.startswith(
                    ("text_embedding", "time_embedding", "time_projection", "span_embedding")
                )
                std = 0.02 if embeds else (2.0 / (fan_in + fan_out)) ** 0.5
                draw = torch.randn if embeds else _centred_uniform
                values = draw(module.weight.shape, generator=generator, device=device)
                module.weight.copy_(std * values)
                module.bias.zero_()
            elif isinstance(module, ImageEmbedding) and self.config.image_positions:
                draws = torch.randn(module.emb_pos.shape, generator=generator, device=device)
                module.emb_pos.copy_(0.02 * draws)
            elif isinstance(module, (WanBlock, Head)):
                draws = torch.randn(module.modulation.shape, generator=generator, device=device)
                module.modulation.copy_(draws * self.config.dim**-0.5)
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                module.weight.fill_(1.0)
                if isinstance(getattr(module, "bias", None), nn.Parameter):
                    module.bias.zero_()
        self.head.head.weight.zero_()
        if self.span_embedding is not None:
            self.span_embedding.last.weight.zero_()

    def _time(self, timestep: Tensor, span: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Time embedding [B, F or 1, E]."""
        time = self.time_embedding(self.sinusoid(timestep, dtype))
        if self.span_embedding is None:
            return time
        span = torch.zeros_like(timestep) if span is None else span
        return time + self.span_embedding(self.sinusoid(span, dtype))

    def _embed(self, cond: Condition) -> ContextTokens:
        missing = self.config.text_len - cond.text.shape[1]
        text = F.pad(cond.text, (0, 0, 0, missing)) if missing else cond.text
        return ContextTokens(
            self.text_embedding(text),
            self.img_emb(cond.image) if self.config.image_branch else None,
        )

    def _contexts(self, cond: Condition) -> tuple[ContextTokens | ContextKV, ...]:
        if cond.prepared is None:
            return (self._embed(cond),) * len(self.blocks)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a prepared condition carries no gradient to the cross-attention; pass the plain"
                " condition, or use torch.no_grad"
            )
        return cond.prepared

    def _rope_pair(
        self,
        layout: TokenLayout,
        cache: CacheView | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> RopePair:
        if cache is not None and cache.tables is not None:
            return cache.tables
        query = self.rope.table(layout.frame_index, layout.grid, device=device, dtype=dtype)
        if cache is None or cache.keys == "post_rope":
            return RopePair(query, query)
        return RopePair(query, self.rope.at(cache.positions(layout), device=device, dtype=dtype))


def _centred_uniform(
    shape: torch.Size, *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Uniform with mean 0 and variance 1."""
    return (torch.rand(shape, generator=generator, device=device) - 0.5) * 12**0.5
