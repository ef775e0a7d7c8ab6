"""Put many small shards together into larger ones, or record where their samples lie.

    python -m scripts.shards merge 'outputs/data/parts/*/shard-*.tar' --out outputs/data/whole \\
        --shard_size 1000
    python -m scripts.shards index 'data/wan14b_480p/shard-*.tar'

merge: members are copied byte for byte in the order of the patterns, keys count anew, and every
sample is read on the way: a damaged one ends the merge with its name. index: writes one
`dataset.index` into the folder of the shards (one per folder, of the shards named), so that
training on many starts at once; a build and a merge of many shards do so by themselves. Shards are
read once, those that have an index beside them through it. What was stopped goes on when the same
command is given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcm.core.arguments import Arguments
from rcm.core.output_file import require_folder
from rcm.data.latents import expand_pattern
from rcm.data.set_index import RECORD, record_shards
from rcm.data.shard_merge import merge_shards
from rcm.inference.outcome import command


def add_patterns(parser: Arguments) -> None:
    """The positional arguments of commands on shards."""
    told = "shards: names, globs, or bash's braces, in quotes"
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help=told)


def named_shards(patterns: Sequence[str]) -> list[Path]:
    """The shards of all patterns, each once; `ConfigError` as `expand_pattern`."""
    found = (path for text in patterns for path in expand_pattern(text, knob="the pattern"))
    return list(dict.fromkeys(found))


def _merge(paths: list[Path], out: Path, *, shard_size: int) -> None:
    written = merge_shards(paths, out, shard_size=shard_size)
    print(f"{len(paths)} shards in {len(written)}: {out}/shard-*.tar")


def _index(named: list[Path]) -> None:
    folders: dict[Path, dict[Path, None]] = {}
    for path in named:
        folders.setdefault(path.parent, {})[path] = None
    for folder, paths in folders.items():
        shards, samples = record_shards(folder, paths)
        print(f"{folder / RECORD}: {shards} shards, {samples} samples")


@command(failure=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0, or 1 with one line on standard error."""
    parser = Arguments(prog="shards", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="put many small shards together into larger ones")
    add_patterns(merge)
    told = "where the larger shards go, a folder of their own"
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=told)
    size = ("--shard_size", "--shard-size")
    told = "samples per shard [%(default)s]"
    merge.add_argument(*size, type=int, default=1000, metavar="N", help=told)
    add_patterns(commands.add_parser("index", help="record where the samples of shards lie"))
    options = parser.parse_args(argv)
    if options.command == "merge":
        require_folder(options.out, f"--out {options.out}")
        _merge(named_shards(options.shards), options.out, shard_size=options.shard_size)
    else:
        _index(named_shards(options.shards))


if __name__ == "__main__":
    raise SystemExit(main())
