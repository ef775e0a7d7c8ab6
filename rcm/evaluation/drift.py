"""Drift of a long video: numbers of windows, against the first window, and their trend.

Windows are read one by one, so any length needs the memory of one. Features are optional.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError
from rcm.evaluation import metrics_pixels as pixels
from rcm.evaluation.metrics_features import FrameFeatures


@dataclass(frozen=True)
class DriftWindow:
    """One window: its first frame, number of frames, and the numbers of `SERIES`. `tint` and
    `embedding_distance` (None without features) are distances to the first window.
    """

    start: int
    num_frames: int
    motion: float
    flicker: float
    sharpness: float
    detail: float
    noise: float
    brightness: float
    contrast: float
    tint: float
    embedding_distance: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SERIES = tuple(field.name for field in fields(DriftWindow))[2:]
"""Names of the numbers of a window."""


def windows_of(
    frames: Iterable[Tensor], *, size: int, hop: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first frame, clip [size, 3, H, W] in [0, 1]) from pieces of a stream: uint8 [H, W, 3]
    frames, or chunks [3, f, H, W] in [-1, 1].

    `hop` frames apart (default: end to end); what is left at the end and shorter than `size` is not
    a window.
    """
    if size < 3 or (hop is not None and hop < 1):
        raise ConfigError(
            f"a drift window needs at least 3 frames and a positive hop, got {size} and {hop}"
        )
    kept: list[Tensor] = []
    start, skip = 0, 0
    for frame in (frame for piece in frames for frame in _single(piece)):
        if skip:
            skip -= 1
            continue
        kept.append(frame)
        if len(kept) == size:
            yield start, torch.stack(kept)
            step = hop or size
            kept, skip = kept[step:], max(0, step - size)
            start += step


def measure_drift(
    windows: Iterable[tuple[int, Tensor]], *, features: FrameFeatures | None = None, stride: int = 4
) -> list[DriftWindow]:
    """The numbers of every window; `features` embeds every `stride`-th frame."""
    found: list[DriftWindow] = []
    first_tint, first_embedding = None, None
    for start, clip in windows:
        colours = pixels.colour(clip).mean(0)
        first_tint, distance = colours[2:] if first_tint is None else first_tint, None
        if features is not None:
            embedding = functional.normalize(features(clip[::stride]).mean(0), dim=0)
            first_embedding = embedding if first_embedding is None else first_embedding
            distance = float((1 - embedding @ first_embedding).clamp_min(0))
        found.append(
            DriftWindow(
                start=start,
                num_frames=clip.shape[0],
                motion=float(pixels.differences(clip).mean()),
                flicker=float(pixels.flicker(clip).mean()),
                sharpness=float(pixels.sharpness(clip).mean()),
                detail=float(pixels.detail(clip).mean()),
                noise=float(pixels.noise(clip).mean()),
                brightness=float(colours[0]),
                contrast=float(colours[1]),
                tint=float((colours[2:] - first_tint).norm()),
                embedding_distance=distance,
            )
        )
    if not found:
        raise ConfigError("the video is shorter than one drift window; choose a smaller window")
    return found


def series(windows: Sequence[DriftWindow], name: str) -> list[tuple[float, float]]:
    """(first frame, value) of one number, for a chart; empty where it was not measured."""
    if name not in SERIES:
        raise ConfigError(f"no drift series {name!r}; there are {', '.join(SERIES)}")
    return [(float(w.start), getattr(w, name)) for w in windows if getattr(w, name) is not None]


def slope(windows: Sequence[DriftWindow], name: str) -> float:
    """Least-squares change of one number per 1000 frames; 0 for a single window."""
    points = series(windows, name)
    if len(points) < 2:
        return 0.0
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    x = x - x.mean()
    return float(1000 * (x * (y - y.mean())).sum() / x.square().sum())


def summary(windows: Sequence[DriftWindow]) -> dict[str, dict[str, float]]:
    """Series -> its first and last value, furthest departure, and slope per 1000 frames."""
    found = {}
    for name in SERIES:
        values = [value for _, value in series(windows, name)]
        if values:
            furthest = max(values, key=lambda value: abs(value - values[0])) - values[0]
            found[name] = {
                "first": values[0],
                "last": values[-1],
                "furthest": furthest,
                "slope": slope(windows, name),
            }
    return found


def _single(piece: Tensor) -> Iterator[Tensor]:
    """Frames [3, H, W] in [0, 1] of a frame or a chunk."""
    if piece.ndim == 3 and piece.shape[-1] == 3 and piece.dtype == torch.uint8:
        yield piece.permute(2, 0, 1).float() / 255
    elif piece.ndim == 4 and piece.shape[0] == 3:
        yield from ((piece.float().clamp(-1, 1) + 1) / 2).unbind(1)
    else:
        raise ConfigError(
            f"frames are uint8 [H, W, 3] or [3, f, H, W] in [-1, 1], got {piece.dtype}"
            f" {list(piece.shape)}"
        )
