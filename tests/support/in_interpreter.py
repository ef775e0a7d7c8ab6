"""Triton's interpreter is chosen when a kernel is defined, so what runs in it has a process of its
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest


def in_interpreter(module: str, *words: str) -> Any:
    """What `tests.support.<module>`, run with `words` under the interpreter, prints as JSON; skips
    without Triton.
    """
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.support.{module}", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
