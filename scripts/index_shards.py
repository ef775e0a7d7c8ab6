"""Record where the samples of a data set lie, so that training on many shards starts at once.

    python -m scripts.index_shards 'data/wan14b_480p/shard-*.tar'

Writes one `dataset.index` into the folder of the shards (one per folder, of the shards named),
which a build and a merge of many shards do by themselves. Shards are read once, those that have an
index beside them through it; a run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rcm.data.set_index import RECORD, record_shards
from rcm.inference.outcome import command
from scripts.named_shards import named_shards, shard_flags


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the process with status 2 for a wrong one."""
    parser = shard_flags(__doc__)
    return parser.parse_args(argv)


@command(failure=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    folders: dict[Path, dict[Path, None]] = {}
    for path in named_shards(options.shards):
        folders.setdefault(path.parent, {})[path] = None
    for folder, paths in folders.items():
        shards, samples = record_shards(folder, paths)
        print(f"{folder / RECORD}: {shards} shards, {samples} samples")


if __name__ == "__main__":
    raise SystemExit(main())
