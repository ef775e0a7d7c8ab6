"""`rcm.load`: a checkpoint in one call, sampled in one loop.

for chunk in rcm.load().stream("a red square moving left"): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.parallel.threads import settle_threads
from rcm.pipelines.described import PieceFiles
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.pipelines.stream_spec import StreamedChunk, StreamReport
from rcm.pipelines.video_io import Mp4Writer, comfortable_scale
from rcm.storage.shipped import toy_checkpoint


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. `prompt` is a text, or a list of texts for a batch; options are those of
    `LoadedModel.stream`: `seed`, `num_frames`, `recipe`, `prefix`, `guidance`. `loaded` is the
    whole of it: description, recipe, codec, text encoder.
    """

    loaded: LoadedModel

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[StreamedChunk]:
        """Chunks as they are made: `chunk.frames` [B, 3, f, H, W] in [-1, 1], `chunk.seconds` since
        the start. Checks come first.
        """
        return self.loaded.stream(_listed(prompt), **options)

    def generate(self, prompt: str | Sequence[str], **options: Any) -> tuple[Tensor, StreamReport]:
        """The whole video [B, 3, F, H, W] and its latencies."""
        return self.loaded.generate(_listed(prompt), **options)

    def save(
        self,
        path: str | Path,
        prompt: str | Sequence[str],
        *,
        upscale: int | None = None,
        **options: Any,
    ) -> Path:
        """Stream into an mp4 file, a batch side by side; `upscale` pixels per pixel (None: small
        videos become at least 256 high).
        """
        require_kind("path", path, str | Path)
        require_kind("upscale", upscale, int | None)
        stream = self.stream(prompt, **options)
        scale = comfortable_scale(*self.loaded.pixel_size) if upscale is None else upscale
        with Mp4Writer(path, fps=self.loaded.fps, scale=scale, pad=True) as writer:
            for chunk in stream:
                writer.append(torch.cat(list(chunk.frames), dim=-1))
        return Path(path)


def load(
    path: str | Path | None = None,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
    precision: Precision | str | None = None,
    files: PieceFiles = PieceFiles(),
) -> Model:
    """The checkpoint at `path` (a job folder, an iter_* folder or an exported file; None: the
    shipped one of the toy world).

    `device` None: cuda where there is one. On a CPU a network of toy size leaves torch one thread,
    as in the commands, unless OMP_NUM_THREADS says how many: on a busy machine more would wait for
    each other. The rest, and the errors, as `open_checkpoint`.
    """
    where = toy_checkpoint() if path is None else path
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    loaded = open_checkpoint(where, weights=weights, device=place, precision=precision, files=files)
    settle_threads(loaded.denoiser.net, device=place)
    return Model(loaded)


def _listed(prompt: str | Sequence[str]) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence) or not all(isinstance(text, str) for text in prompt):
        raise ConfigError(f"a prompt is a text or a list of texts, got {prompt!r}")
    return list(prompt)
