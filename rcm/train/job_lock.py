"""One run per job folder: a lock file that says who holds it, and that a dead holder does not
keep.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from loguru import logger

from rcm.core.errors import ConfigError
from rcm.core.files import discard, is_at

NAME = "running.lock"
_TRIES = 5


@contextmanager
def job_lock(folder: Path, *, knob: str = "job.name") -> Iterator[None]:
    """Hold `folder` for this process. ConfigError naming host, process id and start time while
    another one does; `knob` chooses another folder.

    The system's lock on the file ends with its holder, however that ends. Where it is still held
    (by a child of a dead run), the process that the file names decides.
    """
    path = folder / NAME
    file = _acquired(path, knob)
    try:
        if holder := _holder(file):
            logger.warning(
                "{} was left by a run that ended without removing it, {}; this run takes over",
                path,
                _said(holder),
            )
        file.truncate(0)
        file.write(json.dumps(_self()) + "\n")
        file.flush()
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def _acquired(path: Path, knob: str) -> IO[str]:
    """The file, locked by this process and still under its name."""
    for _ in range(_TRIES):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            discard(path)
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held as long as the run)
        free = _lock(file)
        if free and is_at(file, path):
            return file
        holder = _holder(file)
        file.close()
        if not free and not _dead(holder):
            raise ConfigError(
                f"the job folder {path.parent} is in use by {_said(holder)}; stop it, or choose"
                f" another {knob}"
            )
        if not free:
            discard(path)
    raise ConfigError(
        f"the job folder {path.parent} is being taken by other runs at this moment; start again, or"
        f" choose another {knob}"
    )


def _lock(file: IO[str]) -> bool:
    """Take the system's lock; False while another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "{}: this file system has no locks ({}); a run on another host is not noticed",
            file.name,
            error.strerror,
        )
        holder = _holder(file)
        return not holder or _dead(holder)
    return True


def _holder(file: IO[str]) -> dict[str, Any]:
    """What the file says of its holder; empty for nothing readable."""
    file.seek(0)
    with suppress(ValueError, OSError, RecursionError):
        found = json.loads(file.read(10_000))
        return found if isinstance(found, dict) else {}
    return {}


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be gone: it ran on this host, and its process id is free or
    belongs to a later process.
    """
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    return _birth(holder["pid"]) != holder.get("birth")


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "birth": _birth(pid),
    }


def _birth(pid: int) -> int | None:
    """When process `pid` began, in ticks since the system started; None if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _said(holder: dict[str, Any]) -> str:
    pid, host, started = (holder.get(key, "unknown") for key in ("pid", "host", "started"))
    return f"process {pid} on host {host}, started {started}"
