"""What goes over the socket: pictures as binary messages, everything else as JSON. `docs/serve.md`
is the reference for clients.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from rcm.core.rng import SEEDS
from rcm.encoders.prompt_cleaning import says_nothing
from rcm.serve.limits import Limits

Format = Literal["jpeg", "webp", "png"]
FORMATS: tuple[Format, ...] = ("jpeg", "webp", "png")
HEADER = struct.Struct("<BBHIIId")
"""Of a picture, little-endian, 24 bytes: version, format (1 jpeg, 2 webp, 3 png), take, chunk,
frame of the take, number among all pictures of the stream (a gap: pictures were dropped), seconds
since the stream was opened.
"""
VERSION = 1


class ProtocolError(ValueError):
    """A message that means nothing; the sentence goes back to its sender, under the message's `id`
    where it had one.
    """

    def __init__(self, sentence: str, message_id: Any = None) -> None:
        super().__init__(sentence)
        self.message_id = message_id


@dataclass(frozen=True)
class Picture:
    """One encoded frame of a stream."""

    take: int
    chunk: int
    frame: int
    image: bytes
    kind: Format

    def message(self, number: int, seconds: float) -> bytes:
        """The binary message."""
        kind = FORMATS.index(self.kind) + 1
        return (
            HEADER.pack(
                VERSION, kind, self.take % 2**16, self.chunk, self.frame, number % 2**32, seconds
            )
            + self.image
        )


def encode_image(pixels: np.ndarray, kind: Format, *, quality: int) -> bytes:
    """An image file of uint8 `pixels` [H, W, 3]. `quality` 1 to 100 for jpeg and webp; png is
    exact.
    """
    out = io.BytesIO()
    options = {
        "jpeg": {"quality": quality},
        "webp": {"quality": quality, "method": 0},
        "png": {"compress_level": 1},
    }[kind]
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@dataclass(frozen=True)
class Message:
    """A message of a client, checked: its `id` (given back in receipts), and what it asks for;
    None: nothing of the kind.
    """

    id: Any = None
    prompt: str | None = None
    mode: Literal["keep", "recache"] = "keep"
    play: bool | None = None
    seed: int | None = None
    steps: tuple[int, ...] | None = None
    context: Literal["clean", "noisy"] | None = None
    window: int | None = None
    ping: float | None = None

    @property
    def changes(self) -> list[str]:
        """The names of the changes that it asks for, those that get receipts."""
        return [
            name
            for name in ("prompt", "seed", "steps", "context", "window", "play")
            if getattr(self, name) is not None
        ]


def read_message(text: str | bytes, limits: Limits) -> Message:
    """The message in `text`; `ProtocolError`, one sentence, for one that is too long, no JSON
    object, or out of bounds.
    """
    if len(text) > limits.message_bytes:
        raise ProtocolError(
            f"a message has at most {limits.message_bytes} bytes, this one has {len(text)}"
        )
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("a message is a JSON object, this one is not JSON") from None
    if not isinstance(given, dict):
        raise ProtocolError(f"a message is a JSON object, got a {type(given).__name__}")
    message_id = given.get("id")
    if not isinstance(message_id, int | str | None) or len(str(message_id)) > 64:
        raise ProtocolError("id is a number or a short text")
    unknown = sorted(set(given) - set(Message.__dataclass_fields__))
    if unknown:
        known = ", ".join(Message.__dataclass_fields__)
        raise ProtocolError(
            f"unknown {', '.join(repr(key[:40]) for key in unknown[:5])}; a message may have"
            f" {known}",
            message_id,
        )
    try:
        message = Message(
            **{
                key: _READERS[key](value, limits)
                for key, value in given.items()
                if value is not None
            }
        )
    except ProtocolError as error:
        error.message_id = message_id
        raise
    if message.ping is None and not message.changes:
        raise ProtocolError(
            "the message asks for nothing; give prompt, play, seed, steps, context or window",
            message_id,
        )
    return message


def _prompt(value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or says_nothing(value):
        raise ProtocolError("prompt is a text that says something")
    if len(value) > limits.prompt_chars:
        raise ProtocolError(
            f"prompt has at most {limits.prompt_chars} characters, this one has {len(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProtocolError("prompt has half a character (a lone surrogate) in it") from None
    return value.strip()


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ProtocolError(
            f"{name} is a whole number from {least} to {most}, got {str(value)[:40]}"
        )
    return value


def _steps(value: Any, limits: Limits) -> tuple[int, ...]:
    listed: Sequence[Any] = value if isinstance(value, list) else [value]
    if not 1 <= len(listed) <= 16:
        raise ProtocolError(
            f"steps lists 1 to 16 numbers, one per chunk, the last repeats; got {len(listed)}"
        )
    return tuple(_whole("each of steps", entry, 1, limits.steps) for entry in listed)


def _choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ProtocolError(f"{name} is one of {', '.join(choices)}, got {str(value)[:40]!r}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise ProtocolError("ping is a number, which comes back in the pong")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError("play is true or false")
    return value


_READERS: dict[str, Any] = {
    "id": lambda value, limits: value,
    "prompt": _prompt,
    "mode": lambda value, limits: _choice("mode", value, ("keep", "recache")),
    "play": lambda value, limits: _flag(value),
    "seed": lambda value, limits: _whole("seed", value, 0, SEEDS - 1),
    "steps": _steps,
    "context": lambda value, limits: _choice("context", value, ("clean", "noisy")),
    "window": lambda value, limits: _whole("window", value, 1, limits.window),
    "ping": lambda value, limits: _number(value),
}
