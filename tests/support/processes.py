"""Processes of a test, many of them without an end of their own: none outlives it, however it
ends (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_begun: list[subprocess.Popen] = []


def begin(command: list[Any], *, environment: dict[str, str] | None = None, **pipes: Any) -> subprocess.Popen:
    """A command in the root of the repository, with text in its pipes."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    _begun.append(subprocess.Popen(command, cwd=ROOT, env=variables, text=True, start_new_session=True, **pipes))
    return _begun[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_all() -> None:
    """Kill what still runs, and what it has started."""
    while _begun:
        process = _begun.pop()
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
