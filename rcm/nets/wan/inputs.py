"""What a forward of `WanDiT` is given: whether it fits, and the extra channels of its frames."""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.nets.condition import Condition
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
) -> None:
    """Raise `ValueError` for inputs of `WanDiT.forward` that do not fit each other or `config`."""
    batch = x.shape[0]
    extra = 0 if cond.concat is None else cond.concat.shape[1]
    if x.dim() != 5 or x.shape[1] + extra != config.in_dim:
        raise ValueError(
            f"x must be [B, C, F, H, W] with C + {extra} concat channels = in_dim"
            f" {config.in_dim}, got {tuple(x.shape)}"
        )
    grid = config.token_grid(x.shape[3], x.shape[4])
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
    if cond.batch != batch:
        raise ValueError(
            f"condition has batch {cond.batch}, x has {batch}; use cond.expand({batch})"
        )
    if cond.text.shape[1] > config.text_len or cond.text.shape[2] != config.text_dim:
        raise ValueError(
            f"text must be [B, <= {config.text_len}, {config.text_dim}], got"
            f" {tuple(cond.text.shape)}"
        )
    if (cond.image is not None) != config.image_branch:
        raise ValueError(
            f"image tokens are {'given' if cond.image is not None else 'missing'}, but"
            f" net.image_branch={config.image_branch}"
        )
    if cond.image is not None and config.image_positions not in (0, cond.image.shape[1]):
        raise ValueError(
            f"net.image_positions={config.image_positions}, but {cond.image.shape[1]} image"
            " tokens are given"
        )


def concat_frames(concat: Tensor, layout: TokenLayout) -> Tensor:
    """Extra channels for the packed frames: as they are when the counts agree, else those at the
    frames' temporal positions, run by run.
    """
    if concat.shape[2] == layout.num_frames:
        return concat
    if max(layout.frame_index) >= concat.shape[2]:
        raise ValueError(
            f"concat has {concat.shape[2]} frames, the layout needs position"
            f" {max(layout.frame_index)}; give one per input frame, or the whole video"
        )
    runs: list[list[int]] = []
    for position in layout.frame_index:
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return torch.cat([concat[:, :, start:stop] for start, stop in runs], dim=2)
