"""Causal-rCM: distillation of video diffusion models into streaming few-step generators.

`rcm.load(path)` opens a checkpoint; everything else is imported from its own module.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` without the cost of torch for those who only ask for the version."""
    if name == "load":
        return importlib.import_module("rcm.front.load").load
    raise AttributeError(f"module 'rcm' has no attribute {name!r}")
