"""A film of the causal commands: what it is, sampling it again and again in one session, and the
files it goes to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.flag_ranges import MAX_FRAMES
from rcm.core.output_file import OutputFile
from rcm.core.text_file import read_lines
from rcm.data.prompts import require_lines
from rcm.diffusion.blocks import BlockPattern
from rcm.encoders.codec import latent_frames
from rcm.encoders.prompt_cleaning import checked_prompts
from rcm.inference.causal_report import Marks
from rcm.inference.wan_outputs import claimed
from rcm.inference.wan_progress import Progress
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, VelocityModel
from rcm.pipelines.scenes import Timeline, parse_timeline, play, read_timeline
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.pipelines.wan_pipeline import TEMPORAL_STRIDE
from rcm.pipelines.wan_ranks import leads


@dataclass(frozen=True)
class Film:
    """A video to make: its prompts, its latent frames, and the files it and its contact sheet go
    to.
    """

    timeline: Timeline
    latent_frames: int
    target: OutputFile
    preview: OutputFile | None

    @property
    def num_frames(self) -> int:
        """Pixel frames."""
        return (self.latent_frames - 1) * TEMPORAL_STRIDE + 1

    def cuts(self, pattern: BlockPattern) -> frozenset[int]:
        """Blocks at which a scene begins."""
        return self.timeline.cuts(pattern) if self.timeline.is_timed else frozenset()


@dataclass
class Reel:
    """One video, sampled again and again in one session, behind the `given` latents."""

    denoiser: Denoiser
    model: VelocityModel
    film: Film
    spec: StreamSpec
    given: Tensor | None
    progress: Progress | None
    _session: Session | None = None

    def chunks(
        self, flags: argparse.Namespace, condition: Callable[[str], Condition], marks: Marks
    ) -> Iterator[Tensor]:
        """The latents of each chunk, once its context is in the cache."""
        marks.mark("begin")
        first = self._prepared(condition(self.film.timeline.prompts[0]))
        if self._session is None:
            device = next(self.denoiser.net.parameters()).device
            # a chunk's time is told with that of its context
            spec = replace(self.spec, settled=True)
            self._session = Session(
                self.model, None, first, spec, device=device, prefix=self.given,
                weights_checked=True,  # when they were read; another look would count as sampling
            )  # fmt: skip
        else:
            self._session.restart(first, seed=flags.seed, prefix=self.given)
        marks.mark("ready")
        options = {
            "mode": flags.prompt_switch,
            "blend": flags.prompt_blend,
            "prepare": self._prepared,
        }
        for chunk in play(self._session, self.film.timeline, condition, **options):
            marks.chunk()
            # one chunk late, so that the device always has work
            self._tell(marks, number=chunk.block - 1)
            yield chunk.latents
        self._tell(marks, number=len(marks.chunks) - 1)

    def _tell(self, marks: Marks, *, number: int) -> None:
        if self.progress is not None and number >= 0:
            begin = marks.chunks[number - 1] if number else marks.points["ready"]
            seconds = marks.watch.ms(begin, marks.chunks[number]) / 1000
            total = self.spec.recipe.blocks.num_blocks(self.film.latent_frames)
            self.progress.chunk(number + 1, total, seconds=seconds)

    def _prepared(self, cond: Condition) -> Condition:
        return self.denoiser.prepare(cond).expand(self.spec.batch)

    def cache_bytes(self) -> int:
        """Bytes of the cache, all branches."""
        if self._session is None:
            return 0
        return sum(cache.num_bytes() for cache in self._session.loop.cache.branches)

    def passes(self) -> dict[str, int]:
        """How many passes were captured, replayed and run eagerly, where graphs were asked for."""
        return dict(getattr(self._session.loop, "counts", {})) if self._session is not None else {}

    def close(self) -> None:
        """Free the session."""
        if self._session is not None:
            self._session.close()


def timelines_of(flags: argparse.Namespace) -> tuple[Timeline, ...]:
    """What the flags say of prompts, a timeline per video. `ConfigError` for how prompts change
    where none does.
    """
    found = _timelines(flags)
    ways = {"prompt_switch": flags.prompt_switch != "keep", "prompt_blend": flags.prompt_blend}
    named = [f"--{name}" for name, given in ways.items() if given]
    if named and all(len(timeline.prompts) == 1 for timeline in found):
        raise ConfigError(
            f"{named[0]} has no effect on a video of one prompt; write several, as in --prompt"
            ' "a cat[3s] | rain[3s]", or leave it out'
        )
    return found


def _timelines(flags: argparse.Namespace) -> tuple[Timeline, ...]:
    if flags.scene_file is not None:
        return (read_timeline(flags.scene_file),)
    if flags.prompt_file is None:
        return (parse_timeline(flags.prompt),)
    require_lines(flags.prompt_file)
    lines = enumerate(read_lines(flags.prompt_file, what="prompt file", knob="--prompt_file"), 1)
    prompts = checked_prompts(
        [(f"line {i} of {flags.prompt_file}", line) for i, line in lines],
        allow_empty=flags.allow_empty_prompt,
    )
    if not prompts:
        raise ConfigError(f"--prompt_file {flags.prompt_file} is empty; write one prompt per line")
    return tuple(map(parse_timeline, prompts))


def film_of(
    flags: argparse.Namespace, timeline: Timeline, pattern: BlockPattern, *, number: int, count: int
) -> Film:
    """The video `number` of `count`. `ConfigError` for a length that cannot be."""
    if timeline.is_timed:
        latents = pattern.frames_before(timeline.num_blocks(pattern))
        if latents * TEMPORAL_STRIDE > MAX_FRAMES:
            raise ConfigError(
                f"the durations of the prompts make {latents * TEMPORAL_STRIDE} frames, at most"
                f" {MAX_FRAMES} are made at once"
            )
        if (latents - 1) * TEMPORAL_STRIDE + 1 != flags.num_frames and leads():
            told = f"{(latents - 1) * TEMPORAL_STRIDE + 1} frames by the durations of the prompts"
            print(f"note: {told}; --num_frames {flags.num_frames} is not used", flush=True)
    else:
        latents = latent_frames_of(flags.num_frames, pattern)
    if flags.image_path and latents < 2:
        raise ConfigError(
            f"--num_frames {flags.num_frames} is the image alone; choose"
            f" {pattern.chunk * TEMPORAL_STRIDE + 1} or more"
        )
    several = {"number": number, "count": count}
    video = claimed(flags, "save_path", ".mp4", **several)
    assert video is not None  # the flag has a default
    return Film(timeline, latents, video, claimed(flags, "preview_grid", ".png", **several))


def latent_frames_of(num_frames: int, pattern: BlockPattern) -> int:
    """Latent frames of a video; `ConfigError`, naming the nearest lengths in pixel frames, unless
    they fill whole chunks.
    """
    lengths = [(pattern.frames_before(1) - 1) * TEMPORAL_STRIDE + 1]
    while lengths[-1] < num_frames:
        lengths.append(lengths[-1] + pattern.chunk * TEMPORAL_STRIDE)
    if lengths[-1] != num_frames:
        raise ConfigError(
            f"--num_frames {num_frames} does not fill chunks of {pattern.first}, then"
            f" {pattern.chunk} latent frames ({TEMPORAL_STRIDE} frames each, one frame first);"
            f" choose {' or '.join(map(str, lengths[-2:]))}, or change --first_chunk_t / --chunk_t"
        )
    return latent_frames(num_frames, stride=TEMPORAL_STRIDE)
