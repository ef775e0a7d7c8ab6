"""How command lines end: one sentence and an exit status that is not 0 for what a user can change,
and for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from rcm.core.device_copy import check_device as check_device
from rcm.core.device_copy import out_of_memory as out_of_memory
from rcm.core.errors import CheckpointError, ConfigError, NonFinite, PeerGone
from rcm.core.output_file import OutputFile, is_file_of
from rcm.core.standard_output import lost_output, printable_output
from rcm.core.stop_signal import status_of, terminable
from rcm.data.tar_index import ShardError
from rcm.pipelines.video_io import VideoError

if TYPE_CHECKING:
    from loguru import Record


class OutOfMemory(ConfigError):
    """Memory of a device ran out; told by the rank that it happened to, for the others may have
    enough.
    """


USER_ERRORS = (ConfigError, CheckpointError, NonFinite, VideoError, ShardError, PeerGone, OSError)


_handler = 0
"""Of loguru, at first its own: what a command has in its place, and leaves to who called it."""


def _short_log(level: str) -> None:
    """Log lines from `level` on are for reading from now on, "warning: ..." on stderr; what
    progress says goes to stdout.
    """
    global _handler
    with contextlib.suppress(ValueError):  # taken away before
        logger.remove(_handler)

    def short(record: Record) -> str:
        level = record["level"].name
        return f"{'' if level == 'INFO' else f'{level.lower()}: '}{{message}}\n"

    _handler = logger.add(
        lambda line: print(line, end="", file=sys.stderr), level=level, format=short
    )


def exit_status(
    work: Callable[[], int | None], *, tell: bool = True, failure: int = 2, log: str = "WARNING"
) -> int:
    """What `work` returns, else 0; `failure` after an error that the user can put right, told in
    one sentence on stderr by the rank that may `tell`; 130 and one word after Ctrl-C, 143 after
    SIGTERM. What is logged from the level `log` on is short on stderr.
    """
    printable_output()
    _short_log(log)
    try:
        with terminable():
            status = work() or 0
        lost = lost_output()
        if lost is None or status:
            return status
        _say(f"error: {lost.sentence}")
    except USER_ERRORS as error:
        lost = lost_output(error)
        if tell or isinstance(error, OutOfMemory):
            _say(f"error: {' '.join(str(error).split()) if lost is None else lost.sentence}")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        _say(
            "error: out of memory:"
            f" {(str(error).strip().splitlines() or ['no more to be had'])[0][:160]}; ask for less"
        )
    except KeyboardInterrupt as stop:
        if tell:
            _say("stopped")
        return status_of(stop)
    return failure


def command(main: Callable[[Sequence[str] | None], int | None] | None = None, **how: Any) -> Any:
    """Decorate the `main(argv)` of a command, as `@command` or `@command(failure=STATUS)`: whatever
    its own handling lets through ends as `exit_status` says with the options `how`.
    """
    if main is None:
        return functools.partial(command, **how)

    @functools.wraps(main)
    def ending(argv: Sequence[str] | None = None) -> int:
        return exit_status(lambda: main(argv), **how)

    return ending


def writable_file(text: str) -> OutputFile:
    """An argparse type: a file that a command writes in the end, found to be writable when the line
    is read.
    """
    try:
        return OutputFile.claim(text)
    except (ConfigError, OSError) as error:
        raise argparse.ArgumentTypeError(f"{error}") from error


_WRITTEN = ("save_path", "preview_grid", "report")


def sparing(target: OutputFile, flags: argparse.Namespace, *, knob: str) -> OutputFile:
    """`target` of the flag `knob`; `ConfigError` where it is a file that another flag names, under
    any name of it, or the description beside one, which would be replaced.
    """
    for name, given in vars(flags).items():
        words = given if isinstance(given, list | tuple) else (given,)
        paths = [word for word in words if isinstance(word, str | Path)]
        read = name not in _WRITTEN and f"--{name}" != knob
        if read and any(is_file_of(target.path, path) for path in paths):
            raise ConfigError(
                f"{knob} {target.given} is a file that --{name} reads, which would be replaced;"
                " choose another name"
            )
    return target


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be gone, too
        print(sentence.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
