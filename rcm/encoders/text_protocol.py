"""What the rest of the package asks of a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to padded embeddings: exact zeros after a prompt's last token, as umT5's are stored
    (docs/reference/encoders.md#umt5).
    """

    @property
    def text_len(self) -> int:
        """Rows of an embedding, padding included."""

    @property
    def text_dim(self) -> int:
        """Width of an embedding."""

    @property
    def negative_prompt(self) -> str:
        """The prompt of the unconditional branch of guidance."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [len(prompts), text_len, text_dim]; of "" one end-of-sentence row."""
