"""Prompts along a video: a timeline of segments with durations, its blocks, and playing it through
a session.

One line: `a harbour at dawn[5s] | the harbour in a storm[3s#] | calm again[4s]`. `|` separates
segments; the bracket holds seconds (the s may be left out), a # in it begins a new scene there (a
cut, which Infinity-RoPE makes visible). A file holds one segment per line.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F

from rcm.core.errors import ConfigError
from rcm.core.text_file import read_lines
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.condition import Condition
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamedChunk, SwitchMode

FRAMES_PER_SECOND, TEMPORAL_STRIDE = 16, 4
"""Of Wan's videos: durations are counted in them."""
MAX_SECONDS = 24 * 3600.0
"""Of a segment."""
_DURATION = re.compile(r"\[\s*(\d+(?:\.\d*)?|\.\d+)\s*s?\s*(#?)\s*\]", re.IGNORECASE)
_ATTEMPT = re.compile(r"\[\s*(?:[-+.\d][^\[\]]*|(?:inf|nan)\s*s?\s*#?|s?\s*#?)\s*\]", re.IGNORECASE)


@dataclass(frozen=True)
class Segment:
    """A prompt, how long it lasts (0: one block), and whether it begins a scene."""

    prompt: str
    seconds: float = 0.0
    cut: bool = False


@dataclass(frozen=True)
class Timeline:
    """Segments in order. `is_timed`: durations say how long the video is; else there is one prompt,
    for whatever length is asked.
    """

    segments: tuple[Segment, ...]

    @property
    def is_timed(self) -> bool:
        """Whether any segment has a duration."""
        return any(segment.seconds > 0 for segment in self.segments)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts, in order."""
        return tuple(segment.prompt for segment in self.segments)

    def num_blocks(self, pattern: BlockPattern) -> int:
        """Blocks of the video: its seconds rounded up to whole ones, and at least one per segment.
        The release's arithmetic; there a single segment's duration is not read and its bracket goes
        to the text encoder.
        """
        pixels = int(sum(segment.seconds for segment in self.segments) * FRAMES_PER_SECOND)
        latents = 1 + max(0, pixels - 1) // TEMPORAL_STRIDE
        return max(
            1 + math.ceil(max(0, latents - pattern.first) / pattern.chunk), len(self.segments)
        )

    def num_frames(self, pattern: BlockPattern) -> int:
        """Pixel frames of the video."""
        return (pattern.frames_before(self.num_blocks(pattern)) - 1) * TEMPORAL_STRIDE + 1

    def first_blocks(self, pattern: BlockPattern) -> tuple[int, ...]:
        """The block at which each segment begins: rounded up, but every later segment keeps a block
        at least; the last takes the rest.
        """
        total, starts, at = self.num_blocks(pattern), [], 0
        for i, segment in enumerate(self.segments):
            starts.append(at)
            latents = max(1, round(segment.seconds * FRAMES_PER_SECOND / TEMPORAL_STRIDE))
            beyond = latents - pattern.first if i == 0 else latents
            blocks = max(0, math.ceil(beyond / pattern.chunk)) + (i == 0)
            at = min(at + blocks, total - (len(self.segments) - 1 - i))
        return tuple(starts)

    def cuts(self, pattern: BlockPattern) -> frozenset[int]:
        """The blocks that begin a scene: of segments that say so, the first one excepted, before
        which there is nothing to cut.
        """
        starts = self.first_blocks(pattern)
        return frozenset(
            start
            for start, segment in zip(starts[1:], self.segments[1:], strict=True)
            if segment.cut
        )


def parse_timeline(text: str) -> Timeline:
    """A timeline from one line. Without `|` and without a duration: a single prompt, as it is.
    `ConfigError` for a bracket that is meant as a duration and is none, and for a segment without
    words.
    """
    parts = text.split("|")
    if len(parts) > 1 and not any(
        _DURATION.search(part) or _ATTEMPT.search(part) for part in parts
    ):
        return Timeline((Segment(text.strip()),))
    found = Timeline(
        tuple(
            _segment(part, where=f"segment {i}", several=len(parts) > 1)
            for i, part in enumerate(parts, 1)
        )
    )
    if len(parts) > 1 and not found.is_timed:
        raise ConfigError(
            "no segment of the timeline lasts longer than 0 s; write seconds, such as [5s]"
        )
    return found


def read_timeline(path: str | Path) -> Timeline:
    """A timeline from a text file with one segment per line, empty lines left out; a | belongs to
    the prompt there. `ConfigError` for a file that cannot be read or has no segments.
    """
    lines = enumerate(read_lines(path, what="timeline", knob="--scene_file"), 1)
    found = [
        _segment(line, where=f"line {i} of {path}", several=True)
        for i, line in lines
        if line.strip()
    ]
    if not found:
        raise ConfigError(
            f"{path} has no segments; write one prompt per line, such as: a harbour at dawn[5s]"
        )
    if not Timeline(tuple(found)).is_timed:
        raise ConfigError(
            f"no line of {path} has a duration; write seconds behind the prompts, such as: a"
            " harbour at dawn[5s]"
        )
    return Timeline(tuple(found))


def play(
    session: Session,
    timeline: Timeline,
    condition: Callable[[str], Condition],
    *,
    mode: SwitchMode = "keep",
    blend: int = 0,
    prepare: Callable[[Condition], Condition] = lambda cond: cond,
) -> Iterator[StreamedChunk]:
    """The chunks of `session`, which was opened with the first prompt or took up a snapshot of one
    that was played, its condition changed as each segment begins.

    `condition` gives that of a prompt, `prepare` makes it ready for the network. `blend`: over so
    many chunks the text goes over in equal steps from the old prompt's embedding to the new one's,
    which it reaches in the chunk after. `mode` as `Session.set_condition`. `ConfigError` for a
    session that works ahead: it would take up prompts one chunk late.
    """
    if session.spec.look_ahead and len(timeline.segments) > 1:
        raise ConfigError(
            "a timeline needs look_ahead=False: a session that works ahead takes up prompts one"
            " chunk late"
        )
    if blend < 0:
        raise ConfigError(f"blend={blend} chunks must be at least 0")
    starts, applied = timeline.first_blocks(session.spec.recipe.blocks), -1
    while not session.ended:
        block = session.next_block
        number = bisect_right(starts, block) - 1
        old, new = timeline.segments[max(0, number - 1)], timeline.segments[number]
        since = block - starts[number]
        if block != applied and number and since <= blend:
            share = min(1.0, (since + 1) / (blend + 1))
            cond = (
                condition(new.prompt)
                if share == 1
                else blended(condition(old.prompt), condition(new.prompt), share)
            )
            session.set_condition(prepare(cond), mode=mode)
        applied = block
        yield session.step()
    session.step()  # nothing more, or what is known of the last chunk by now


def blended(old: Condition, new: Condition, share: float) -> Condition:
    """The text embedding that lies `share` of the way from `old` to `new`; the shorter one is
    padded with zeros.
    """
    length = max(old.text.shape[1], new.text.shape[1])
    before, after = (
        F.pad(cond.text, (0, 0, 0, length - cond.text.shape[1])) for cond in (old, new)
    )
    return replace(new, text=before + share * (after - before), prepared=None)


def _segment(text: str, *, where: str, several: bool) -> Segment:
    match, attempt = _DURATION.search(text), _ATTEMPT.search(text)
    if match is None and attempt is not None and several:
        raise ConfigError(
            f"{attempt[0]} in {where} is no duration; write seconds of 0 or more, such as [5s], or"
            " [5s#] for a cut"
        )
    prompt = (text if match is None else text[: match.start()] + text[match.end() :]).strip()
    if several and not prompt:
        raise ConfigError(f"{where} of the timeline has no prompt; write one, or remove the |")
    if match is not None and float(match[1]) > MAX_SECONDS:
        raise ConfigError(f"a duration in {where} is more than a day; write seconds")
    return Segment(prompt) if match is None else Segment(prompt, float(match[1]), match[2] == "#")
