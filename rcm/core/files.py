"""Small rules for files and folders that several layers share."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

_FULL = 1 << 16
"""Bytes: a file system with less room than this is called full."""


def discard(path: Path) -> None:
    """Remove whatever stands at `path`: a file, a link (not what it points to), a folder with its contents, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def as_disk_full(error: BaseException, path: Path) -> OSError | None:
    """An OSError of a full disk, where `error` is a writer's own words for one; else None."""
    if isinstance(error, OSError):
        return None
    here = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    if here is None or shutil.disk_usage(here).free > _FULL:
        return None
    return OSError(errno.ENOSPC, "No space left on device", str(path))
