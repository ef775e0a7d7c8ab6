"""Whose draws a random generator serves: a video's noise is drawn in an order, which two sessions
at once would take from each other.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch

from rcm.core.errors import ConfigError


class Drawing(Protocol):
    """A session, as far as its draws are concerned."""

    @property
    def may_draw(self) -> bool:
        """Whether it may still ask its generator for numbers."""
        ...


_held: weakref.WeakKeyDictionary[torch.Generator, weakref.ref[Drawing]] = (
    weakref.WeakKeyDictionary()
)


def lease(generator: torch.Generator | None, session: Drawing) -> None:
    """Let `session` draw from `generator`, if it has one. `ConfigError` while another session
    may.
    """
    if generator is None:
        return
    known = _held.get(generator)
    other = None if known is None else known()
    if other is not None and other is not session and other.may_draw:
        raise ConfigError(
            "generator= draws for another session that is still open, and each would change the"
            " other's noise; give every session a torch.Generator of its own, or close() the other"
            " one first"
        )
    _held[generator] = weakref.ref(session)
