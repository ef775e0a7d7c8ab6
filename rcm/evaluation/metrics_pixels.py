"""What pixel arithmetic tells of a clip: motion, flicker, jumps, sharpness, noise, colour.

A clip is float32 [F, 3, H, W] in [0, 1], F >= 2. Series have a value per frame or per pair of
neighbours; `rcm.evaluation.metrics_suite` says in which sense a number is worse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)
_SMALL = 48  # side that frames are shrunk to where all pairs of frames are compared
_MIN_LAG = 4  # frames apart that a repeat must be; nearer ones are alike in any slow clip
_FLOOR = 1e-4  # a fortieth of a grey level: differences below are numerical


def clip_of(video: Tensor) -> Tensor:
    """A clip from finite pixels [3, F, H, W] in [-1, 1] of two frames or more, or `ConfigError`."""
    if video.ndim != 4 or video.shape[0] != 3 or not video.is_floating_point():
        raise ConfigError(
            f"a video is floats [3, F, H, W] in [-1, 1], got {video.dtype} {list(video.shape)}"
        )
    if video.shape[1] < 2:
        raise ConfigError(
            f"a video of {video.shape[1]} frame(s) has no motion to judge; at least 2 are needed"
        )
    if not bool(torch.isfinite(video).all()):
        raise ConfigError("the video holds NaN or infinite pixels; it cannot be judged")
    return ((video.float().clamp(-1, 1) + 1) / 2).permute(1, 0, 2, 3).contiguous()


def luma(clip: Tensor) -> Tensor:
    """Brightness [F, H, W]."""
    weights = clip.new_tensor(LUMA)[:, None, None]
    return (clip * weights).sum(1)


def differences(clip: Tensor) -> Tensor:
    """Mean absolute difference of neighbours [F - 1]; VBench's temporal_flickering is 1 - mean."""
    return torch.stack([(b - a).abs().mean() for a, b in zip(clip[:-1], clip[1:], strict=True)])


def flicker(clip: Tensor) -> Tensor:
    """Absolute second difference of the mean brightness [F - 2]; a steady fade has none."""
    mean = luma(clip).mean((1, 2))
    return (mean[2:] - 2 * mean[1:-1] + mean[:-2]).abs()


def unevenness(clip: Tensor) -> Tensor:
    """How far frames are off the middle of their neighbours, as a share of the neighbours'
    distance, beyond the half that smooth motion has [F - 2]; 0 where nothing moves.
    """
    out = []
    for before, here, after in zip(clip[:-2], clip[1:-1], clip[2:], strict=True):
        span = (after - before).abs().mean()
        off = (here - (before + after) / 2).abs().mean()
        out.append((off / span - 0.5).clamp_min(0) if span > _FLOOR else clip.new_zeros(()))
    return torch.stack(out) if out else clip.new_zeros(0)


def frozen(clip: Tensor) -> Tensor:
    """1 for a frame that repeats the one before it (a tenth of the usual motion) [F - 1]."""
    moved = differences(clip)
    usual = moved.quantile(0.75)
    return (moved < 0.1 * usual).float() if usual > 10 * _FLOOR else torch.zeros_like(moved)


def jumps(clip: Tensor, *, radius: int = 6) -> Tensor:
    """Log ratio of each frame's change to the usual change around it [F - 1]: cuts stand out.

    The usual change: upper quartile of the `radius` changes before and after, without itself.
    """
    moved, count = differences(clip).clamp_min(_FLOOR), clip.shape[0] - 1
    out = []
    for i in range(count):
        around = torch.cat([moved[max(0, i - radius) : i], moved[i + 1 : i + 1 + radius]])
        out.append((moved[i] / around.quantile(0.75)).log() if len(around) else moved.new_zeros(()))
    return torch.stack(out)


def repeats(clip: Tensor) -> Tensor:
    """1 for a frame that is nearer to one at least 4 before it than to its neighbour [F]."""
    small = functional.adaptive_avg_pool2d(
        clip, (min(_SMALL, clip.shape[2]), min(_SMALL, clip.shape[3]))
    ).flatten(1)
    apart = torch.cdist(small, small, p=1) / small.shape[1]
    near = apart.diagonal(offset=1)
    usual = near.median()
    found = clip.new_zeros(clip.shape[0])
    if usual < 10 * _FLOOR:
        return found
    for i in range(_MIN_LAG, clip.shape[0]):
        found[i] = float(
            apart[i, : i - _MIN_LAG + 1].min()
            < 0.4 * torch.minimum(usual, near[i - 1]).clamp_min(_FLOOR)
        )
    return found


def sharpness(clip: Tensor) -> Tensor:
    """Log of the mean gradient of brightness [F]: falls with blur, rises with noise."""
    return _gradient(luma(clip)[:, None]).clamp_min(_FLOOR).log()


def detail(clip: Tensor) -> Tensor:
    """Log ratio of gradients at the finest scale to those at half the size [F], weighted by the
    latter: blur and compression take the finest away, how much there is to see hardly matters, and
    grain in flat parts does not count.
    """
    grey = luma(clip)[:, None]
    if min(grey.shape[2:]) < 4:
        return clip.new_zeros(clip.shape[0])
    coarse = _edges(functional.avg_pool2d(grey, 2))
    fine = functional.avg_pool2d(_edges(grey), 2)
    weight = functional.avg_pool2d(coarse, 3, stride=1, padding=1)
    return (fine * weight).mean((1, 2, 3)).clamp_min(_FLOOR**2).log() - (coarse * weight).mean(
        (1, 2, 3)
    ).clamp_min(_FLOOR**2).log()


def noise(clip: Tensor, *, size: int = 8) -> Tensor:
    """Standard deviation [F - 2] of what space and time leave unexplained in the quietest blocks.

    A frame less the mean of its neighbours, under a Laplacian that cancels slopes (Immerkaer 1996):
    still texture has none, moving texture a little.
    """
    grey = luma(clip)
    residual = (grey[1:-1] - (grey[:-2] + grey[2:]) / 2)[:, None]
    if not residual.shape[0] or min(residual.shape[2:]) < size + 2:
        return clip.new_zeros(max(0, clip.shape[0] - 2))
    kernel = clip.new_tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])[None, None]
    blocks = functional.avg_pool2d(functional.conv2d(residual, kernel).abs(), size).flatten(1)
    quiet = blocks.sort(1).values[:, : max(1, blocks.shape[1] // 4)]
    return quiet.mean(1) * (torch.pi / 2) ** 0.5 / 6 / 1.5**0.5


def blockiness(clip: Tensor, *, size: int = 8) -> Tensor:
    """Share of the borders of `size` x `size` blocks across which the picture steps more than
    across the lines beside [F], less the same share for lines in the middle of the blocks: a
    codec's blocks. A few strong edges that lie on the grid count as few.
    """
    grey = luma(clip)
    steps = (grey.diff(dim=2).abs().mean(1), grey.diff(dim=1).abs().mean(2))
    found = []
    for line in (line for line in steps if line.shape[1] >= 2 * size + 1):
        steeper = (line[:, 1:-1] > (1 + 1e-3) * torch.maximum(line[:, :-2], line[:, 2:])).float()
        border = steeper[:, size - 2 :: size].mean(1)
        middle = steeper[:, size // 2 - 2 :: size].mean(1)
        found.append((border - middle).clamp_min(0))
    return torch.stack(found).mean(0) if found else clip.new_zeros(clip.shape[0])


def colour(clip: Tensor) -> Tensor:
    """Mean brightness and contrast (standard deviation of brightness) of every frame, and its tint:
    log of red over green, and of blue over green [F, 4]. A change of light leaves the tint as it
    is.
    """
    red, green, blue = (clip[:, i].mean((1, 2)).clamp_min(1e-2) for i in range(3))
    grey = luma(clip)
    return torch.stack(
        [grey.mean((1, 2)), grey.std((1, 2)), (red / green).log(), (blue / green).log()], dim=1
    )


def drift(series: Tensor, *, share: float = 0.25) -> Tensor:
    """Distance of the means of the first and the last `share` of a series [F, D]."""
    count = max(1, round(share * series.shape[0]))
    return (series[-count:].mean(0) - series[:count].mean(0)).norm()


def _gradient(grey: Tensor) -> Tensor:
    """Mean absolute gradient [F] of [F, 1, H, W]."""
    across, down = (grey.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (-1, -2))
    return across + down


def _edges(grey: Tensor) -> Tensor:
    """Absolute gradient [F, 1, H, W] of [F, 1, H, W], zero at the last row and column."""
    across = functional.pad(grey.diff(dim=-1).abs(), (0, 1))
    return across + functional.pad(grey.diff(dim=-2).abs(), (0, 0, 0, 1))
