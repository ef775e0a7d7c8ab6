"""One stream of video, from a loaded network to decoded chunks: opened, stepped, steered,
snapshotted and closed.

A bounded video is a session that stops. What a session costs does not grow with its length: plans
are made chunk by chunk, noise is keyed per chunk, the cache is a ring, positions are arithmetic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from rcm.core.errors import ConfigError, first_line
from rcm.encoders.codec import LatentCodec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import VelocityModel
from rcm.nets.kv_view import CachedChunk
from rcm.pipelines.decode_lane import DecodeLane
from rcm.pipelines.engine import CapturedLoop
from rcm.pipelines.generator_lease import lease
from rcm.pipelines.shared_decoder import shared_decoder
from rcm.pipelines.stream_spec import Receipt, StreamedChunk, StreamSpec, SwitchMode
from rcm.rollout.autoregressive import Canvas, ChunkLoop, ChunkResult
from rcm.rollout.plan import ChunkPlan
from rcm.rollout.recipe import SamplingRecipe


class StreamCancelled(RuntimeError):
    """A step was asked of a session that is closed, or was cancelled meanwhile."""


class SwitchRefused(ConfigError):
    """A change of condition that cannot be; the stream goes on under the old one."""


class Session:
    """A stream under way. `codec` None, or on another rank: latents alone, as `frames`, too.

    `prefix` [B, C, k, h, w]: given first frames (an image, or the start of a clip), entered as
    clean context and handed out unchanged. With noisy context from block 0 the prefix is noised to
    the first generated chunk's last time (the release's image-to-video). State in float64.
    Iterating steps until the video ends.
    """

    def __init__(
        self,
        denoiser: VelocityModel,
        codec: LatentCodec | None,
        cond: Condition,
        spec: StreamSpec,
        *,
        device: torch.device | str = "cpu",
        prefix: Tensor | None = None,
    ) -> None:
        self.spec, self.device = spec, torch.device(device)
        if spec.graphs == "on" and self.device.type != "cuda":
            raise ConfigError(
                f"graphs='on' needs a CUDA device, the stream is on {self.device}; use graphs='off'"
            )
        self._begin(cond, prefix)
        self._lease_generator()
        try:
            self._loop = self._new_loop(denoiser)
            if denoiser.num_ranks > 1:
                codec = shared_decoder(codec, ranks=spec.decode_ranks, sharing=denoiser.num_ranks)
            lane = spec.look_ahead and self.device.type == "cuda"
            options = {
                "device": self.device,
                "own_stream": lane,
                "graphs": spec.graphs,
                "to_host": spec.to_host,
            }
            self._lane = None if codec is None else DecodeLane(codec, **options)
        except BaseException:
            # lets the generator go, whoever keeps the error and this session with it
            self._cancelled = True
            raise

    def _begin(self, cond: Condition, prefix: Tensor | None) -> None:
        given, cond = self.spec.given(prefix, device=self.device), self.spec.for_batch(cond)
        self._begun = time.perf_counter()
        (self._given, self._prefix), self._cond = given, cond
        self._wanted = deque[tuple[Condition, SwitchMode, Receipt]]()
        self._failed: Exception | None = None
        self._refused: SwitchRefused | None = None
        self._block = 0
        self._pending: ChunkResult | tuple[ChunkPlan, Tensor, float] | None = None
        self._history: dict[int, tuple[Tensor, float]] = {}
        self._ahead: tuple[int, Tensor] | None = None
        self._pieces: deque[tuple[int, Tensor]] = deque()
        self._cancelled = False

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
        self._require_open()
        self._lease_generator()
        # refuses before anything is changed
        self._begin(self._cond if cond is None else cond, prefix)
        spec = self.spec = replace(self.spec, seed=self.spec.seed if seed is None else seed)
        if spec.generator is not None and seed is not None:
            spec.generator.manual_seed(seed)
        canvas = Canvas(self._loop.canvas.grid, spec.policy.fresh())
        self._loop.restart(canvas=canvas, noise=spec.new_noise(self._given, device=self.device))
        if self._lane is not None:
            self._lane.restart()

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
        return not self._pieces and self._ahead is None and self._is_last(self._block - 1)

    @property
    def may_draw(self) -> bool:
        """Whether it may ask its generator for more noise."""
        return not self._cancelled and not self.ended

    @torch.no_grad()
    def step(self) -> StreamedChunk | None:
        """The next chunk (or part of one), None after the last. Raises `StreamCancelled` on a
        closed session.

        A change of condition that is refused raises `SwitchRefused` once and the stream goes on
        under the old one. After any other error the cache may lack a chunk, so further steps raise
        `StreamCancelled` until `restart` or `restore`.
        """
        self._require_whole()
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise error
        if self.ended:
            return None
        if not self._pieces:
            block, latents = self._ahead or self._produce()
            self._ahead = None
            alone = self.spec.first_alone and block == 0 and latents.shape[2] > 1
            self._pieces.extend(
                (block, part)
                for part in (
                    latents.split([1, latents.shape[2] - 1], dim=2) if alone else (latents,)
                )
            )
        block, latents = self._pieces.popleft()
        decoding = None if self._lane is None else self._lane.decode(latents)
        if self.spec.look_ahead and not self._pieces and not self._is_last(self._block - 1):
            try:
                self._ahead = self._produce()
            except SwitchRefused as error:  # this chunk is whole: the next step tells
                self._refused = error
        frames, images = (None, None) if decoding is None else decoding.result()
        frames = latents if frames is None else frames
        return StreamedChunk(block, latents, frames, time.perf_counter() - self._begun, images)

    @torch.no_grad()
    def settle(self) -> None:
        """Put the context of the newest chunk into the cache now, and not when the next one is
        begun; for timings.
        """
        self._require_whole()
        with self._marking():
            self._leave_context()

    def __iter__(self) -> Iterator[StreamedChunk]:
        while (chunk := self.step()) is not None:
            yield chunk

    def set_condition(self, cond: Condition, *, mode: SwitchMode = "keep") -> Receipt:
        """Take up another condition at the next chunk boundary; the latest of several wins.

        mode "keep": later chunks still attend to what was made under the old condition. "recache":
        what the window holds is entered anew under the new one (its latents at their context
        times), sinks excepted. The receipt says when it was applied.
        """
        self._require_open()
        if mode not in ("keep", "recache"):
            raise ConfigError(f"switch mode {mode!r} is not one of 'keep', 'recache'")
        cond = self.spec.for_batch(cond)
        while self._wanted:
            self._wanted.pop()[2].superseded = True
        receipt = Receipt()
        self._wanted.append((cond, mode, receipt))
        return receipt

    def set_recipe(self, recipe: SamplingRecipe) -> int:
        """Take other steps, or another context rule, from the next block on, and return that block.
        `ConfigError` for another pattern, kind or guidance, which need a session of their own, and
        where the noise of all steps was drawn up front.
        """
        self._require_open()
        for name in ("pattern", "kind", "guidance"):
            mine, new = getattr(self.spec.recipe, name), getattr(recipe, name)
            if mine != new:
                raise ConfigError(
                    f"a stream under way keeps its {name}={mine!r}, the new recipe has {new!r};"
                    " open another session"
                )
        if self.spec.noise == "video":
            raise ConfigError(
                "noise='video' was drawn for the steps of the first recipe; open the session with"
                " noise='chunk'"
            )
        # raises for times that do not decrease
        recipe.plan(max(self._block, self._given), prefix_blocks=self._given)
        self.spec = replace(self.spec, recipe=recipe)
        return self._block

    def snapshot(self) -> dict[str, Any]:
        """Everything from which the stream goes on, as copies; for `restore` of this session or of
        one opened alike.
        """
        self._require_whole()
        return {
            "recipe": self.spec.recipe,
            "seed": self.spec.seed,
            "given": (self._given, self._prefix),
            "block": self._block,
            "pending": self._pending,
            "cond": self._cond,
            "wanted": [(cond, mode) for cond, mode, _ in self._wanted],
            "history": dict(self._history),
            "ahead": self._ahead,
            "pieces": list(self._pieces),
            "caches": [cache.state() for cache in self._loop.cache.branches],
            "policy": self._loop.canvas.policy.state(),
            "noise": self._loop.noise.state(),
            "decoder": None if self._lane is None else self._lane.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `snapshot`: the following chunks are those that followed it, bit by bit."""
        self._require_open()
        self._lease_generator()
        self.spec = replace(self.spec, recipe=state["recipe"], seed=state["seed"])
        self._given, self._prefix = state["given"]
        self._failed = self._refused = None
        self._block, self._pending, self._cond = state["block"], state["pending"], state["cond"]
        self._wanted = deque((cond, mode, Receipt()) for cond, mode in state["wanted"])
        self._history, self._ahead, self._pieces = (
            dict(state["history"]),
            state["ahead"],
            deque(state["pieces"]),
        )
        for cache, held in zip(self._loop.cache.branches, state["caches"], strict=True):
            cache.load_state(held)
        self._loop.canvas.policy.load_state(state["policy"])
        self._loop.noise.load_state(state["noise"])
        if self._lane is not None:
            self._lane.load_state(state["decoder"])

    def cancel(self) -> None:
        """Stop as soon as possible, from any thread: a step under way raises `StreamCancelled`
        before its next pass.
        """
        self._cancelled = True

    def close(self) -> None:
        """Free cache, decoder and graphs. Any further step raises `StreamCancelled`."""
        self._cancelled = True
        self._loop.close()
        if self._lane is not None:
            self._lane.close()
        self._pieces.clear()
        self._history.clear()
        self._ahead = self._pending = self._prefix = None

    def num_bytes(self) -> int:
        """Bytes that the stream holds on the device beside the weights, as far as it allocated them
        itself: cache and decoder.
        """
        held = sum(cache.num_bytes() for cache in self._loop.cache.branches)
        return held + (0 if self._lane is None else self._lane.num_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lease_generator(self) -> None:
        if self.spec.generator is not None:
            lease(self.spec.generator, self)

    def _new_loop(self, denoiser: VelocityModel) -> ChunkLoop:
        spec = self.spec
        policy = spec.policy.fresh()
        grid = denoiser.token_grid(*spec.latent[1:])
        codec = None if spec.kv_codec is None else spec.kv_codec.fork()
        keys = spec.keys or policy.keys
        cache = denoiser.new_cache(
            num_frames=spec.cache_frames,
            grid=grid,
            keys=keys,
            codec=codec,
            hot_chunks=spec.hot_chunks,
            attention=spec.attention,
        )
        kind = CapturedLoop if spec.graphs == "on" else ChunkLoop
        return kind(
            denoiser,
            canvas=Canvas(grid, policy),
            noise=spec.new_noise(self._given, device=self.device),
            rule=spec.recipe.rule,
            cache=cache,
            in_place=True,
            interrupt=self._require_open,
        )

    def _produce(self) -> tuple[int, Tensor]:
        """Latents of the next block: given, or denoised after the context of the one before was
        committed.
        """
        with self._marking():
            self._leave_context()
        wanted = self._wanted_next()
        with self._marking():
            if wanted is not None:
                self._apply(*wanted)
            block, recipe = self._block, self.spec.recipe
            self._block += 1
            if block < self._given:
                return block, self._enter_given(block)
            plan = recipe.plan(block, prefix_blocks=self._given)
            result = self._loop.denoise(plan, self._cond, keep=not self._is_last(block))
            self._pending = None if self._is_last(block) else result
            return block, result.x0.float()

    def _enter_given(self, block: int) -> Tensor:
        recipe = self.spec.recipe
        first = recipe.plan(self._given, prefix_blocks=self._given)
        start, stop = recipe.blocks.frames_before(block), recipe.blocks.frames_before(block + 1)
        noisy = recipe.noisy_context and block >= recipe.noisy_context_start_chunk
        x, t = self._prefix[:, :, start:stop], first.times[-2] if noisy else 0.0
        self._pending = (replace(first, block=block, start=start, stop=stop), x, t)
        return x.float()

    def _leave_context(self) -> None:
        """Put the context of the block that was handed out last into the cache; what it was is
        remembered for `recache`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if isinstance(pending, ChunkResult):
            x, t = self._loop.commit(pending, self._cond)
        else:
            plan, x, t = pending
            x = (
                (1.0 - t) * x + t * self._loop.noise.context(slice(plan.start, plan.stop))
                if t > 0
                else x
            )
            self._loop.prefill(x, plan, self._cond, t=t)
        self._history[self._loop.newest] = (x, t)
        ids = {chunk.id for chunk in self._loop.cache.branches[0].chunks}
        self._history = {
            chunk_id: found for chunk_id, found in self._history.items() if chunk_id in ids
        }

    def _wanted_next(self) -> tuple[Condition, SwitchMode, Receipt] | None:
        """The change of condition that is due; refused here, before the old condition is gone."""
        if not self._wanted:
            return None
        wanted = self._wanted.pop()
        if wanted[1] == "recache":
            try:
                self._replayed()
            except SwitchRefused as error:
                wanted[2].refused = str(error)
                raise
        return wanted

    def _apply(self, cond: Condition, mode: SwitchMode, receipt: Receipt) -> None:
        self._cond = cond
        if mode == "recache":
            self._loop.refill(
                [(chunk, *self._history[chunk.id]) for chunk in self._replayed()], cond
            )
        receipt.applied_at = self._block

    def _replayed(self) -> list[CachedChunk]:
        """What a recache enters anew: all that the cache holds, sinks excepted. `SwitchRefused` for
        chunks that cannot be.
        """
        caches = self._loop.cache.branches
        kept = set(self._loop.canvas.policy.protected(caches))
        old = [chunk for chunk in caches[0].chunks if chunk.id not in kept]
        if missing := [
            chunk.id
            for chunk in old
            if chunk.id not in self._history or chunk.positions.frames is None
        ]:
            raise SwitchRefused(
                f"mode='recache' replays cached chunks, and {missing} are no longer what was"
                " generated (the policy merged them); use mode='keep', or a policy that keeps"
                " whole chunks"
            )
        return old

    @contextmanager
    def _marking(self) -> Iterator[None]:
        """An error within leaves the stream between two states: remembered, so that no later chunk
        is made of half a past.
        """
        try:
            yield
        except Exception as error:
            self._failed = error
            raise

    def _require_whole(self) -> None:
        self._require_open()
        if self._failed is not None:
            raise StreamCancelled(
                f"this stream failed ({first_line(self._failed)}); restart() it, or restore() a"
                " snapshot"
            )

    def _is_last(self, block: int) -> bool:
        frames = self.spec.num_frames
        return frames is not None and self.spec.recipe.blocks.frames_before(block + 1) >= frames

    def _require_open(self) -> None:
        if self._cancelled:
            raise StreamCancelled("this stream was cancelled or closed; open another session")
