"""How the commands on shards are told which: `view_shards`, `merge_shards`, `index_shards`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcm.core.arguments import Arguments
from rcm.data.latents import expand_pattern


def shard_flags(doc: str) -> Arguments:
    """The parser of such a command: patterns of shards first."""
    parser = Arguments(description=doc, allow_abbrev=False)
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="PATTERN",
        help="shards: names, globs, or bash's braces, in quotes",
    )
    return parser


def named_shards(patterns: Sequence[str]) -> list[Path]:
    """The shards of all patterns, each once; `ConfigError` as `expand_pattern`."""
    found = (path for text in patterns for path in expand_pattern(text, knob="the pattern"))
    return list(dict.fromkeys(found))
