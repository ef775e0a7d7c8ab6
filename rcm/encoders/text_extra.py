"""Importing what only the `text` extra installs."""

from __future__ import annotations

import importlib
from types import ModuleType

from rcm.core.errors import ConfigError


def text_extra(module: str, *, purpose: str) -> ModuleType:
    """The imported `module`; `ConfigError` names the extra to install if it is absent.

    `purpose` is the subject of the sentence. A broken package raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ConfigError(
            f"{purpose} needs the package {error.name!r}, which is not installed: pip install"
            " 'rcm[text]'"
        ) from error
