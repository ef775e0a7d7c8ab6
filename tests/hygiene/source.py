"""The tree under test, parsed once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def files(*folders: str) -> tuple[Path, ...]:
    """Python files below the given folders of the repository."""
    return tuple(sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(), filename=str(path))


def name(path: Path) -> str:
    """Path relative to the repository, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def calls(path: Path) -> list[tuple[int, str]]:
    """(line, called name) of every call: the last part of an attribute, or the plain name."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = node.func
            found.append((node.lineno, called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")))
    return found
