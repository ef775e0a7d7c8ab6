"""Caption embeddings with nothing to download: a fixed random sign vector for every word."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor

from rcm.core.errors import ConfigError

END_OF_SENTENCE = "</s>"
# position moves a row by a quarter of a word: order is visible, words stay recognisable
_POSITION_WEIGHT = 0.25


def tokens_of(prompt: str) -> list[str]:
    """Lower-case words (letters and digits of any script), then the end-of-sentence token."""
    return [*re.findall(r"\w+", prompt.lower()), END_OF_SENTENCE]


def vocabulary(captions: Iterable[str], *, limit: int = 256) -> tuple[str, ...]:
    """Distinct words of captions, sorted; none if more than `limit`, which nobody would read."""
    words: set[str] = set()
    for caption in captions:
        words.update(tokens_of(caption))
        if len(words) > limit:
            return ()
    return tuple(sorted(words - {END_OF_SENTENCE}))


def word_vector(word: str, *, dim: int) -> Tensor:
    """Signs float32 [dim] from SHA-256 of the word: nearly orthogonal, the same everywhere."""
    bits: list[int] = []
    for block in range(math.ceil(dim / 256)):
        digest = hashlib.sha256(f"{block}:{word}".encode()).digest()
        bits += [(byte >> i) & 1 for byte in digest for i in range(8)]
    return 2.0 * torch.tensor(bits[:dim], dtype=torch.float32) - 1.0


@dataclass(frozen=True)
class ToyTextEncoder:
    """A `TextEncoder` of `text_len` rows of width `text_dim`.

    `negative_prompt` is the unconditional branch's prompt; empty by default, which is also what
    `build_dataset --empty-prompts` trains. `words`: those of the captions it was trained with
    (empty: not recorded); others are encoded too, after a warning, for their rows mean nothing to
    the network.
    """

    text_len: int = 8
    text_dim: int = 64
    negative_prompt: str = ""
    words: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))  # a description brings a list
        if self.text_len < 1 or self.text_dim < 2 or self.text_dim % 2:
            raise ConfigError(
                f"toy text needs text_len >= 1 and an even text_dim, got {self.text_len} and"
                f" {self.text_dim}"
            )

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings float32 [len(prompts), text_len, text_dim]: word vector plus position, then
        zeros.

        `ConfigError` for more than `text_len - 1` words: a cut caption would train the wrong thing.
        """
        out = torch.zeros(len(prompts), self.text_len, self.text_dim)
        positions = _POSITION_WEIGHT * self._positions()
        vectors: dict[str, Tensor] = {}
        for row, prompt in zip(out, prompts, strict=True):
            words = tokens_of(prompt)
            if unknown := self.unknown_words(prompt):
                logger.warning(
                    "prompt {!r}: {} {} new to this checkpoint and will be ignored or misread; it"
                    " knows {}",
                    prompt[:80],
                    ", ".join(map(repr, unknown)),
                    "is" if len(unknown) == 1 else "are",
                    ", ".join(self.words),
                )
            if len(words) > self.text_len:
                raise ConfigError(
                    f"prompt of {len(words) - 1} words and the end token does not fit"
                    f" text_len={self.text_len}: {prompt[:80]!r}; shorten it or raise text_len"
                )
            for word in words:
                if word not in vectors:
                    vectors[word] = word_vector(word, dim=self.text_dim)
            row[: len(words)] = (
                torch.stack([vectors[word] for word in words]) + positions[: len(words)]
            )
        return out

    def unknown_words(self, prompt: str) -> list[str]:
        """Distinct words that the training captions did not have, where those are recorded."""
        if not self.words:
            return []
        known = {*self.words, END_OF_SENTENCE}
        return [word for word in dict.fromkeys(tokens_of(prompt)) if word not in known]

    def _positions(self) -> Tensor:
        """Sinusoids [text_len, text_dim] over geometric wavelengths, unit mean square."""
        half = self.text_dim // 2
        angle = torch.arange(self.text_len)[:, None] * torch.exp(
            -math.log(100.0) * torch.arange(half) / half
        )
        return math.sqrt(2.0) * torch.cat([angle.sin(), angle.cos()], dim=1)
