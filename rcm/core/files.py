"""Small rules for files and folders that several layers share."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = 1 << 16
"""Bytes: a file system with less room than this is called full."""


def discard(path: Path) -> None:
    """Remove whatever stands at `path`: a file, a link (not what it points to), a folder with its
    contents, or nothing.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to, put in its place at the end. Whatever
    fails before leaves `target` as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{word}_{target.name}") for word in ("writing", "replaced"))
    discard(partial)
    try:
        yield partial
        discard(old)
        if target.is_dir():  # which cannot be replaced in one step
            os.replace(target, old)
        try:
            os.replace(partial, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        discard(old)
    finally:
        discard(partial)


def read_exactly(path: Path, target: bytearray | memoryview, *, start: int) -> None:
    """Fill `target` with the bytes of a file from `start` on; `OSError` where they end before it is
    full. Not mapped: a private mapping counts as memory that the machine must have.
    """
    view, done = memoryview(target), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise OSError(
                    f"the file ends {len(view) - done} bytes early; it was changed after it was"
                    " opened"
                )
            done += got


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 beside `path`, flush it to disk, and rename it into place."""
    temporary = path.with_name(path.name + ".writing")
    # whatever a killed process or another program left there, a link to elsewhere among it
    discard(temporary)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # the reason of the failure counts
            discard(temporary)
        raise


def as_disk_full(error: BaseException, path: Path) -> OSError | None:
    """An OSError of a full disk, where `error` is a writer's own words for one; else None."""
    if isinstance(error, OSError):
        return None
    here = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    if here is None or shutil.disk_usage(here).free > _FULL:
        return None
    return OSError(errno.ENOSPC, "No space left on device", str(path))
