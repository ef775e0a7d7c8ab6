"""Embeddings on disk: a safetensors file per prompt, named by all that decides the numbers.

Several processes may share a folder: a file gets its name when it is complete, and equal names mean
equal content.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rcm.core.errors import ConfigError

FORMAT = 1  # raise it when the same key would give other numbers


@dataclass(frozen=True)
class PromptRows:
    """A prompt's embedding without padding, [tokens, dim]; `cut`: text that did not fit."""

    rows: Tensor
    cut: str = ""


class EmbeddingCache:
    """A folder of one encoder's embeddings; `identity`: its weights, tokenizer, length, dtype."""

    def __init__(self, folder: str | Path, *, identity: Mapping[str, str]) -> None:
        self._folder, self._identity = Path(folder), dict(identity)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the folder {folder} for cached embeddings ({error}); choose another"
                " folder (--text_cache, cache=)"
            ) from error

    def path(self, prompt: str) -> Path:
        """Where the embedding of a cleaned prompt is, or would be."""
        key = json.dumps({"format": FORMAT, "prompt": prompt, **self._identity}, sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def get(
        self, prompt: str, *, text_len: int, text_dim: int, dtype: torch.dtype
    ) -> PromptRows | None:
        """The stored rows of a cleaned prompt, on the CPU; None, with a warning if damaged."""
        path = self.path(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                meta, rows = file.metadata() or {}, file.get_tensor("rows")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            _distrusted(path, str(error))
            return None
        if meta.get("prompt") != prompt:
            _distrusted(path, f"it is of another prompt, {str(meta.get('prompt'))[:80]!r}")
            return None
        fits = (
            rows.ndim == 2
            and 1 <= rows.shape[0] <= text_len
            and rows.shape[1] == text_dim
            and rows.dtype == dtype
        )
        if not fits or not bool(torch.isfinite(rows).all()):
            held = f"it holds {rows.dtype} {list(rows.shape)}, or numbers that are not finite"
            _distrusted(path, held)
            return None
        return PromptRows(rows, meta.get("cut", ""))

    def put(self, prompt: str, found: PromptRows) -> None:
        """Store the rows of a cleaned prompt; a disk that takes none is only a warning."""
        meta = {"prompt": prompt, "cut": found.cut, **self._identity}
        data = save({"rows": found.rows.cpu().contiguous()}, metadata=meta)
        try:
            _write(self.path(prompt), data)
        except OSError as error:
            logger.warning(
                f"the embedding of {prompt[:80]!r} is not cached in {self._folder}: {error}"
            )


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".writing_{os.getpid()}_{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _distrusted(path: Path, reason: str) -> None:
    logger.warning(f"cached embedding {path} is damaged ({reason}); it is made again")
