"""Causal-rCM: distillation of video diffusion models into streaming few-step generators.

`rcm.load(path)` opens a checkpoint; everything else is imported from its own module.
"""

from __future__ import annotations

import importlib
from typing import Any

from rcm.core.stop_signal import answer_while_importing

__version__ = "0.1.0"
answer_while_importing(__name__)


def __getattr__(name: str) -> Any:
    """`load` without the cost of torch for those who only ask for the version."""
    if name == "load":
        return importlib.import_module("rcm.front.load").load
    raise AttributeError(f"module 'rcm' has no attribute {name!r}")
