"""What a command ends with, and what of its log is seen."""

from __future__ import annotations

import sys

import pytest
from loguru import logger

from rcm.core.errors import ConfigError
from rcm.inference.outcome import command, exit_status


def test_how_commands_end(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    def exhausted(argv):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nException raised")

    def wrong(argv):
        raise ConfigError("one\n  knob caf\udce9")

    def warns(argv):
        logger.info("quiet")
        logger.warning("of <{}> {}", 1, "{x}")

    ends = (interrupted, exhausted, wrong, warns, lambda argv: 0 * sys.stdout.write("caf\udce9\n"), lambda argv: 7)
    assert [command(main)([]) for main in ends] == [130, 2, 2, 0, 0, 7]
    assert command(log="INFO", failure=1)(warns)([]) == 0
    logger.warning("to who called it")
    said = capsys.readouterr()
    assert said.out == "caf\\udce9\n"
    stopped, memory, refused, *warned = said.err.splitlines()
    assert warned == ["warning: of <1> {x}", "quiet", "warning: of <1> {x}", "warning: to who called it"]
    assert stopped == "stopped"
    assert memory.startswith("error: out of memory") and memory.endswith("; ask for less")
    assert refused == "error: one knob caf\\udce9"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("a fault of the program")))
