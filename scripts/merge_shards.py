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
import sys
from collections.abc import Sequence
from pathlib import Path

from rcm.core.arguments import Arguments
from rcm.core.errors import CheckpointError, ConfigError
from rcm.data.latents import expand_pattern
from rcm.data.shard_merge import merge_shards
from rcm.data.shard_writer import check_build
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


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    try:
        check_build(options.out, num=None, shard_size=options.shard_size)
        paths = list(
            dict.fromkeys(
                path
                for pattern in options.shards
                for path in expand_pattern(pattern, knob="the pattern")
            )
        )
        written = merge_shards(paths, options.out, shard_size=options.shard_size)
    except (ConfigError, CheckpointError, ShardError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{len(paths)} shards in {len(written)}: {options.out}/shard-*.tar")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
