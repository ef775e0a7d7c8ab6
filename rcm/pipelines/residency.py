"""Which model is on the device when: loaded at first use, and kept, moved to host memory or dropped
while it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from rcm.core.errors import ConfigError
from rcm.pipelines.part_clock import PartClock

Idle = Literal["keep", "cpu", "free"]
"""What becomes of a model that is not needed for now: it stays, waits in host memory, or is dropped
and read again at its next use.
"""

M = TypeVar("M")
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryPolicy:
    """What happens to each model when its work is done: the text encoder after the prompts, an
    expert when the other takes over, the network in charge when sampling is over, the codec between
    encoding the image and decoding.
    """

    text: Idle = "free"
    expert: Idle = "cpu"
    network: Idle = "keep"
    codec: Idle = "keep"

    @classmethod
    def preset(cls, name: str) -> MemoryPolicy:
        """A policy of `POLICIES` by name; `ConfigError` lists them."""
        if name not in POLICIES:
            raise ConfigError(
                f"memory policy {name!r} is unknown; choose --offload from {', '.join(POLICIES)}"
            )
        return POLICIES[name]


POLICIES: dict[str, MemoryPolicy] = {
    "none": MemoryPolicy(text="keep", expert="keep"),
    "idle": MemoryPolicy(),
    "low": MemoryPolicy(expert="free", network="free", codec="cpu"),
}
"""none: everything stays on the device. idle: the text encoder is dropped after the prompts, the
expert that is done waits in host memory. low: the least device and host memory, each model there
only while it works.
"""


class Resident(Generic[M]):
    """A model and where it is. `load` makes it on the device; `move(model, device)` moves it in
    place. Times go to `clock`.
    """

    def __init__(
        self,
        load: Callable[[], M],
        *,
        move: Callable[[M, torch.device], Any],
        device: torch.device,
        clock: PartClock,
    ) -> None:
        self.device, self.clock = device, clock
        self._load, self._move = load, move
        self._model: M | None = None
        self._away = False

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory, on the device or the host."""
        return self._model is not None

    def use(self) -> M:
        """The model, on the device: read or fetched if it is not there."""
        if self._model is None:
            with self.clock.part("load"):
                self._model = self._load()
        elif self._away:
            with self.clock.part("move"):
                self._move(self._model, self.device)
        self._away = False
        return self._model

    def lend(self, work: Callable[[M], T], *, then: Idle) -> T:
        """What `work` makes of the model, which rests afterwards."""
        made = work(self.use())
        self.rest(then)
        return made

    def rest(self, idle: Idle) -> None:
        """It is not needed for now. Whoever still holds it must let go, else "free" frees
        nothing.
        """
        if self._model is None or idle == "keep":
            return
        with self.clock.part("move"):
            if idle == "free":
                self._model = None
            elif not self._away and self.device.type != "cpu":
                self._move(self._model, torch.device("cpu"))
                self._away = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def move_codec(codec: object, device: torch.device) -> None:
    """Move a codec; one without weights works everywhere."""
    if hasattr(codec, "to"):
        codec.to(device)


def rest_encoder(encoder: object, idle: Idle) -> None:
    """An encoder is done; one without weights to free or to move has neither method."""
    if idle == "free" and hasattr(encoder, "unload"):
        encoder.unload()
    if idle == "cpu" and hasattr(encoder, "to"):
        encoder.to("cpu")
