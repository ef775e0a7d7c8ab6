"""Load a module with one of its lines broken, to show that the checks notice."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType


def load(module: ModuleType, *, old: str, new: str, folder: Path, count: int = 1) -> ModuleType:
    """A private copy of `module` in which `old`, which must occur exactly `count` times however its
    lines are broken, reads `new`.

    The copy is written to `folder` because Triton reads the source of its kernels from files.
    """
    text, found = _anyhow_broken(old).subn(lambda _: new.lstrip(), Path(module.__file__).read_text())
    assert found == count, f"{module.__name__} has {found} places that read {old!r}, the mutant expects {count}: update the list"
    path = folder / f"mutant_of_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"mutant_{abs(hash((old, new)))}_{path.stem}", path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant  # dataclasses look their module up
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[spec.name]
    return mutant


def places(module: ModuleType, old: str) -> int:
    """How many places of `module` read `old`."""
    return len(_anyhow_broken(old).findall(Path(module.__file__).read_text()))


def _anyhow_broken(code: str) -> re.Pattern[str]:
    """Matches `code` with any white space between its words and signs, and with a comma before a
    closing bracket.
    """
    parts, pattern = re.findall(r"\w+|[^\w\s]", code), ""
    for before, part in zip([" ", *parts], parts, strict=False):
        gap = r"\s+" if before[-1].isalnum() and part[0].isalnum() else r"\s*" if before != " " else ""
        pattern += gap + (r"(?:,\s*)?" if part in ")]}" else "") + re.escape(part)
    return re.compile(pattern)
