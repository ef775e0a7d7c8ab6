"""The command `rcm`: every entry point has its word, help is quick and true, wrong words are
answered in one sentence.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rcm.core.arguments import Arguments
from rcm.core.flag_ranges import RANGES
from rcm.front import cli
from rcm.front.commands import COMMANDS, Command
from rcm.inference.causal_methods import METHODS
from rcm.kernels.kv_codec.spec import FLAGS
from tests.hygiene.source import ROOT

PARTS_OF_ANOTHER = {"scripts.train", "scripts.bench_masked"}
"""`rcm train` runs what scripts.train runs; bench_masked is a part of bench_attention."""


def leaves(commands=COMMANDS, line: str = "rcm") -> Iterator[tuple[str, Command]]:
    for name, command in commands.items():
        if command.parts:
            yield from leaves(command.parts, f"{line} {name}")
        else:
            yield f"{line} {name}", command


def test_every_entry_point_has_a_word() -> None:
    behind = {command.module for _, command in leaves()}
    entries = {f"scripts.{p.stem}" for p in (ROOT / "scripts").glob("*.py") if "\ndef main(" in p.read_text() or p.stem == "train"}
    entries |= {f"rcm.inference.{p.stem}" for p in (ROOT / "rcm" / "inference").glob("*_infer.py")}
    assert entries - PARTS_OF_ANOTHER <= behind
    missing = [m for m in behind if not (ROOT / (m.replace(".", "/") + ".py")).is_file()]
    assert not missing


def test_advice_names_no_module_that_an_installed_wheel_lacks() -> None:
    """`scripts` is `rcm._scripts` there: sentences say `rcm WORD`."""
    for path in [*(ROOT / "rcm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Call | ast.BinOp):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                assert not any(re.search(r"-m scripts\.\w+ ", text) for text in texts), f"{path}:{node.lineno}"


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys, rcm.front.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    before = os.times()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()  # of the processor: others may be busy on this machine
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2  # 0.1 s
    assert all(f"  {name} " in told.stdout for name in COMMANDS)


@pytest.mark.parametrize(("line", "command"), [pytest.param(*leaf, id=leaf[0]) for leaf in leaves()])
def test_each_command_tells_its_own_name(line: str, command: Command, capsys) -> None:
    assert cli.main([*shlex.split(line)[1:], "--help"]) == 0
    said = capsys.readouterr().out
    assert "-m scripts." not in said
    assert said.startswith(f"{line}: {command.does}\n")
    assert f"\nusage: {line} " in said or f"\nusage: {line}\n" in said
    assert all(f"  {example}\n" in said for example in command.examples)
    rows = said.split("\nusage: ")[1].split("\n\n")[0].strip().split("\n")[1:]
    assert {len(row) - len(row.lstrip()) for row in rows} <= {len(f"usage: {line} ")}


@pytest.mark.parametrize(("line", "command"), [pytest.param(*leaf, id=leaf[0]) for leaf in leaves()])
def test_a_flag_that_no_command_has_is_refused_in_one_sentence(line: str, command: Command, capsys) -> None:
    try:
        status = cli.main([*shlex.split(line)[1:], "--no_such_flag"])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said


class _Built(BaseException):
    """The parser of a command, in place of what it reads."""


def _numbers(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (name for inner in action.choices.values() for name in _numbers(inner))
        elif action.type in (int, float):
            yield action.dest


def test_every_number_of_every_command_has_a_range(monkeypatch) -> None:
    def build(parser: Arguments, *given: object) -> None:
        raise _Built(parser)

    monkeypatch.setattr(Arguments, "_read", build)
    of_records = {*FLAGS, *(flag for method in METHODS.values() for flag in method.flags)}
    """What the codec and the policies say of their own numbers."""
    for line, command in leaves():
        with pytest.raises(_Built) as built:
            cli.load_main(command)([*command.given])
        unknown = set(_numbers(built.value.args[0])) - RANGES.keys() - of_records
        assert not unknown, f"{line} takes numbers without a range in rcm.core.flag_ranges: {unknown}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stream", "--promt", "x"], "error: unrecognized arguments: --promt x; did you mean --prompt?; --help lists the flags"),
        (["stream", "a cat"], "error: unrecognized arguments: a cat; a prompt is written --prompt TEXT; --help lists the flags"),
        (["demo", "--quik"], "error: unrecognized arguments: --quik; did you mean --quick?; --help lists the flags"),
        (["demo", "--videos", "x"], "error: argument --videos: invalid int value: 'x'; --help lists the flags"),
        (["vbench", "sample"], "error: the following arguments are required: --dit_path; --help lists the flags"),
        (["checkpoint", "inspect"], "error: the following arguments are required: path; --help lists the flags"),
    ],
)
def test_words_that_a_parser_cannot_read(words: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert capsys.readouterr().err == f"{sentence}\n"


def test_examples_call_commands_that_exist() -> None:
    known = {line for line, _ in leaves()}
    for line, command in leaves():
        for example in command.examples:
            called = example.split("-m ")[-1] if example.startswith("torchrun") else example
            assert any(called.startswith(name) for name in known if name == line), example


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["experiments", "toy_tf_c3-3"], "toy_tf_c3-3"),
        (["train", "--dryrun", "experiment=toy_tf_c3-3"], "max_iter: 600"),
        (["plan", "experiment=toy_tf_c3-3", "gpus=1", "memory_gib=8"], "fits"),
        (["--version"], "rcm 0."),
        (["sample", "--help"], "i2v-rcm"),
    ],
)
def test_commands_do_what_they_say(words: list[str], expected: str, capsys) -> None:
    assert cli.main(words) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["strem"], "error: rcm has no command 'strem'; did you mean stream? choose from stream, serve, demo"),
        (["checkpoint", "look"], "error: rcm checkpoint has no command 'look'; choose from inspect, convert, export"),
        (["train"], "error: nothing chosen; give experiment=NAME"),
    ],
)
def test_wrong_words_are_answered_in_one_sentence(words: list[str], sentence: str, capsys) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def test_ctrl_c_is_one_word_and_status_130(monkeypatch, capsys) -> None:
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_main", interrupted)
    assert cli.main(["stream"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_scripts_are_ours_whatever_else_has_that_name(tmp_path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").write_text("raise RuntimeError('another project')")
    command, env = [sys.executable, "-m", "rcm", "plan", "--help"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "usage: rcm plan" in done.stdout


def test_make_says_what_it_installs_before_it_does() -> None:
    """Minutes of pip without a word look like a machine that hangs."""
    told = subprocess.run(["make", "-n", "install", "VENV=/nowhere/venv"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = told.splitlines()
    steps = [i for i, line in enumerate(lines) if line.startswith('echo "') and " of 3: " in line]
    long = [i for i, line in enumerate(lines) if "-m pip install" in line and "--upgrade pip" not in line]
    assert len(steps) == 3 and [i - 1 for i in long] == steps[1:]
    assert all("GB to download" in lines[i] for i in steps[1:])
    assert all("$(test -t 2 || echo --quiet)" in lines[i] for i in long), "the bar is for terminals"
