"""Reading a scene back from pixels, without learned parts: colour, shape, position, motion.

Shape legend: N videos, S shapes per video, F frames, K colours, M shape kinds, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.worlds.toy_world import ToyWorld

_FLOOR = 0.15  # amplitude, relative to a clean shape, below which a pixel counts as background
_RENDER_BATCH = 64


@dataclass(frozen=True)
class Factors:
    """What a video shows, float32 unless said otherwise.

    `colour`, `shape` int64 [N, S], the S colours with most mass and the best template of each;
    `purity` [N, S], the colour's share of the coloured mass (1 / S each in a clean video); `rgb`
    [N, S, 3], mean pixel offset from the background inside the shape; `area` [N, S, F] pixels;
    `fits` [N, S, M] and `fit` [N, S, F], explained share of the mask (1 is perfect, 0 is nothing)
    per template, and of the best one per frame; `centre` [N, S, F, 2] inside the frame; `step` [N,
    S, F - 1, 2], shortest displacement between frames.
    """

    colour: Tensor
    shape: Tensor
    purity: Tensor
    rgb: Tensor
    area: Tensor
    fits: Tensor
    fit: Tensor
    centre: Tensor
    step: Tensor


class FactorReader:
    """Estimates `Factors` of videos of one world; frames need not be as many as the world's."""

    def __init__(self, world: ToyWorld) -> None:
        self.world = world
        size = torch.tensor([world.config.width, world.config.height], dtype=torch.float32)
        kinds = world.config.shapes
        middle = (size / 2).expand(len(kinds), 2)
        masks = torch.stack(
            [world.coverage(c, kind) for c, kind in zip(middle, kinds, strict=True)]
        )
        self._size = size
        # a triangle's centroid is not its centre on a circle
        self._bias = _wrapped(_circular_centroid(masks) - middle, size)

    def read(self, videos: Tensor) -> Factors:
        """`Factors` of pixels [N, 3, F, H, W] in [-1, 1]; noise just fits nothing. `ConfigError`
        for another size or type than the world's, and for pixels that are not finite.
        """
        size = (self.world.config.height, self.world.config.width)
        like = videos.ndim == 5 and videos.shape[1] == 3 and videos.shape[3:] == size
        if not like or not videos.is_floating_point():
            raise ConfigError(
                f"videos of this world are floats [N, 3, F, {size[0]}, {size[1]}] in [-1, 1], got"
                f" {videos.dtype} {list(videos.shape)}"
            )
        if not videos.isfinite().all():
            raise ConfigError("the videos hold NaN or infinite pixels; they cannot be judged")
        parts = [self._read(part.float()) for part in videos.split(_RENDER_BATCH)]
        names = (field.name for field in fields(Factors))
        return Factors(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})

    def _read(self, videos: Tensor) -> Factors:
        offset = videos - self.world.config.background
        amplitude = self._unmix(offset)
        mass = amplitude.sum(dim=(2, 3, 4))
        top = mass.topk(self.world.config.num_shapes, dim=1).indices.sort(dim=1).values
        mask = amplitude.gather(
            1, top.view(*top.shape, 1, 1, 1).expand(-1, -1, *amplitude.shape[2:])
        )
        purity = mass.gather(1, top) / mass.sum(dim=1, keepdim=True).clamp(min=1e-6)
        weight = mask.unsqueeze(2)
        rgb = (weight * offset.unsqueeze(1)).sum(dim=(3, 4, 5)) / weight.square().sum(
            dim=(3, 4, 5)
        ).clamp(min=1e-6)
        centres, fits = self._match(mask)
        best = fits.mean(dim=3).argmax(dim=2)
        pick = best[:, :, None, None]
        fit = fits.gather(2, pick.expand(-1, -1, 1, fits.shape[3])).squeeze(2)
        centre = centres.gather(
            2, pick.unsqueeze(-1).expand(-1, -1, 1, *centres.shape[3:])
        ).squeeze(2)
        return Factors(
            top,
            best,
            purity,
            rgb,
            mask.sum(dim=(3, 4)),
            fits.mean(dim=3),
            fit,
            centre,
            self._steps(centre),
        )

    def _unmix(self, offset: Tensor) -> Tensor:
        """Amplitude [N, K, F, H, W] of each pixel along the palette colour nearest to it."""
        paint = self.world.palette.to(offset) - self.world.config.background
        along = torch.einsum("ncfhw,kc->nkfhw", offset, paint)
        length = paint.square().sum(dim=1).view(1, -1, 1, 1, 1)
        winner = (along / length.sqrt()).argmax(dim=1, keepdim=True)
        amplitude = (along / length).clamp(0, 1.5)
        keep = torch.zeros_like(amplitude, dtype=torch.bool).scatter_(1, winner, True) & (
            amplitude > _FLOOR
        )
        return amplitude * keep

    def _match(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Centres [N, S, M, F, 2] and fits [N, S, M, F] of masks [N, S, F, H, W]."""
        centroid, centres, fits = _circular_centroid(mask), [], []
        for kind, bias in zip(self.world.config.shapes, self._bias, strict=True):
            centre = (centroid - bias) % self._size
            template = self.world.coverage(centre, kind)
            missed = (mask - template).square().sum(dim=(3, 4)) / template.square().sum(
                dim=(3, 4)
            ).clamp(min=1e-6)
            centres.append(centre)
            fits.append((1 - missed).clamp(min=0))
        return torch.stack(centres, dim=2), torch.stack(fits, dim=2)

    def _steps(self, centre: Tensor) -> Tensor:
        step = centre.diff(dim=2)
        return _wrapped(step, self._size) if self.world.config.boundary == "wrap" else step


def _circular_centroid(mask: Tensor) -> Tensor:
    """Centroid (x, y) of masks [..., H, W] on a torus: phase of each marginal's first harmonic."""
    out = []
    for marginal in (mask.sum(dim=-2), mask.sum(dim=-1)):
        size = marginal.shape[-1]
        angle = 2 * math.pi * (torch.arange(size, dtype=mask.dtype) + 0.5) / size
        phase = torch.atan2((marginal * angle.sin()).sum(-1), (marginal * angle.cos()).sum(-1))
        out.append(phase * size / (2 * math.pi) % size)
    return torch.stack(out, dim=-1)


def _wrapped(step: Tensor, size: Tensor) -> Tensor:
    """Shortest displacement on a torus."""
    return (step + size / 2) % size - size / 2
