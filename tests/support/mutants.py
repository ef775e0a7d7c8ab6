"""Load a module with one of its lines broken, to show that the checks notice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(module: ModuleType, *, old: str, new: str, folder: Path, count: int = 1) -> ModuleType:
    """A private copy of `module` in which `old`, which must occur exactly `count` times, reads
    `new`.

    The copy is written to `folder` because Triton reads the source of its kernels from files.
    """
    source = Path(module.__file__).read_text()
    assert source.count(old) == count, (
        f"{module.__name__} has {source.count(old)} places that read {old!r}, the mutant expects {count}: update the list"
    )
    path = folder / f"mutant_of_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"mutant_{abs(hash((old, new)))}_{path.stem}", path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant  # dataclasses look their module up
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[spec.name]
    return mutant
