"""Triton's interpreter is chosen when a kernel is defined, so what runs in it has a process of its
own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

SECONDS = 300


def in_interpreter(module: str, *words: str) -> Any:
    """What `tests.support.<module>`, run with `words` under the interpreter, prints as JSON; skips
    without Triton.
    """
    pytest.importorskip("triton")
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {"module": f"tests.support.{module}", "words": words, "out": str(out), "err": str(err)}
        print(json.dumps(asked), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            _server.cache_clear()
            server.kill()
            pytest.fail(f"{module} still runs after {SECONDS} s")
        status = server.stdout.readline().strip()
        assert status == "0", f"status {status or 'none'}: {err.read_text()[-3000:] if err.exists() else ''}"
        return json.loads(out.read_text())


@functools.cache
def _server() -> subprocess.Popen:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.interpreter_server"]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server
