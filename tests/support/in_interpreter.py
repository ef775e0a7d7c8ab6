"""Triton's interpreter is chosen when a kernel is defined, so what runs in it has a process of its
own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
from packaging.version import Version

SECONDS = 600
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
"""Of all programs: the server would keep for the others what the first test had set."""
_running: list[subprocess.Popen] = []


def in_interpreter(module: str, *words: str) -> Any:
    """What `tests.support.<module>`, run with `words` under the interpreter, prints as JSON; skips
    without Triton, and where its interpreter is older than numpy, which no longer makes a number of
    an array of one.
    """
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip(f"Triton {triton.__version__} interprets with numpy before 2.4, here is {numpy.__version__}: pip install 'numpy<2.4'")
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {"module": f"tests.support.{module}", "words": words, "out": str(out), "err": str(err)}
        print(json.dumps(asked), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            _end()
            pytest.fail(f"{module} still runs after {SECONDS} s")
        status = server.stdout.readline().strip()
        assert status == "0", f"status {status or 'none'}: {err.read_text()[-3000:] if err.exists() else ''}"
        return json.loads(out.read_text())


def _server() -> subprocess.Popen:
    """The one at hand, or another where that is gone."""
    if _running and _running[0].poll() is not None:
        _end()
    if not _running:
        command = [sys.executable, "-m", "tests.support.interpreter_server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _running.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes))
    return _running[0]


@atexit.register
def _end() -> None:
    """The server, and a program of its that still runs."""
    for server in _running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    _running.clear()
