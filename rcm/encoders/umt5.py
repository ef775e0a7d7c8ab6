"""umT5 as a text encoder: prompts to [B, 512, 4096] with exact zeros after each prompt's end.
docs/reference/encoders.md#umt5.

The 11 GB are read at the first prompt that is not cached, and freed by `unload()`. Prompts go
through the network one by one, padded to `text_len` with the pads masked, as the original does for
a batch of one; so an embedding never depends on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from loguru import logger
from torch import Tensor, nn

from rcm.core.errors import ConfigError, NonFinite
from rcm.core.rng import generator, randn
from rcm.encoders.lazy_module import LazyModule
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT, clean_prompt
from rcm.encoders.text_cache import EmbeddingCache, PromptRows
from rcm.encoders.umt5_tokenizer import UMT5Tokenizer, find_tokenizer, open_tokenizer
from rcm.encoders.umt5_weights import UMT5_FILE, UMT5Shape, load_umt5, open_umt5, require_dtype
from rcm.storage.identity import content_identity

TEXT_LEN = 512
PAD_ID = 0
_QUOTED = 300  # characters of a cut that a warning shows


class RowSource(Protocol):
    """What makes the unpadded rows of a cleaned prompt, of width `text_dim`."""

    text_dim: int

    def build(self, device: torch.device) -> nn.Module:
        """The network that `embed` needs, on `device`."""

    def embed(self, cleaned: str, *, net: nn.Module, device: torch.device) -> PromptRows:
        """Rows of one cleaned prompt, on `device`, where `net` is."""

    def describe(self) -> dict[str, str]:
        """Name and files, as a checkpoint's self-description keeps them."""


class UMT5Rows:
    """A `RowSource` that runs umT5 of `shape` from the file `weights`."""

    def __init__(
        self,
        weights: Path,
        *,
        shape: UMT5Shape,
        tokenizer: UMT5Tokenizer,
        text_len: int,
        dtype: torch.dtype,
    ) -> None:
        if tokenizer.vocab > shape.vocab:
            raise ConfigError(
                f"{tokenizer.path} has {tokenizer.vocab} ids, {weights} embeds {shape.vocab}: they"
                " do not belong together"
            )
        self.text_dim = shape.dim
        self._weights, self._tokenizer, self._text_len = weights, tokenizer, text_len
        self._dtype = dtype

    def build(self, device: torch.device) -> nn.Module:
        """The encoder; the file is opened for every load, as it may have been replaced."""
        return load_umt5(open_umt5(self._weights), device=device, dtype=self._dtype)

    def embed(self, cleaned: str, *, net: nn.Module, device: torch.device) -> PromptRows:
        """Rows [tokens, text_dim] in the weights' dtype; `NonFinite` for NaN or infinity."""
        tokens = self._tokenizer.tokens(cleaned, text_len=self._text_len)
        length = len(tokens.ids)
        ids = torch.full((1, self._text_len), PAD_ID)
        ids[0, :length] = torch.tensor(tokens.ids)
        mask = (torch.arange(self._text_len) < length).long()[None]
        out = net(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        rows = out[0, :length].clone()
        if not bool(torch.isfinite(rows).all()):
            raise NonFinite(
                f"umT5 gives values that are not finite for {cleaned[:80]!r}: damaged weights in"
                f" {self._weights}?"
            )
        return PromptRows(rows, tokens.cut)

    def describe(self) -> dict[str, str]:
        return {
            "name": "umt5",
            "path": str(self._weights),
            "tokenizer": str(self._tokenizer.path.parent),
        }


class UMT5TextEncoder(LazyModule):
    """A `TextEncoder` for Wan, made with `from_files` or `random`: cleans prompts, looks into the
    cache, encodes what is not there, pads with exact zeros.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        text_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
        cache: EmbeddingCache | None = None,
        negative_prompt: str = NEGATIVE_PROMPT,
    ) -> None:
        if text_len < 1:
            raise ConfigError(
                f"text_len must be at least 1 (the end-of-sentence row), got {text_len}"
            )
        super().__init__(source.build, device=device)
        self.text_len, self.text_dim = text_len, source.text_dim
        self.negative_prompt = negative_prompt
        self.dtype = dtype
        self._source, self._cache = source, cache

    @classmethod
    def from_files(
        cls,
        weights: str | Path = UMT5_FILE,
        *,
        tokenizer: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        cache: str | Path | None = None,
        text_len: int = TEXT_LEN,
        negative_prompt: str = NEGATIVE_PROMPT,
    ) -> UMT5TextEncoder:
        """umT5 from its original `.pth`, safetensors or a folder of shards, of either naming.

        `tokenizer`: folder of google/umt5-xxl's files; None looks beside the weights. `cache`: a
        folder for embeddings, which processes may share; weights are not read for prompts in it.
        Raises now: `CheckpointError` for weights that do not fit, `ConfigError` for a missing
        tokenizer or package and for an unsupported dtype.
        """
        weights = Path(weights)
        require_dtype(dtype)
        # before the tokenizer: whoever has neither file hears of the larger one first
        shape = open_umt5(weights).shape
        words = open_tokenizer(find_tokenizer(tokenizer, weights=weights))
        source = UMT5Rows(weights, shape=shape, tokenizer=words, text_len=text_len, dtype=dtype)
        store = None
        if cache is not None:
            identity = {
                "weights": content_identity(weights),
                "tokenizer": words.identity,
                "text_len": str(text_len),
                "dtype": str(dtype),
            }
            store = EmbeddingCache(cache, identity=identity)
        return cls(
            source,
            text_len=text_len,
            device=device,
            dtype=dtype,
            cache=store,
            negative_prompt=negative_prompt,
        )

    @classmethod
    def random(
        cls,
        *,
        text_len: int = TEXT_LEN,
        text_dim: int = 4096,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> UMT5TextEncoder:
        """Noise in umT5's shape from (seed, prompt), one row per word: for speed tests."""
        source = RandomRows(text_len=text_len, text_dim=text_dim, seed=seed, dtype=dtype)
        return cls(source, text_len=text_len, device=device, dtype=dtype)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [len(prompts), text_len, text_dim] on `device`; equal prompts are encoded
        once.

        Of a prompt that is too long, a warning quotes what is cut, also when rows are cached.
        """
        if isinstance(prompts, str):
            raise TypeError(
                f"encode takes a list of prompts, got one string {prompts[:80]!r}; wrap it in a"
                " list"
            )
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        found = {text: self._rows(text) for text in dict.fromkeys(cleaned)}
        out = torch.zeros(
            len(cleaned), self.text_len, self.text_dim, dtype=self.dtype, device=self.device
        )
        for padded, text in zip(out, cleaned, strict=True):
            rows = found[text].rows
            padded[: rows.shape[0]] = rows
        return out

    @contextmanager
    def loaded(self) -> Iterator[UMT5TextEncoder]:
        """Inside, weights stay in memory once needed; on leaving they are freed."""
        try:
            yield self
        finally:
            self.unload()

    def describe(self) -> dict[str, str]:
        return self._source.describe()

    def _rows(self, cleaned: str) -> PromptRows:
        found = None
        if self._cache is not None:
            found = self._cache.get(
                cleaned, text_len=self.text_len, text_dim=self.text_dim, dtype=self.dtype
            )
        if found is None:
            found = self._source.embed(cleaned, net=self.load(), device=self.device)
            if self._cache is not None:
                self._cache.put(cleaned, found)
        if found.cut:
            quoted = found.cut
            if len(quoted) > _QUOTED:
                quoted = f"{quoted[:_QUOTED]}... ({len(quoted)} characters)"
            logger.warning(
                f"the prompt {cleaned[:60]!r} is longer than {self.text_len} tokens; left out:"
                f" {quoted!r}"
            )
        return found


class RandomRows:
    """Nothing to load, for speed tests of all behind it: normal rows that depend on (seed, prompt)
    only, one per word, one for the end.
    """

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
