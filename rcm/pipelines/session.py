"""One stream of video, from a loaded network to decoded chunks: opened, stepped, steered,
snapshotted and closed.

A bounded video is a session that stops. What a session costs does not grow with its length: plans
are made chunk by chunk, noise is keyed per chunk, the cache is a ring, positions are arithmetic.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from rcm.encoders.codec import LatentCodec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import VelocityModel
from rcm.pipelines.course import Course, lease, no_gradients, one_thread
from rcm.pipelines.decode_lane import DecodeLane, new_lane
from rcm.pipelines.engine import new_loop
from rcm.pipelines.finite import FiniteGuard, Reading, require_finite_weights
from rcm.pipelines.snapshot import maker, require_alike
from rcm.pipelines.steering import Change, Pending, Steering, require_fitting
from rcm.pipelines.stream_ranks import Meeting
from rcm.pipelines.stream_spec import Receipt, StreamedChunk, StreamSpec, SwitchMode, SwitchRefused
from rcm.rollout.autoregressive import Canvas, ChunkLoop
from rcm.rollout.recipe import SamplingRecipe

_KEPT = ("given", "prefix", "block", "pending", "ahead")
"""Attributes that a snapshot keeps as they are."""


class Session:
    """A stream under way. `codec` None, or on another rank: latents alone, as `frames`, too.

    `prefix` [B, C, k, h, w]: given first frames (an image, or the start of a clip), entered as
    clean context and handed out unchanged. With noisy context from block 0 the prefix is noised to
    the first generated chunk's last time (the release's image-to-video). State in float64.
    `weights_checked`: they were looked at where they were read, and are not again.

    Ranks that make a stream together (the model's `group`) call its methods alike. What one of them
    does alone, it does at the next chunk, on all: a refusal to open or to change the condition is
    raised everywhere, and a rank that cancels, closes or failed ends the stream for the others.
    """

    @no_gradients()
    def __init__(
        self,
        denoiser: VelocityModel,
        codec: LatentCodec | None,
        cond: Condition,
        spec: StreamSpec,
        *,
        device: torch.device | str = "cpu",
        prefix: Tensor | None = None,
        weights_checked: bool = False,
    ) -> None:
        self.spec, self.device = spec, torch.device(device)
        self._loop: ChunkLoop
        self._lane: DecodeLane | None = None
        self._user = threading.RLock()
        group = denoiser.group if denoiser.num_ranks > 1 else None
        self._course = Course(Meeting(group))
        try:
            if not weights_checked:
                self._course.ranks.together(lambda: require_finite_weights(denoiser))
            self._course.ranks.together(lambda: self._open(denoiser, cond, prefix))
            self._lane = new_lane(codec, spec, device=self.device, group=group)
        except BaseException:
            # lets the generator go, whoever keeps the error and this session with it
            self._course.cancelled = True
            raise

    def _open(self, denoiser: VelocityModel, cond: Condition, prefix: Tensor | None) -> None:
        self._steering = Steering(self.spec.for_batch(cond))
        self._begin(self.spec.given(prefix, device=self.device))
        lease(self.spec.generator, self)
        self._loop = new_loop(
            denoiser,
            self.spec,
            given=self._given,
            device=self.device,
            # ranks stop together, between chunks
            interrupt=None if self._course.ranks.several else self._course.require_open,
        )
        self._loop.watch = self._guard.step
        require_fitting(self._steering.cond, self._loop)

    def _begin(self, given: tuple[int, Tensor | None]) -> None:
        self._begun = time.perf_counter()
        self._given, self._prefix = given
        self._guard = FiniteGuard()
        self._refused: SwitchRefused | None = None
        self._block = 0
        self._pending: Pending | None = None
        self._ahead: tuple[int, Tensor] | None = None
        self._pieces: deque[tuple[int, Tensor]] = deque()

    @one_thread
    def restart(
        self,
        cond: Condition | None = None,
        *,
        seed: int | None = None,
        prefix: Tensor | None = None,
    ) -> None:
        """Begin another video in the memory, and with the captured passes, of this one: as a
        session opened alike. `cond` None: the same; `seed` None: that of the `StreamSpec` (with
        noise="video", its generator is seeded with it).
        """
        self._course.require_open()
        lease(self.spec.generator, self)
        # refuse before anything is changed
        spec = self.spec if seed is None else replace(self.spec, seed=seed)
        given = spec.given(prefix, device=self.device)
        cond = self._steering.cond if cond is None else spec.for_batch(cond)
        require_fitting(cond, self._loop)
        with self._course.marking(in_pass=False):
            self._steering.end()
            self._steering.cond = cond
            self._begin(given)
            self.spec = spec
            if spec.generator is not None and seed is not None:
                spec.generator.manual_seed(seed)
            canvas = Canvas(self._loop.canvas.grid, spec.policy.fresh())
            self._loop.watch = self._guard.step
            self._loop.restart(canvas=canvas, noise=spec.new_noise(self._given, device=self.device))
            if self._lane is not None:
                self._lane.restart()
            self._course.failed = None

    @property
    def next_block(self) -> int:
        """The next block that will be denoised."""
        return self._block

    @property
    def loop(self) -> ChunkLoop:
        """The chunk loop, with its cache."""
        return self._loop

    @property
    def ended(self) -> bool:
        """Whether everything was handed out."""
        return not self._pieces and self._ahead is None and self._last

    @property
    def may_draw(self) -> bool:
        """Whether it may ask its generator for more noise."""
        return not self._course.cancelled and not self.ended

    @property
    def _last(self) -> bool:
        """Whether every block was begun."""
        return self.spec.ends_with(self._block - 1)

    @one_thread
    def step(self) -> StreamedChunk | None:
        """The next chunk (or part of one), None after the last. Raises `StreamCancelled` on a
        closed session, `NonFinite` for a chunk whose latents or pixels are NaN or infinite.

        A change of condition that is refused raises `SwitchRefused` once and the stream goes on
        under the old one. After any other error the cache may lack a chunk, so further steps raise
        `StreamCancelled` until `restart` or `restore`.
        """
        self._course.require_whole(last=self._last)
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise error
        if self.ended:
            self._require_finite(wait=True)
            return None
        with self._course.marking(in_pass=False):
            return self._handed_out()

    def _handed_out(self) -> StreamedChunk:
        if not self._pieces:
            block, x0 = self._ahead or self._produce()
            self._ahead = None
            alone = self.spec.first_alone and block == 0 and x0.shape[2] > 1
            parts = x0.split([1, x0.shape[2] - 1], dim=2) if alone else (x0,)
            self._pieces.extend((block, part) for part in parts)
        block, x0 = self._pieces.popleft()
        latents = x0.float()  # whoever gets them may write to them
        decoding = None if self._lane is None else self._lane.decode(latents)
        self._guard.handed(block, decoding.reading if decoding else Reading(latents))
        if self.spec.look_ahead and not self._pieces and not self._last:
            try:
                self._ahead = self._produce()
            except SwitchRefused as error:  # this chunk is whole: the next step tells
                self._refused = error
        frames, images = (None, None) if decoding is None else decoding.result()
        self._require_finite(wait=decoding is not None)
        frames = latents if frames is None else frames
        return StreamedChunk(block, latents, frames, time.perf_counter() - self._begun, images)

    @one_thread
    def settle(self) -> None:
        """Put the context of the newest chunk into the cache now, not when the next one is begun;
        several ranks meet for it, which `StreamSpec.settled` saves.
        """
        self._course.require_whole(last=self._last)
        self._settle(asked=self._steering.asked)

    def __iter__(self) -> Iterator[StreamedChunk]:
        while (chunk := self.step()) is not None:
            yield chunk

    def set_condition(self, cond: Condition, *, mode: SwitchMode = "keep") -> Receipt:
        """Take up another condition at the next chunk boundary; the latest of several wins.

        mode "keep": later chunks still attend to what was made under the old condition. "recache":
        what the window holds is entered anew under the new one (its latents at their context
        times), sinks excepted. The receipt says when it was applied.
        """
        self._course.require_open()
        cond = self.spec.for_batch(cond)
        require_fitting(cond, self._loop)
        receipt = self._steering.ask(cond, mode)
        if self._last:
            self._steering.refuse(None, "the last chunk of this stream was made before")
        if self._course.cancelled:  # meanwhile
            self._steering.refuse(None, "the stream ended before")
        return receipt

    @one_thread
    def set_recipe(self, recipe: SamplingRecipe) -> int:
        """Take other steps, or another context rule, from the next block on, and return that block.
        `ConfigError` for another pattern, kind, guidance or window, which need a session of their
        own, and where the noise of all steps was drawn up front.
        """
        self._course.require_open()
        self.spec = self.spec.with_recipe(recipe, block=self._block, given=self._given)
        return self._block

    @one_thread
    def snapshot(self) -> dict[str, Any]:
        """Everything from which the stream goes on, as copies; for `restore` of this session or of
        one opened alike.
        """
        self._course.require_whole(last=self._last)
        self._require_finite(wait=True)
        return {
            "made_by": self._maker(),
            "recipe": self.spec.recipe,
            "seed": self.spec.seed,
            **{name: getattr(self, f"_{name}") for name in _KEPT},
            "pieces": list(self._pieces),
            "steering": self._steering.state(),
            "loop": self._loop.state(),
            "decoder": None if self._lane is None else self._lane.state(),
        }

    @one_thread
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `snapshot`: the following chunks are those that followed it, bit by bit.
        `ConfigError`, and nothing is changed, for one by a session that was opened otherwise.
        """
        self._course.require_open()
        require_alike(state, self._maker(), self.spec)
        lease(self.spec.generator, self)
        with self._course.marking():
            self._refused = None
            self._guard.forget()
            self.spec = replace(self.spec, recipe=state["recipe"], seed=state["seed"])
            for name in _KEPT:
                setattr(self, f"_{name}", state[name])
            self._pieces = deque(state["pieces"])
            self._steering.load_state(state["steering"])
            self._loop.load_state(state["loop"])
            if self._lane is not None:
                self._lane.load_state(state["decoder"])
            self._course.failed = None

    def _maker(self) -> dict[str, str]:
        return maker(self.spec, self._loop, decoder=self._lane and self._lane.codec)

    def cancel(self) -> None:
        """Stop as soon as possible, from any thread: a step under way raises `StreamCancelled`
        before its next pass; where several ranks make the stream, at the next chunk, on all.
        """
        self._course.cancelled = True

    def close(self) -> None:
        """Free cache, decoder and graphs. Any further step raises `StreamCancelled`; this waits for
        one that is under way in another thread. Where several ranks make the stream and it goes on,
        this waits until the others are at the next chunk.
        """
        self._course.cancelled = True
        with self._user:
            self._course.leave(last=self._last)
            self._loop.close()
            if self._lane is not None:
                self._lane.close()
            self._pieces.clear()
            self._steering.end()
            self._ahead = self._pending = self._prefix = None

    def num_bytes(self) -> int:
        """Bytes that the stream itself allocated on the device: cache and decoder."""
        held = sum(cache.num_bytes() for cache in self._loop.cache.branches)
        return held + (0 if self._lane is None else self._lane.num_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _produce(self) -> tuple[int, Tensor]:
        """Latents float64 of the next block: given, or denoised after the context of the one before
        was committed.
        """
        change = self._change_due()
        with self._course.marking():
            if change is not None:
                self._steering.apply(change, self._loop, block=self._block)
            block = self._block
            self._block += 1
            self._guard.begun(block, self._loop)
            x0 = self._given_block(block) if block < self._given else self._denoised(block)
            if self.spec.settled:
                self._leave_context()
            return block, x0

    def _denoised(self, block: int) -> Tensor:
        plan = self.spec.recipe.plan(block, prefix_blocks=self._given)
        last, coded = self.spec.ends_with(block), self.spec.kv_codec is not None
        # a chunk sees its own codes in the step that leaves them, the last chunk, too
        result = self._loop.denoise(plan, self._steering.cond, keep=coded or not last)
        self._pending = result
        return result.x0

    def _given_block(self, block: int) -> Tensor:
        plan, t = self.spec.given_chunk(block, given=self._given)
        assert self._prefix is not None
        x = self._prefix[:, :, plan.start : plan.stop]
        self._pending = (plan, x, t)
        return x

    def _change_due(self) -> Change | None:
        """The change of condition that the next chunk takes up, refused before the old one is gone,
        once the ranks have met and the context of the chunk before is in the cache. They meet a
        second time only where that had to be entered before a change.
        """
        steering, change = self._steering, None
        asked = steering.asked
        try:
            if self._pending is not None or not asked:
                self._settle(asked=asked)
            if asked:
                change, problem = steering.due(self._loop)
                self._course.meet(problem, place=self._block, asked=True)
        except SwitchRefused as error:
            steering.refuse(change, str(error))
            raise
        except BaseException:
            if change is not None:  # one that waits is told by what ends or mends the stream
                steering.refuse(change, "the stream ended before")
            raise
        return change

    def _settle(self, *, asked: bool) -> None:
        self._course.meet(None, place=self._block, asked=asked)
        with self._course.marking():
            self._leave_context()

    def _leave_context(self) -> None:
        """Put the context of the newest block into the cache, unless it is there, or is the last's:
        only a longer stream, which takes up a snapshot, reads that.
        """
        if self._last:
            return
        pending, self._pending = self._pending, None
        if pending is not None:
            self._steering.enter(self._loop, pending)

    def _require_finite(self, *, wait: bool) -> None:
        """End a stream that is known to have made what is not finite; `wait`: until it is known."""
        problem = self._guard.problem(self._loop, self._steering.cond, wait=wait)
        if problem is not None:
            self._course.fail(problem)
            self._course.leave(last=self._last)
            raise problem
