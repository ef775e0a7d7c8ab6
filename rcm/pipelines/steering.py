"""What a stream is made under: the condition in force, the one that is wanted next, and the
contexts that can be entered anew for it.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.kv_view import CachedChunk
from rcm.pipelines.finite import net_of
from rcm.pipelines.stream_spec import Receipt, SwitchMode, SwitchRefused
from rcm.rollout.autoregressive import ChunkLoop, ChunkResult
from rcm.rollout.plan import ChunkPlan

Change = tuple[Condition, SwitchMode, Receipt]
Pending = ChunkResult | tuple[ChunkPlan, Tensor, float]
"""A block whose context is not in the cache yet: denoised, or given as latents that are entered at
an RF time.
"""


def require_fitting(cond: Condition, loop: ChunkLoop) -> None:
    """`ConfigError` for a condition that the passes of `loop` could not take: another device, text
    of another size, channels of frames that the policy places anew, and for captured passes other
    shapes than those of the first.
    """
    net, text = net_of(loop.denoiser), cond.text
    weight = next(net.parameters(), text)
    if text.device.type != weight.device.type:
        raise ConfigError(
            f"the condition lies on {text.device}, the network on {weight.device}; move it with"
            f" cond.to(device='{weight.device}')"
        )
    config: Any = getattr(net, "config", None)
    length, width = (getattr(config, name, None) for name in ("text_len", "text_dim"))
    if length is not None and (text.shape[1] > length or text.shape[2] != width):
        raise ConfigError(
            f"the text of a condition must be [B, up to {length}, {width}], got"
            f" {list(text.shape)}; encode it with the network's own text encoder"
        )
    policy = loop.canvas.policy
    if cond.concat is not None and not policy.absolute:
        raise ConfigError(
            f"the condition has channels for the frames of a video, and {type(policy).__name__} has"
            " chunks stand elsewhere; choose a policy of absolute positions, such as SlidingWindow"
        )
    if (first := loop.captured_for()) is not None:
        mine, theirs = ([list(x.shape) for x in c.tensors()] for c in (cond, first))
        if mine != theirs:
            raise ConfigError(
                "the passes of this stream are captured for conditions of the shapes of its first,"
                f" text {theirs[0]} and {len(theirs) - 1} more tensors, got text {mine[0]} and"
                f" {len(mine) - 1}; pad and prepare() it like the first, or use graphs='off'"
            )


class Steering:
    """The condition `cond` of a stream under way, and how it changes at chunk boundaries."""

    def __init__(self, cond: Condition) -> None:
        self.cond = cond
        self._wanted: Change | None = None
        self._lock = threading.Lock()  # any thread asks
        self._contexts: dict[int, tuple[Tensor, float]] = {}

    @property
    def asked(self) -> bool:
        """Whether a change waits for the next chunk."""
        return self._wanted is not None

    def ask(self, cond: Condition, mode: SwitchMode) -> Receipt:
        """See `Session.set_condition`."""
        if mode not in ("keep", "recache"):
            raise ConfigError(f"switch mode {mode!r} is not one of 'keep', 'recache'")
        receipt = Receipt()
        if (old := self._exchanged((cond, mode, receipt))) is not None:
            old[2].superseded = True
        return receipt

    def due(self, loop: ChunkLoop) -> tuple[Change | None, SwitchRefused | None]:
        """The change that is taken up now, and why it cannot be."""
        change = self._exchanged(None)
        try:
            if change is not None and change[1] == "recache":
                self.replayed(loop)
        except SwitchRefused as error:
            return change, error
        return change, None

    def refuse(self, change: Change | None, why: str) -> None:
        """Tell the receipt of `change`, or of the one that waits, which is taken back."""
        if (change := change or self._exchanged(None)) is not None:
            change[2].refused = why

    def apply(self, change: Change, loop: ChunkLoop, *, block: int) -> None:
        """Take up a change before `block` is made."""
        self.cond, mode, receipt = change
        try:
            if mode == "recache":
                old = self.replayed(loop)
                loop.refill([(chunk, *self._contexts[chunk.id]) for chunk in old], self.cond)
        except BaseException:
            self.refuse(change, "the stream failed as it was taken up")
            raise
        receipt.applied_at = block

    def enter(self, loop: ChunkLoop, pending: Pending) -> None:
        """Put the context of a block into the cache, and remember what it was."""
        if isinstance(pending, ChunkResult):
            x, t = loop.commit(pending, self.cond)
        else:
            plan, x, t = pending
            if t > 0:
                x = (1.0 - t) * x + t * loop.noise.context(slice(plan.start, plan.stop))
            loop.prefill(x, plan, self.cond, t=t)
        self._remember(loop, x, t)

    def _remember(self, loop: ChunkLoop, x: Tensor, t: float) -> None:
        assert loop.newest is not None
        self._contexts[loop.newest] = (x, t)
        held = {chunk.id for chunk in loop.cache.branches[0].chunks}
        self._contexts = {number: x for number, x in self._contexts.items() if number in held}

    def replayed(self, loop: ChunkLoop) -> list[CachedChunk]:
        """What a recache enters anew: all that the cache holds, sinks excepted. `SwitchRefused` for
        chunks that cannot be.
        """
        caches = loop.cache.branches
        kept = set(loop.canvas.policy.protected(caches))
        old = [chunk for chunk in caches[0].chunks if chunk.id not in kept]
        if missing := [
            chunk.id
            for chunk in old
            if chunk.id not in self._contexts or chunk.positions.frames is None
        ]:
            raise SwitchRefused(
                f"mode='recache' replays cached chunks, and {missing} are no longer what was"
                " generated (the policy merged them); use mode='keep', or a policy that keeps"
                " whole chunks"
            )
        return old

    def end(self) -> None:
        """Free the contexts, and tell who waits."""
        self.refuse(None, "the stream ended before")
        self._contexts.clear()

    def state(self) -> dict[str, Any]:
        """What `load_state` goes on from."""
        wanted = self._wanted and self._wanted[:2]
        return {"cond": self.cond, "wanted": wanted, "contexts": dict(self._contexts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a `state`; nobody holds the receipts of its changes."""
        self.cond, self._contexts = state["cond"], dict(state["contexts"])
        wanted = state["wanted"] and (*state["wanted"], Receipt())
        if (old := self._exchanged(wanted)) is not None:
            old[2].refused = "a snapshot was taken up before"

    def _exchanged(self, change: Change | None) -> Change | None:
        """What was wanted, in whose place `change` is now."""
        with self._lock:
            old, self._wanted = self._wanted, change
        return old
