"""Standard output that cannot be written to any more: its reader has gone (`| head`), its disk is
full.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import NamedTuple

_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Lost(NamedTuple):
    """Why, in a sentence; `reader_gone`: whoever read it has seen enough."""

    sentence: str
    reader_gone: bool


def printable_output() -> None:
    """Names of files and prompts that standard output has no characters for are spelled out from
    now on, not an error in the middle of the work.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def lost_output(error: BaseException | None = None) -> Lost | None:
    """What became of standard output, None while it can be written to; `error` is what was met
    while it may have been written to. Once it is lost, what is printed goes nowhere, so that the
    interpreter's own flush at its end does not fail either.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            # without a buffer nothing is left of what failed: files carry their path, so try again
            if isinstance(error, OSError) and error.filename is None and error.errno in _ERRORS:
                os.write(sys.stdout.fileno(), b"\n")
    except io.UnsupportedOperation:  # no file at all, but an object of a notebook's
        return None
    except OSError as problem:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        gone = problem.errno == errno.EPIPE
        why = "its reader has gone" if gone else f"{problem.strerror or problem}"
        return Lost(f"cannot write to standard output: {why}", gone)
    return None
