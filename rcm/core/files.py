"""Small rules for files and folders that several layers share."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rcm.core.errors import ConfigError

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
def sole_writer(path: Path, *, wait: bool = False) -> Iterator[IO[bytes]]:
    """The file `path`, empty and locked, to be written and then renamed inside the block: whoever
    comes meanwhile waits, or gets `BlockingIOError`, and then has a file of its own. A block that
    fails leaves none.

    What a killed process or another program left at `path` is removed, a link or a pipe among it.
    """
    while True:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                discard(path)
        try:
            file = open(path, "ab")  # noqa: SIM115 (closed below)
        except PermissionError:
            if not os.path.lexists(path):
                raise
            discard(path)  # of another user
            continue
        with file:
            if not _locked(file, wait=wait):
                told = "another process is writing it"
                raise BlockingIOError(errno.EWOULDBLOCK, told, str(path))
            if not is_at(file, path):
                continue
            try:
                file.truncate(0)
                yield file
            except BaseException:
                with suppress(OSError):  # the reason of the failure counts
                    if is_at(file, path):
                        discard(path)
                raise
            return


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one of that name: its writer may have renamed or removed it after
    it was opened here.
    """
    try:
        return os.fstat(file.fileno()).st_ino == os.lstat(path).st_ino
    except FileNotFoundError:
        return False


def _locked(file: IO[Any], *, wait: bool) -> bool:
    """Take the system's lock, which ends with the process; False while another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nothing can be said, so the write goes on
    return True


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to, put in its place at the end, on disk.
    Whatever fails before leaves `target` as it was; an `OSError` of the writing names `target`.

    `ConfigError` while another process writes the same target.
    """
    lock, partial = (target.with_name(f".{word}_{target.name}") for word in ("locked", "writing"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(lock):
            try:
                discard(partial)
                yield partial
                flush(partial)
                put_in_place(partial, target)
            except RuntimeError as error:  # torch's own words
                refused = as_refused(error, target) if type(error) is RuntimeError else None
                if refused is None:
                    raise
                raise refused from error
            finally:
                for left in (partial, lock):
                    with suppress(OSError):  # the reason of a failure counts
                        discard(left)
    except BlockingIOError as error:
        told = "is being written by another process; wait for it, or choose another target"
        raise ConfigError(f"{target} {told}") from error
    except OSError as error:
        own = (str(lock), str(partial))
        if error.errno is None or not str(error.filename or own[0]).startswith(own):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


def put_in_place(new: Path, target: Path) -> None:
    """Give the file or folder `new` the name `target`, at once; what had it is removed then.
    `IsADirectoryError` for a file in place of a folder, which is more than what is replaced.
    """
    if not os.path.lexists(target) or not new.is_dir():
        os.replace(new, target)
        return
    old = new
    if not _exchanged(new, target):
        old = target.with_name(f".replaced_{target.name}")
        discard(old)
        os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            os.replace(old, target)
            raise
    with suppress(OSError):  # as network file systems refuse while somebody reads it
        discard(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and not swap(here, os.fsencode(one), here, os.fsencode(other), exchange)


def flush(path: Path) -> None:
    """Bring a file, or all files of a folder, to the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


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


@contextmanager
def writing(target: object, told: str, *, own: Iterable[Path] = ()) -> Iterator[None]:
    """An `OSError` within is raised again about `target`, its reason after `told`. With `own`, only
    one about these files, or about none: others are of what is read meanwhile.
    """
    try:
        yield
    except OSError as error:
        mine = [None, *map(str, own)]
        if error.errno is None or (len(mine) > 1 and error.filename not in mine):
            raise
        reason = f"{told}: {error.strerror or error}"
        raise OSError(error.errno, reason, str(target)) from error


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 beside `path`, flush it to disk, and rename it into place; an `OSError`
    names a path.
    """
    data, temporary = text.encode(), path.with_name(path.name + ".writing")
    try:
        with sole_writer(temporary, wait=True) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def as_refused(error: BaseException, path: Path) -> OSError | None:
    """The `OSError` of which `error` is a writer's own words: it quotes one, the disk is full, or
    torch found less written than it gave; else None.
    """
    if isinstance(error, OSError):
        return None
    here = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    if quoted := re.search(r"\[Errno (\d+)\]", str(error)):
        number = int(quoted[1])
    elif here is not None and shutil.disk_usage(here).free <= _FULL:
        number = errno.ENOSPC
    elif "unexpected pos" in str(error):
        number = errno.EIO
    else:
        return None
    return OSError(number, os.strerror(number), str(path))
