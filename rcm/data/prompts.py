"""Prompts without videos, for on-policy training and for sampling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rcm.core.errors import ConfigError
from rcm.core.text_file import read_lines
from rcm.data.batch import PromptBatch
from rcm.encoders.prompt_cleaning import says_nothing
from rcm.storage.json_file import keys_once


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file (one per line, those that say nothing skipped) or of a `.jsonl` file
    (objects with a "prompt" string, which may be empty).

    Raises `ConfigError` for a missing or empty file, one that is no text (`read_text`) or has the
    name of a table (.csv, .json), or a line without a prompt, naming file and line.
    """
    path = Path(path)
    require_lines(path, others=(".csv", ".json"))
    lines = read_lines(path, what="prompt file", knob="the prompt file's path")
    if path.suffix.lower() == ".jsonl":
        prompts = [
            _json_prompt(line, f"{path}:{number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        prompts = [line.strip() for line in lines if not says_nothing(line)]
    if not prompts:
        raise ConfigError(f"prompt file {path} holds no prompt")
    return prompts


TABLES = (".csv", ".json", ".jsonl")
"""Names of files whose lines are no prompts as they stand."""


def require_lines(path: str | Path, *, others: Sequence[str] = TABLES) -> None:
    """`ConfigError` for a file whose name says that its lines are no prompts."""
    if Path(path).suffix.lower() in others:
        records = "" if ".jsonl" in others else ', or a .jsonl with a {"prompt": ...} per line'
        raise ConfigError(
            f"prompt file {path} would be read line by line; write a text with a prompt per line"
            f"{records}"
        )


def json_line(line: str, place: str) -> Any:
    """The value of a line of a .jsonl file; `ConfigError` names its `place`."""
    try:
        value = json.loads(line, object_pairs_hook=keys_once)
        json.dumps(value, ensure_ascii=False).encode()  # an escape can be half a character
        return value
    # also numbers too long and lists too deep to be read
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {str(error)[:200]}") from error


def _json_prompt(line: str, place: str) -> str:
    record = json_line(line, place)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ConfigError(f'{place} needs a "prompt" string, got {line[:80]}')
    return record["prompt"]


class Prompts:
    """A `loader.Source` of `PromptBatch`; `encode` makes embeddings, as `TextEncoder.encode`."""

    def __init__(
        self, prompts: Sequence[str], *, encode: Callable[[Sequence[str]], torch.Tensor]
    ) -> None:
        if not prompts:
            raise ConfigError("a prompt source needs at least one prompt")
        self._prompts, self._encode, self._fingerprint = list(prompts), encode, ""

    def __len__(self) -> int:
        return len(self._prompts)

    def fetch(self, indices: Sequence[int]) -> PromptBatch:
        chosen = [self._prompts[i] for i in indices]
        return PromptBatch(self._encode(chosen).float(), chosen)

    def captions(self) -> Iterator[str]:
        return iter(self._prompts)

    def fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = hashlib.sha256("\n".join(self._prompts).encode()).hexdigest()[:16]
        return self._fingerprint
