"""Prompt files for building data: one sample per prompt, so mistakes must not pass unseen."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from rcm.core.errors import ConfigError
from rcm.core.text_file import lines_of, read_text
from rcm.data.prompts import json_line, require_lines
from rcm.encoders.prompt_cleaning import says_nothing

COLUMNS = ("prompt", "caption", "text")
"""Names under which a .csv column or a .jsonl key holds the prompt, in order of preference."""

MAX_PROMPT_CHARS = 4000
"""Longer prompts are taken for a mistake in the file: umT5's 512 tokens are about 2,500 characters
of English.
"""

_SHOWN = 5


class _Entry(NamedTuple):
    place: str
    prompt: str


def read_prompt_list(
    path: str | Path, *, skip_bad: bool = False, max_chars: int = MAX_PROMPT_CHARS
) -> list[str]:
    """Prompts of a .txt (one per line), .csv (with a header) or .jsonl file, stripped, in order.

    Empty prompts (blank lines between others among them) and prompts above `max_chars` characters
    raise `ConfigError` naming file and line; with `skip_bad` they are left out, with a warning.
    Blank lines at the end of a file are no prompts. Raises `ConfigError` for a missing or empty
    file, one that is no text (`read_text`), a .json, a .csv or .jsonl without a prompt column, and
    a .csv with broken quotes or more fields than its header.
    """
    path = Path(path)
    require_lines(path, others=(".json",))
    text = read_text(path, what="prompt file", knob="--prompts")
    entries = list(_entries(path, text.rstrip()))
    if not entries:
        raise ConfigError(f"prompt file {path} holds no prompt")
    bad = {entry.place: fault for entry in entries if (fault := _fault(entry.prompt, max_chars))}
    if bad:
        told = "; ".join(f"{place} {fault}" for place, fault in list(bad.items())[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        if not skip_bad:
            raise ConfigError(
                f"{len(bad)} of {len(entries)} prompts cannot be used: {told}{more}; mend the file"
                " or pass --skip_bad_prompts"
            )
        logger.warning("{} of {} prompts left out: {}{}", len(bad), len(entries), told, more)
    kept = [entry.prompt for entry in entries if entry.place not in bad]
    if not kept:
        raise ConfigError(f"prompt file {path} holds no usable prompt")
    return kept


def _fault(prompt: str, max_chars: int) -> str:
    if says_nothing(prompt):
        return "is empty"
    if len(prompt) > max_chars:
        return (
            f"has {len(prompt)} characters, at most {max_chars} are taken for a prompt"
            f" ({prompt[:40]!r}...)"
        )
    return ""


def _entries(path: Path, text: str) -> Iterator[_Entry]:
    if path.suffix.lower() == ".csv":
        yield from _csv_entries(path, text)
        return
    for number, line in enumerate(lines_of(text), 1):
        place, prompt = f"{path}:{number}", line.strip()
        if prompt and path.suffix.lower() == ".jsonl":
            prompt = _json_prompt(line, place)
        yield _Entry(place, prompt)


def _csv_entries(path: Path, text: str) -> Iterator[_Entry]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = rows.fieldnames or ()
        column = next((name for name in COLUMNS if name in header), None)
        if column is None:
            raise ConfigError(
                f"{path} needs a header with a column {' or '.join(COLUMNS)}, got"
                f" {', '.join(header) or 'none'}"
            )
        for row in rows:
            if None in row:
                found = len(header) + len(row[None])
                raise ConfigError(
                    f"{path}:{rows.line_num} has {found} fields, the header {len(header)}; put a"
                    " prompt with a comma in quotes"
                )
            yield _Entry(f"{path}:{rows.line_num}", (row[column] or "").strip())
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{rows.reader.line_num} cannot be read as csv ({error}); look at its quotes"
        ) from error


def _json_prompt(line: str, place: str) -> str:
    record = json_line(line, place)
    values = [record.get(name) for name in COLUMNS] if isinstance(record, dict) else []
    found = [value for value in values if isinstance(value, str)]
    if not found:
        raise ConfigError(f"{place} needs a string under {' or '.join(COLUMNS)}, got {line[:80]}")
    return found[0].strip()
