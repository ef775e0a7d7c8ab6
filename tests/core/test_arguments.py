"""Flags that would have no effect are refused in one sentence."""

from __future__ import annotations

import argparse

import pytest

from rcm.core.arguments import Arguments, one_of
from rcm.core.errors import ConfigError


def parser() -> Arguments:
    made = Arguments(prog="x")
    made.add_argument("--as-is", "--as_is", action="store_true")
    made.add_argument("--smallest", action="store_true")
    made.add_argument("--kind", default="toy")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--index", type=int)
    made.add_argument("--shards", type=int, default=7)
    made.add_argument("--features", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--low", dest="mode", action="store_const", const="low")
    made.add_argument("--mode")
    made.add_argument("words", nargs="*", metavar="key=value")
    made.idle("as_is", "seed", beside="smallest")
    made.idle("index", beside="kind", when=one_of("kind", "toy"))
    made.idle("shards", without="index")
    made.idle("seed", beside="features", when=one_of("features", False))
    made.idle("mode", beside="low")
    made.idle("low", without="words")
    return made


LINES = {
    "--as-is --smallest": "--as-is has no effect with --smallest; leave it out, or leave --smallest out",
    "--smallest --seed 0 --as_is": "--as-is, --seed have no effect with --smallest; leave them out, or leave --smallest out",
    "--index 3": "--index has no effect with --kind toy; leave it out, or change --kind",
    "--shards 7 --kind clips": "--shards has no effect without --index; add that, or leave it out",
    "--seed 1 --no-features": "--seed has no effect without --features; add that, or leave it out",
    "--low --mode all a=1": "--mode has no effect with --low; leave it out, or leave --low out",
    "--low": "--low has no effect without key=value; add that, or leave it out",
    "--smallest --se=3": "--seed has no effect with --smallest",
    "--nothing --smallest": "",
    "--smallest": "",
    "--as-is --seed 3 a=1 b": "",
    "--kind clips --index 3 --shards 2": "",
    "--seed 1 --features --low a=1": "",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("intermixed", [False, True])
def test_idle_flags(line, intermixed, capsys):
    made, told = parser(), LINES[line]
    read = made.parse_intermixed_args if intermixed else made.parse_args
    words = [word for word in line.split() if word != "--nothing"]
    if not told:
        flags = read(words)
        assert not hasattr(flags, "typed") and {"seed"} & set(made.typed) == {"seed"} & {w.strip("-") for w in words}
        return
    with pytest.raises(SystemExit) as ended:
        read(words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {told}")


def test_a_parser_forgets_the_last_line_and_knows_its_flags(capsys):
    made = parser()
    made.parse_args(["--as-is"])
    made.parse_args(["--smallest"])
    with pytest.raises(StopIteration):
        made.idle("no_such", beside="smallest")


@pytest.mark.parametrize("line", ["--seed -1", "--seed 4294967296", "--index 0", "--index 99999999999999999999"])
def test_numbers_are_in_their_ranges(line):
    for read in (parser().parse_args, parser().parse_intermixed_args):
        with pytest.raises(ConfigError, match=f"^{line} must be at"):
            read([*line.split(), "--kind", "clips"])
