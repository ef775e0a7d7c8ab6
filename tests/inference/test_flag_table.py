"""A table of flags is what `add_argument` would have been told."""

from __future__ import annotations

import argparse

import pytest

from rcm.inference.flag_table import add_flags, both_spellings

TABLE = """
name TEXT             what it is
number N = 3          how many [%(default)s]
share X = 0.5         a part of it, told in a sentence that
  goes on in the next line
size float            no metavar
mode a|b = b          one of two
times T...            several
switch                yes or no
nothing FILE = ""
"""


def test_lines_become_flags():
    parser = argparse.ArgumentParser()
    add_flags(parser, TABLE, name={"required": True}, nothing={"help": "told elsewhere"})
    flags = parser.parse_args(["--name", "x", "--times", "1/2", "3", "--mode", "a", "--switch"])
    assert vars(flags) == {
        "name": "x", "number": 3, "share": 0.5, "size": None, "mode": "a", "times": ["1/2", "3"], "switch": True, "nothing": "",
    }  # fmt: skip
    said = " ".join(parser.format_help().split())
    for words in ("--name TEXT what it is", "--number N how many [3]", "that goes on", "--size SIZE no metavar", "{a,b}", "told elsewhere"):
        assert words in said, words
    with pytest.raises(SystemExit):
        parser.parse_args(["--name", "x", "--mode", "c"])


def test_several_names_of_a_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser, both_spellings("shard-size,per_shard int = 3\nfast  quick\nseed"), {"seed": "int"})
    actions = {action.dest: action.option_strings for action in parser._actions}
    assert actions["shard_size"] == ["--shard-size", "--shard_size", "--per-shard", "--per_shard"] and actions["fast"] == ["--fast"]
    assert vars(parser.parse_args(["--per_shard", "5", "--seed", "7"])) == {"shard_size": 5, "fast": False, "seed": 7}


@pytest.mark.parametrize(
    ("table", "changes", "told"),
    [("two words and more", {}, "no line of flags"), ("name TEXT  told", {"nome": {}}, "no line for nome")],
)
def test_what_is_no_table_is_told_to_the_programmer(table, changes, told):
    with pytest.raises(ValueError, match=told):
        add_flags(argparse.ArgumentParser(), table, **changes)
