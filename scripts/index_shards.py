"""Record where the samples of a data set lie, so that training on many shards starts at once.

    python -m scripts.index_shards 'data/wan14b_480p/shard-*.tar'

Writes one `dataset.index` into the folder of the shards (one per folder, of the shards named),
which a build and a merge of many shards do by themselves. Shards are read once, those that have an
index beside them through it; a run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rcm.core.arguments import Arguments
from rcm.core.errors import CheckpointError, ConfigError
from rcm.data.latents import expand_pattern
from rcm.data.set_index import RECORD, record_shards
from rcm.data.tar_index import ShardError
from rcm.inference.outcome import command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the process with status 2 for a wrong one."""
    parser = Arguments(
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="PATTERN",
        help="shards: names, globs, or bash's braces, in quotes",
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    try:
        folders: dict[Path, dict[Path, None]] = {}
        for pattern in options.shards:
            for path in expand_pattern(pattern, knob="PATTERN"):
                folders.setdefault(path.parent, {})[path] = None
        for folder, paths in folders.items():
            shards, samples = record_shards(folder, paths)
            print(f"{folder / RECORD}: {shards} shards, {samples} samples")
    except (ConfigError, CheckpointError, ShardError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
