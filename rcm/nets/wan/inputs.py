"""What a forward of `WanDiT` is given: whether it fits, and the extra channels of its frames."""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.gan_head import Taps
from rcm.nets.kv_view import CacheView
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.config import WanConfig


def check_inputs(
    config: WanConfig,
    x: Tensor,
    timestep: Tensor,
    cond: Condition,
    layout: TokenLayout,
    *,
    span: Tensor | None,
    taps: Taps | None = None,
) -> None:
    """Raise `ValueError` for inputs of `WanDiT.forward` that do not fit each other or `config`."""
    extra = 0 if cond.concat is None else cond.concat.shape[1]
    if x.dim() != 5 or x.shape[0] < 1 or x.shape[1] + extra != config.in_dim:
        raise ValueError(
            f"x must be [B >= 1, C, F, H, W] with C + {extra} concat channels = in_dim"
            f" {config.in_dim}, got {tuple(x.shape)}"
        )
    batch, grid = x.shape[0], config.token_grid(x.shape[3], x.shape[4])
    if (x.shape[2], grid) != (layout.num_frames, layout.grid):
        raise ValueError(
            f"x has {x.shape[2]} frames of {grid} tokens, the layout describes"
            f" {layout.num_frames} of {layout.grid}"
        )
    if tuple(timestep.shape) not in ((batch, 1), (batch, layout.num_frames)):
        raise ValueError(
            f"timestep must be [{batch}, 1] or [{batch}, {layout.num_frames}], got"
            f" {tuple(timestep.shape)}"
        )
    if not timestep.is_floating_point():
        raise ValueError(f"timestep must be floating (0..1000), got {timestep.dtype}")
    if span is not None and not config.two_times:
        raise ValueError("a span was given to a network of one time; set net.two_times=True")
    if span is not None and span.shape != timestep.shape:
        raise ValueError(
            f"span must have the shape of timestep, {tuple(timestep.shape)}, got"
            f" {tuple(span.shape)}"
        )
    if taps is not None:
        blocks = range(config.num_layers)
        if not taps.blocks or [i for i in blocks if i in taps.blocks] != list(taps.blocks):
            raise ValueError(
                f"taps {tuple(taps.blocks)} must be blocks of 0 to {len(blocks) - 1}, rising"
            )
    _check_condition(config, x, cond)


def _check_condition(config: WanConfig, x: Tensor, cond: Condition) -> None:
    batch, text, concat, image = x.shape[0], cond.text, cond.concat, cond.image
    if cond.batch != batch:
        raise ValueError(
            f"condition has batch {cond.batch}, x has {batch}; use cond.expand({batch})"
        )
    check_embedded(config, cond)
    # what has one row would serve all samples unseen
    if concat is not None and (
        concat.dim() != 5 or (len(concat), *concat.shape[3:]) != (batch, *x.shape[3:])
    ):
        raise ValueError(
            f"concat must be [{batch}, C, T, {x.shape[3]}, {x.shape[4]}] beside x of shape"
            f" {tuple(x.shape)}, got {tuple(concat.shape)}"
        )
    for name, given in (("text", text), ("concat", concat), ("image", image)):
        if given is not None and given.dtype != x.dtype:
            raise ValueError(f"{name} is {given.dtype}, x {x.dtype}; cast both alike")
    if cond.prepared is not None:
        rows, blocks = cond.prepared[0].text[0].shape[0], len(cond.prepared)
        if (rows, blocks) != (batch, config.num_layers):
            raise ValueError(
                f"the condition was prepared for {rows} samples by a network of {blocks} blocks,"
                f" x has {batch}, this network {config.num_layers}; prepare() it with this one"
            )


def check_embedded(config: WanConfig, cond: Condition) -> None:
    """Raise `ValueError` for text or image tokens that are not of the network's sizes."""
    batch, text, image = cond.batch, cond.text, cond.image
    if text.dim() != 3 or text.shape[1] > config.text_len or text.shape[2] != config.text_dim:
        raise ValueError(
            f"text must be [B, <= {config.text_len}, {config.text_dim}], got {tuple(text.shape)}"
        )
    if (image is not None) != config.image_branch:  # a pipeline's choice of files
        raise ConfigError(
            f"image tokens are {'given' if image is not None else 'missing'}, but"
            f" net.image_branch={config.image_branch}"
        )
    if image is not None and (
        image.dim() != 3 or (len(image), image.shape[2]) != (batch, config.image_dim)
    ):
        raise ValueError(
            f"image tokens must be [{batch}, L, {config.image_dim}], got {tuple(image.shape)}"
        )
    if image is not None and config.image_positions not in (0, image.shape[1]):
        raise ValueError(
            f"net.image_positions={config.image_positions}, but {image.shape[1]} image tokens are"
            " given"
        )


def check_cache(config: WanConfig, cache: CacheView) -> None:
    """Raise `ValueError` for a view of another network's cache, `TypeError` for a cache itself."""
    if not hasattr(cache, "begin"):
        raise TypeError(
            f"cache must be a view made for this forward, of append() or readonly(), got a"
            f" {type(cache).__name__}"
        )
    if cache.num_layers != config.num_layers:
        raise ValueError(
            f"the cache has {cache.num_layers} layers, the network {config.num_layers} blocks; make"
            " it with the network's own new_cache()"
        )


def concat_frames(concat: Tensor, layout: TokenLayout) -> Tensor:
    """Extra channels for the packed frames: as they are when the counts agree, else those at the
    frames' temporal positions, run by run.
    """
    if concat.shape[2] == layout.num_frames:
        return concat
    if outside := [i for i in layout.frame_index if not 0 <= i < concat.shape[2]]:
        raise ValueError(
            f"concat has {concat.shape[2]} frames, the layout needs position {outside[-1]}; give"
            " one per input frame, or the whole video"
        )
    runs: list[list[int]] = []
    for position in layout.frame_index:
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return torch.cat([concat[:, :, start:stop] for start, stop in runs], dim=2)
