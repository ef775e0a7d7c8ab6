"""A film of the causal commands: what it is, sampling it again and again in one session, and the
files it goes to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.output_file import OutputFile
from rcm.inference.causal_report import Marks
from rcm.inference.wan_progress import Progress
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, VelocityModel
from rcm.pipelines.scenes import Timeline, play
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.pipelines.video_io import Mp4Writer, contact_sheet
from rcm.pipelines.wan_pipeline import TEMPORAL_STRIDE

PREVIEW_HEIGHT, PREVIEW_COLUMNS = 160, 8


@dataclass(frozen=True)
class Film:
    """A video to make: its prompts, its latent frames, and the file it goes to."""

    timeline: Timeline
    latent_frames: int
    target: OutputFile

    @property
    def num_frames(self) -> int:
        """Pixel frames."""
        return (self.latent_frames - 1) * TEMPORAL_STRIDE + 1


class Reel:
    """One video, sampled again and again in one session."""

    def __init__(
        self,
        denoiser: Denoiser,
        model: VelocityModel,
        film: Film,
        spec: StreamSpec,
        *,
        given: Tensor | None,
        progress: Progress | None,
    ) -> None:
        self.denoiser, self.model, self.film, self.spec, self.progress = (
            denoiser,
            model,
            film,
            spec,
            progress,
        )
        self.given = None if given is None else given.expand(spec.batch, -1, -1, -1, -1)
        self._session: Session | None = None

    def chunks(
        self, flags: argparse.Namespace, condition: Callable[[str], Condition], marks: Marks
    ) -> Iterator[Tensor]:
        """The latents of each chunk, once its context is in the cache."""
        marks.mark("begin")
        first = self._prepared(condition(self.film.timeline.prompts[0]))
        if self._session is None:
            device = next(self.denoiser.net.parameters()).device
            self._session = Session(
                self.model, None, first, self.spec, device=device, prefix=self.given
            )
        else:
            self._session.restart(first, seed=flags.seed, prefix=self.given)
        marks.mark("ready")
        options = {
            "mode": flags.prompt_switch,
            "blend": flags.prompt_blend,
            "prepare": self._prepared,
        }
        for chunk in play(self._session, self.film.timeline, condition, **options):
            self._session.settle()
            marks.chunk()
            # one chunk late, so that the device always has work
            self._tell(marks, number=chunk.block - 1)
            yield chunk.latents
        self._tell(marks, number=len(marks.chunks) - 1)

    def _tell(self, marks: Marks, *, number: int) -> None:
        if self.progress is not None and number >= 0:
            seconds = (
                marks.watch.ms(
                    marks.chunks[number - 1] if number else marks.points["ready"],
                    marks.chunks[number],
                )
                / 1000
            )
            self.progress.chunk(
                number + 1,
                self.spec.recipe.blocks.num_blocks(self.film.latent_frames),
                seconds=seconds,
            )

    def _prepared(self, cond: Condition) -> Condition:
        return self.denoiser.prepare(cond).expand(self.spec.batch)

    def cache_bytes(self) -> int:
        """Bytes of the cache, all branches."""
        return (
            0
            if self._session is None
            else sum(cache.num_bytes() for cache in self._session.loop.cache.branches)
        )

    def passes(self) -> dict[str, int]:
        """How many passes were captured, replayed and run eagerly, where graphs were asked for."""
        return dict(getattr(self._session.loop, "counts", {})) if self._session is not None else {}

    def close(self) -> None:
        """Free the session."""
        if self._session is not None:
            self._session.close()


class FilmWriter:
    """The file of a video, samples side by side, and its contact sheet, which appear when the stack
    ends well.
    """

    def __init__(
        self, flags: argparse.Namespace, film: Film, preview: OutputFile | None, stack: ExitStack
    ) -> None:
        self.flags, self.film, self.preview = flags, film, preview
        self._writer = stack.enter_context(Mp4Writer(film.target, fps=flags.fps))
        self._picks = set(
            torch.linspace(0, film.num_frames - 1, min(PREVIEW_COLUMNS, film.num_frames))
            .round()
            .long()
            .tolist()
        )
        self._small: list[Tensor] = []
        self._written = 0

    def append(self, frames: Tensor) -> None:
        """Pixels [B, 3, f, H, W] in [-1, 1]."""
        self._writer.append(torch.cat(list(frames), dim=-1))
        for i in range(frames.shape[2]):
            if self.preview is not None and self._written + i in self._picks:
                height = min(PREVIEW_HEIGHT, frames.shape[3])
                width = max(1, round(frames.shape[4] * height / frames.shape[3]))
                self._small.append(
                    torch.nn.functional.interpolate(
                        frames[:, :, i].float(), size=(height, width), mode="area"
                    ).cpu()
                )
        self._written += frames.shape[2]
        if self.preview is not None and self._written == self.film.num_frames:
            # the built-in font may have no other letters
            prompt = self.film.timeline.prompts[0][:120].encode("ascii", "replace").decode()
            labels = [
                f"seed {self.flags.seed}, sample {i}: {prompt}" for i in range(frames.shape[0])
            ]
            contact_sheet(
                self.preview,
                torch.stack(self._small, dim=2),
                labels=labels,
                columns=PREVIEW_COLUMNS,
                scale=1,
            )
