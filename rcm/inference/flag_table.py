"""Flags of a command line from a table that reads like its help: a line per flag.

    name KIND = default  help

Other names of the same flag follow the first, separated by commas. KIND is what `--name` takes:
`int`, `float`, `str`; a metavar, of a whole number (N), of a number (R, S, X), else of text;
alternatives (`a|b`); nothing for a switch. `KIND...`: one or more of it. A line that begins with a
space continues the help.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

_LINE = re.compile(
    r"(?P<names>[\w,-]+)(?: (?P<kind>[^\s=]\S*))?(?: = (?P<default>\S+))?(?:  +(?P<help>.*))?"
)
_NUMBERS = {"int": int, "float": float, "N": int, "R": float, "S": float, "X": float}


def add_flags(
    parser: argparse._ActionsContainer,
    table: str,
    kinds: Mapping[str, str] = {},
    **changes: dict[str, Any],
) -> None:
    """Add the flags of `table` to a parser or a group of one. `kinds`: by name, where a line has
    none; `changes`: by name, options of `add_argument` beside those of the line, or instead of
    them. `ValueError` for another line.
    """
    for line in filter(None, re.sub(r"\n +", " ", table.strip()).splitlines()):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{line!r} is no line of flags: name KIND = default  help")
        names = match["names"].split(",")
        name = names[0].replace("-", "_")
        kind = match["kind"] or kinds.get(name)
        options = _options(kind, match["default"]) | {"help": match["help"]}
        flags = [f"--{word}" for word in names]
        parser.add_argument(*flags, **options | changes.pop(name, {}))
    if changes:
        raise ValueError(f"the table has no line for {', '.join(changes)}")


def both_spellings(table: str) -> str:
    """`table` with every name spelt with - and with _."""

    def both(match: re.Match[str]) -> str:
        names = match[0].split(",")
        spelt = [(name.replace("_", "-"), name.replace("-", "_")) for name in names]
        return ",".join(dict.fromkeys(name for pair in spelt for name in pair))

    return re.sub(r"(?m)^[\w,-]+", both, table)


def _options(kind: str | None, default: str | None) -> dict[str, Any]:
    if not kind:
        return {"action": "store_true"}
    options: dict[str, Any] = {}
    if kind.endswith("..."):
        kind, options = kind.removesuffix("..."), {"nargs": "+"}
    known = _NUMBERS.get(kind)
    if "|" in kind:
        options["choices"] = tuple(kind.split("|"))
    elif kind not in ("int", "float", "str"):
        options["metavar"] = kind
    if known is not None:
        options["type"] = known
    if default is not None:
        options["default"] = "" if default == '""' else (known or str)(default)
    return options
