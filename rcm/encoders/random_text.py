"""Embeddings with umT5's shape and nothing to load: for speed tests of everything behind the text encoder."""

from __future__ import annotations

import torch

from rcm.core.rng import generator, randn
from rcm.encoders.text_cache import PromptRows


class RandomRows:
    """Standard normal rows that depend on (seed, prompt) only: one per word, and one for the end of the sentence."""

    is_loaded = True

    def __init__(self, *, text_len: int, text_dim: int, seed: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.text_dim = text_dim
        self.device = torch.device(device)
        self._text_len, self._seed, self._dtype = text_len, seed, dtype

    def embed(self, cleaned: str) -> PromptRows:
        """Rows [words + 1, text_dim], at most text_len of them; the words that did not fit are the cut."""
        words = cleaned.split()
        length = min(len(words) + 1, self._text_len)
        stream = generator(seed=self._seed, step=0, dp_rank=0, purpose=f"text of {cleaned}")
        rows = randn((length, self.text_dim), generator=stream, dtype=self._dtype, device=self.device)
        return PromptRows(rows, " ".join(words[self._text_len - 1 :]))

    def load(self) -> None:
        """There is nothing to load."""

    def unload(self) -> None:
        """There is nothing to free."""

    def to(self, device: torch.device | str) -> None:
        """Make rows on `device` from now on; they are drawn on the CPU, so the numbers stay the same."""
        self.device = torch.device(device)

    def describe(self) -> dict[str, str]:
        """Says that the embeddings mean nothing."""
        return {"name": "random", "seed": str(self._seed)}
