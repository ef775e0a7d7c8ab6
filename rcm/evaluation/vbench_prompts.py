"""Prompt lists of the VBench suites: videos, their names, and the texts they are made from.

The ORIGINAL prompt names the file and is what the scorer compares with; the extended prompt, if
any, is what the model is given. (VBench, Huang et al. 2024, arXiv 2311.17982.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.core.text_file import read_lines, read_text
from rcm.evaluation.vbench_results import json_value

T2V_FILE = "t2v_prompts.jsonl"
"""The public prompt list, in the order of VBench_full_info.json: one entry a line."""

MAX_NAME_BYTES = 255 - len(".") - len(".partial")
"""Of a file name, so that the temporary name beside it fits as well."""

_TEXT_KEYS, _DIMENSION_KEYS = ("prompt_en", "prompt"), ("dimension", "dimensions")
_STRINGS = ("augmented_prompt", "image_name", "image_type")


@dataclass(frozen=True)
class SuiteItem:
    """One prompt of a suite. `dimensions` that score its videos; `extended` what the model is given
    (None: the prompt itself); `auxiliary_info` the scorer's targets by dimension; `image_name`,
    `image_type` of image-to-video.
    """

    prompt: str
    dimensions: tuple[str, ...]
    auxiliary_info: Mapping[str, Any] = field(default_factory=dict)
    extended: str | None = None
    image_name: str | None = None
    image_type: str | None = None

    @property
    def text(self) -> str:
        """What the model is given."""
        return self.prompt if self.extended is None else self.extended

    def video_name(self, sample: int) -> str:
        """File name of a sample: the original prompt, "/" as "-", a line break as a space."""
        return f"{self.prompt.replace('/', '-').replace(chr(10), ' ')}-{sample}.mp4"

    def eval_row(self, videos: Sequence[str]) -> dict[str, Any]:
        """The entry of this item in `vbench_eval_info.json`."""
        row: dict[str, Any] = {"prompt_en": self.prompt, "dimension": list(self.dimensions)}
        if self.auxiliary_info:
            row["auxiliary_info"] = dict(self.auxiliary_info)
        if self.image_name is not None:
            row["image_name"], row["image_type"] = self.image_name, self.image_type
        return {**row, "video_list": list(videos)}


def read_suite(path: str | Path) -> list[SuiteItem]:
    """The distinct prompts of a list, in order of first appearance; the dimensions of repeated ones
    are joined, the last extended text wins.

    `path`: a JSON array or JSON lines of objects with `prompt_en` (or `prompt`), `dimension` (or
    `dimensions`) and, where known, `augmented_prompt`, `auxiliary_info`, `image_name`,
    `image_type`. `ConfigError`, naming the entry, for anything else, a name that no file can have,
    and prompts whose files would replace each other.
    """
    items: dict[str, SuiteItem] = {}
    for place, row in _rows(Path(path)):
        item = _item(row, place)
        known = items.get(item.prompt)
        items[item.prompt] = item if known is None else _joined(known, item, place)
    if not items:
        raise ConfigError(f"{path} lists no prompt; give --prompt_json a list with at least one")
    _check_names(items.values(), path)
    return list(items.values())


def read_rows(path: str | Path) -> list[str]:
    """The original prompt of every entry, repeated ones too: extended prompts count by them."""
    return [_item(row, place).prompt for place, row in _rows(Path(path))]


def with_extended(
    items: Sequence[SuiteItem], path: str | Path, *, rows: Sequence[str]
) -> list[SuiteItem]:
    """`items` with the extended prompts of `path`: a list of objects with `prompt` and
    `augmented_prompt`, or a text file with a line per entry of `rows`. Of a prompt that is listed
    twice the later text counts. `ConfigError` for missing prompts, and for a text file of another
    number of lines.
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        texts = {
            item.prompt: item.extended for item in read_suite(path) if item.extended is not None
        }
    else:
        lines = read_lines(path, what="file of extended prompts")
        if len(lines) != len(rows):
            raise ConfigError(
                f"{path} has {len(lines)} lines, the prompt list has {len(rows)} entries; extended"
                " prompts go line by line"
            )
        texts = dict(zip(rows, (line.strip() for line in lines), strict=True))
    missing = [item.prompt for item in items if not texts.get(item.prompt)]
    if missing:
        raise ConfigError(
            f"{path} has no extended prompt for {len(missing)} of {len(items)} prompts, the first"
            f" is {missing[0]!r}"
        )
    return [replace(item, extended=texts[item.prompt]) for item in items]


def placed_extensions(folder: str | Path) -> Path:
    """The one file of extended prompts in `folder`: `*augmented*`, .json, .jsonl or .txt.

    Raw prompts cost Wan's family about ten points of the semantic score, so `ConfigError` asks.
    """
    found = sorted(
        p for p in Path(folder).glob("*augmented*") if p.suffix in (".json", ".jsonl", ".txt")
    )
    if len(found) == 1:
        return found[0]
    told = f"no file of extended prompts in {folder} (*augmented*.json)"
    if found:
        told = f"{folder} holds {', '.join(p.name for p in found)}"
    raise ConfigError(
        f"{told}; name one with --augmented_prompts FILE, or pass --no_augmented_prompt to sample"
        " the short prompts"
    )


def by_dimension(items: Iterable[SuiteItem]) -> dict[str, list[SuiteItem]]:
    """Dimension -> its items, dimensions and items in order of appearance."""
    found: dict[str, list[SuiteItem]] = {}
    for item in items:
        for dimension in item.dimensions:
            found.setdefault(dimension, []).append(item)
    return found


def _rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, object) of every entry."""
    text = read_text(path, what="prompt list")
    if path.suffix.lower() == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [json_value(line, source=f"{path}, line {i},") for i, line in lines]
    else:
        rows = json_value(text, source=path)
    if isinstance(rows, dict) and isinstance(rows.get("prompts"), list):
        rows = rows["prompts"]
    if not isinstance(rows, list):
        raise ConfigError(f"{path} must be a list of prompts, got a {type(rows).__name__}")
    return [(f"{path}, entry {i}", row) for i, row in enumerate(rows)]


def _item(row: Any, place: str) -> SuiteItem:
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"{place} must be an object with a prompt and its dimensions, got {str(row)[:60]!r}"
        )
    prompt = next((row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str)), "")
    if not prompt.strip():
        raise ConfigError(f"{place} has no text under {' or '.join(_TEXT_KEYS)}")
    dimensions: Any = next((row[key] for key in _DIMENSION_KEYS if row.get(key)), [])
    dimensions = [dimensions] if isinstance(dimensions, str) else dimensions
    auxiliary, texts = row.get("auxiliary_info") or {}, [row.get(key) for key in _STRINGS]
    right = (
        isinstance(dimensions, list)
        and all(isinstance(d, str) for d in dimensions)
        and isinstance(auxiliary, Mapping)
    )
    if not right or not all(text is None or isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{place}: dimension is a list of words, auxiliary_info an object, and"
            f" {', '.join(_STRINGS)} are strings"
        )
    extended = texts[0]
    if any(re.search("[\ud800-\udfff]", text) for text in (prompt, *filter(None, texts))):
        raise ConfigError(f"{place} holds half a character (\\ud800 to \\udfff), which is no text")
    if extended is not None and not extended.strip():
        raise ConfigError(
            f"{place} has an empty augmented_prompt; leave the key out, or write the text"
        )
    return SuiteItem(prompt, tuple(dimensions), auxiliary, *texts)


def _joined(known: SuiteItem, other: SuiteItem, place: str) -> SuiteItem:
    if known.image_name != other.image_name:
        raise ConfigError(
            f"{place} repeats the prompt {other.prompt!r} with another image; their videos would"
            " have one name"
        )
    return replace(
        known,
        dimensions=tuple(dict.fromkeys((*known.dimensions, *other.dimensions))),
        auxiliary_info={**known.auxiliary_info, **other.auxiliary_info},
        extended=known.extended if other.extended is None else other.extended,
    )


def _check_names(items: Iterable[SuiteItem], path: str | Path) -> None:
    owners: dict[str, str] = {}
    for item in items:
        name = item.video_name(0)
        if (size := len(name.encode())) > MAX_NAME_BYTES:
            raise ConfigError(
                f"{path}: the prompt {item.prompt[:60]!r}... makes a file name of {size} bytes, at"
                f" most {MAX_NAME_BYTES}"
            )
        if "\0" in name:
            raise ConfigError(
                f"{path}: the prompt {item.prompt!r} holds a NUL character, which no file name may"
            )
        if name in owners:
            raise ConfigError(
                f"{path}: the prompts {owners[name]!r} and {item.prompt!r} would write the same"
                f" file {name!r}"
            )
        owners[name] = item.prompt
