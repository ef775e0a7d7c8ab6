"""Put many small shards together into larger ones, as a build on many ranks or in many parts leaves
them.

    python -m scripts.merge_shards 'outputs/data/parts/*/shard-*.tar' --out outputs/data/whole \\
        --shard_size 1000

Members are copied byte for byte in the order of the patterns, keys count anew, and every sample is
read on the way: a damaged one ends the merge with its name. A merge that was stopped goes on when
the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rcm.core.output_file import require_folder
from rcm.data.shard_merge import merge_shards
from rcm.inference.outcome import command
from scripts.named_shards import named_shards, shard_flags


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the process with status 2 for a wrong one."""
    parser = shard_flags(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the larger shards go, a folder of their own",
    )
    parser.add_argument(
        "--shard_size",
        "--shard-size",
        type=int,
        default=1000,
        metavar="N",
        help="samples per shard [%(default)s]",
    )
    return parser.parse_args(argv)


@command(failure=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    require_folder(options.out, f"--out {options.out}")
    paths = named_shards(options.shards)
    written = merge_shards(paths, options.out, shard_size=options.shard_size)
    print(f"{len(paths)} shards in {len(written)}: {options.out}/shard-*.tar")


if __name__ == "__main__":
    raise SystemExit(main())
