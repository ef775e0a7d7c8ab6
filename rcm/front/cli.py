"""The command `rcm`: finds the subcommand, imports what it needs and nothing else, and hands the
rest of the line over.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import rcm
from rcm.core.standard_output import lost_output, printable_output
from rcm.core.stop_signal import status_of, terminable
from rcm.front.commands import COMMANDS, GROUPS, Command

HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rcm`; returns the exit status: that of the subcommand, 2 for a line that
    names none, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    printable_output()
    try:
        with terminable():
            status = _answer(words)
        lost = lost_output()
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return status_of(stop)
    except OSError as error:
        status, lost = 0, lost_output(error)
        if lost is None:
            raise
    if lost is None or status or lost.reader_gone:
        return status
    print(f"error: {lost.sentence}", file=sys.stderr)
    return 1


def _answer(words: Sequence[str]) -> int:
    if not words or words[0] in HELP:
        _write(overview())
        return 0
    if words[0] in ("--version", "-V"):
        _write(f"rcm {rcm.__version__}\n")
        return 0
    return _run("rcm", COMMANDS, words)


def overview() -> str:
    """The help of `rcm` itself: subcommands by group."""
    lines = [
        "usage: rcm COMMAND ...",
        "",
        "Distil video diffusion models into few-step generators that stream, and sample them.",
        "",
    ]
    for title, commands in GROUPS.items():
        lines += [
            f"{title}:",
            *(f"  {name:<12} {command.does}" for name, command in commands.items()),
            "",
        ]
    lines += ["Start with `rcm stream`. `rcm COMMAND --help` explains a command."]
    return "\n".join(lines) + "\n"


def load_main(command: Command) -> Callable[[Sequence[str]], int | None]:
    """The function behind a command. Modules of `scripts` are found beside the package, or inside
    it in an installed wheel.
    """
    if command.module.startswith("scripts."):
        _find_scripts()
    return importlib.import_module(command.module).main


def _run(line: str, commands: Mapping[str, Command], words: Sequence[str]) -> int:
    name, *rest = words
    command = commands.get(name)
    if command is None:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.6)
        meant = f"did you mean {near[0]}? " if near else ""
        print(
            f"error: {line} has no command {name!r}; {meant}choose from {', '.join(commands)}",
            file=sys.stderr,
        )
        return 2
    line = f"{line} {name}"
    if command.parts:
        if not rest or rest[0] in HELP:
            _write(_parts_help(line, command))
            return 0 if rest else 2
        return _run(line, command.parts, rest)
    if rest and rest[0] in HELP:
        _write(_help(line, command))
        return 0
    return load_main(command)([*command.given, *rest]) or 0


def _parts_help(line: str, command: Command) -> str:
    does, listed = command.does, [f"  {n:<14} {part.does}" for n, part in command.parts.items()]
    return (
        "\n".join(
            [
                f"usage: {line} WHICH ...",
                "",
                f"{does[0].upper()}{does[1:]}; `{line} WHICH --help` explains each.",
                "",
                *listed,
                *_examples(*command.parts.values()),
            ]
        )
        + "\n"
    )


def _help(line: str, command: Command) -> str:
    """What the command's own parser says, under the name it was called by, after the examples."""
    if command.usage:
        return (
            "\n".join(
                [
                    f"{line}: {command.does}",
                    *_examples(command),
                    "",
                    f"usage: {line} {command.usage}",
                ]
            )
            + "\n"
        )
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        load_main(command)([*command.given, "--help"])
    module = f"-m {command.module} {' '.join(command.given)}".rstrip()
    text = told.getvalue().replace(f"python {module}", line).replace(module, f"-m {line}")
    _, colon, usage = text.partition(": ")
    called = usage.split(" [")[0].split("\n")[0]
    usage = _usage(usage, called, line) if colon else text
    return "\n".join([f"{line}: {command.does}", *_examples(command), "", f"usage: {usage}"])


def _usage(text: str, called: str, line: str) -> str:
    """The usage of a parser named `called` as that of `line`: its flags begin behind the new name,
    as many in a row as fit.
    """
    flags, blank, rest = text.removeprefix(called).partition("\n\n")
    margin = len(f"usage: {line} ")
    rows = [""]
    for part in map(str.strip, flags.split("\n")):
        row = f"{rows[-1]} {part}".strip()
        if rows[-1] and margin + len(row) > shutil.get_terminal_size().columns - 2:
            rows.append(part)
        else:
            rows[-1] = row
    return line + " " + f"\n{' ' * margin}".join(rows) + blank + rest


def _examples(*commands: Command) -> list[str]:
    lines = [f"  {example}" for command in commands for example in command.examples]
    return ["", "examples:", *lines] if lines else []


def _find_scripts() -> None:
    """Make `scripts` the folder of this package's entry points, whatever else has that name on the
    path.
    """
    package = Path(rcm.__file__).resolve().parent
    folder = next(
        path
        for path in (package / "_scripts", package.parent / "scripts")
        if (path / "__init__.py").is_file()
    )
    loaded = sys.modules.get("scripts")
    if loaded is not None and Path(loaded.__path__[0]) == folder:
        return
    spec = importlib.util.spec_from_file_location(
        "scripts", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scripts"] = module
    spec.loader.exec_module(module)


def _write(text: str) -> None:
    print(text, end="")  # nowhere, where standard output is closed
