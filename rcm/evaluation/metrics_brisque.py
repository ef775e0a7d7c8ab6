"""BRISQUE, quality of a frame without reference (Mittal, Moorthy and Bovik 2012): statistics of
locally normalised brightness, and the support vector regression that the package `brisque` ships.
Computed here from its two data files; the package itself is not imported.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError
from rcm.evaluation.metrics_pixels import luma
from rcm.evaluation.metrics_weights import packaged_file
from rcm.storage.inert_pickle import read_inert

PACKAGE = "brisque"
_WINDOW, _SIGMA = 7, 7 / 6
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
MIN_SIDE = 32
"""Pixels: statistics of smaller frames mean nothing."""


class Brisque:
    """The regression, read once. Scores go from about 0 (natural) to 100 (distorted)."""

    def __init__(self) -> None:
        self._low, self._high = (torch.tensor(values, dtype=torch.float64) for values in _ranges())
        self._gamma, self._rho, self._weights, self._vectors = _support_vectors()

    def __call__(self, clip: Tensor, *, every: int = 8) -> Tensor:
        """Scores of each `every`-th frame of a clip [F, 3, H, W] in [0, 1]."""
        if min(clip.shape[2:]) < MIN_SIDE:
            raise ConfigError(
                f"BRISQUE needs frames of at least {MIN_SIDE} pixels a side, got"
                f" {clip.shape[2]}x{clip.shape[3]}"
            )
        features = brisque_features(luma(clip[::every]).double())
        scaled = 2 * (features - self._low) / (self._high - self._low) - 1
        kernel = torch.exp(-self._gamma * torch.cdist(scaled, self._vectors).square())
        return (kernel @ self._weights - self._rho).float()


def brisque_features(grey: Tensor) -> Tensor:
    """The 36 features [F, 36] of brightness [F, H, W] in [0, 1]: 18 at full size, 18 at half."""
    half = functional.interpolate(
        grey[:, None], scale_factor=0.5, mode="bicubic", align_corners=False
    )[:, 0]
    return torch.cat([_statistics(grey), _statistics(half)], dim=1)


def _statistics(grey: Tensor) -> Tensor:
    normal = _normalised(grey)
    shape, _, left, right = _asymmetric_fit(normal.flatten(1))
    parts = [shape, (left.square() + right.square()) / 2]
    height, width = normal.shape[1:]
    for down, across in _SHIFTS:
        a = normal[:, : height - down, max(0, -across) : width - max(0, across)]
        b = normal[:, down:, max(0, across) : width + min(0, across)]
        shape, mean, left, right = _asymmetric_fit((a * b).flatten(1))
        parts += [shape, mean, left.square(), right.square()]
    return torch.stack(parts, dim=1)


def _normalised(grey: Tensor) -> Tensor:
    """(x - local mean) / (local deviation + 1/255), Gaussian window of 7, zeros outside."""
    axis = torch.arange(_WINDOW, dtype=grey.dtype) - _WINDOW // 2
    line = torch.exp(-axis.square() / (2 * _SIGMA**2))
    kernel = (line[:, None] * line)[None, None] / line.sum().square()
    mean = functional.conv2d(grey[:, None], kernel, padding=_WINDOW // 2)
    square = functional.conv2d(grey[:, None].square(), kernel, padding=_WINDOW // 2)
    return ((grey[:, None] - mean) / ((mean.square() - square).abs().sqrt() + 1 / 255))[:, 0]


def _asymmetric_fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, mean, left and right deviation of an asymmetric Gaussian, for rows of [F, N]."""
    left, right = (_root_mean_square(x, part) for part in (x < 0, x >= 0))
    gamma = left / right
    moment = x.abs().mean(1).square() / x.square().mean(1).clamp_min(1e-12)
    wanted = moment * (gamma**3 + 1) * (gamma + 1) / (gamma.square() + 1).square()
    shapes, ratios = _shape_table()
    shape = shapes[(ratios - wanted[:, None]).abs().argmin(1)]
    log = torch.lgamma
    scale = torch.exp((log(1 / shape) - log(3 / shape)) / 2)
    mean = (right - left) * scale * torch.exp(log(2 / shape) - log(1 / shape))
    return shape, mean, left, right


def _root_mean_square(x: Tensor, part: Tensor) -> Tensor:
    return ((x.square() * part).sum(1) / part.sum(1).clamp_min(1)).sqrt().clamp_min(1e-6)


@cache
def _shape_table() -> tuple[Tensor, Tensor]:
    """Shapes 0.05 to 10 and the ratio of moments that each has."""
    shapes = torch.arange(0.05, 10.0, 0.0005, dtype=torch.float64)
    return shapes, torch.exp(
        2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)
    )


def _ranges() -> tuple[list[float], list[float]]:
    """Least and greatest value of every feature, from a pickle of plain numbers."""
    with packaged_file(PACKAGE, "brisque/models/normalize.pickle").open("rb") as stream:
        held = read_inert(stream, names=())
    return held["min_"], held["max_"]


def _support_vectors() -> tuple[float, float, Tensor, Tensor]:
    """gamma, rho, coefficients [N], vectors [N, 36] of libsvm's text format."""
    head, _, body = packaged_file(PACKAGE, "brisque/models/svm.txt").read_text().partition("\nSV\n")
    fields = dict(line.split(maxsplit=1) for line in head.splitlines())
    rows = [line.split() for line in body.splitlines() if line.strip()]
    vectors = torch.zeros(len(rows), 36, dtype=torch.float64)
    for i, row in enumerate(rows):
        for entry in row[1:]:
            index, value = entry.split(":")
            vectors[i, int(index) - 1] = float(value)
    weights = torch.tensor([float(row[0]) for row in rows], dtype=torch.float64)
    return float(fields["gamma"]), float(fields["rho"]), weights, vectors
