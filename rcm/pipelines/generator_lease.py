"""Whose draws a random generator serves: a video's noise is drawn in an order, which two sessions
at once would take from each other.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch

from rcm.core.errors import ConfigError


class Drawing(Protocol):
    """A session, as far as its draws are concerned. It holds its generator."""

    @property
    def may_draw(self) -> bool:
        """Whether it may still ask its generator for numbers."""
        ...


_held: weakref.WeakValueDictionary[int, Drawing] = weakref.WeakValueDictionary()
"""By the generator's `id`, which is its own while the session lives: generators of torch 2.11 take
no weak references.
"""


def lease(generator: torch.Generator | None, session: Drawing) -> None:
    """Let `session` draw from `generator`, if it has one. `ConfigError` while another session
    may.
    """
    if generator is None:
        return
    other = _held.get(id(generator))
    if other is not None and other is not session and other.may_draw:
        raise ConfigError(
            "generator= draws for another session that is still open, and each would change the"
            " other's noise; give every session a torch.Generator of its own, or close() the other"
            " one first"
        )
    _held[id(generator)] = session
