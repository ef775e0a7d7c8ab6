"""Embeddings with umT5's shape and nothing to load: for speed tests of all behind them."""

from __future__ import annotations

import torch
from torch import nn

from rcm.core.rng import generator, randn
from rcm.encoders.text_cache import PromptRows


class RandomRows:
    """Normal rows that depend on (seed, prompt) only: one per word, one for the end."""

    def __init__(self, *, text_len: int, text_dim: int, seed: int, dtype: torch.dtype) -> None:
        self.text_dim = text_dim
        self._text_len, self._seed, self._dtype = text_len, seed, dtype

    def build(self, device: torch.device) -> nn.Module:
        return nn.Identity()

    def embed(self, cleaned: str, *, net: nn.Module, device: torch.device) -> PromptRows:
        """Rows [words + 1, text_dim], at most text_len of them, the same on every device."""
        words = cleaned.split()
        length = min(len(words) + 1, self._text_len)
        stream = generator(seed=self._seed, step=0, dp_rank=0, purpose=f"text of {cleaned}")
        rows = randn((length, self.text_dim), generator=stream, dtype=self._dtype, device=device)
        return PromptRows(rows, " ".join(words[self._text_len - 1 :]))

    def describe(self) -> dict[str, str]:
        return {"name": "random", "seed": str(self._seed)}
