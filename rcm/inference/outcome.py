"""How command lines end: where they may write, which device they may use, one sentence and exit status 2 for what a user can change."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from loguru import logger

from rcm.core.errors import CheckpointError, ConfigError, NonFinite
from rcm.pipelines.video_io import VideoError


class OutOfMemory(ConfigError):
    """Memory of a device ran out; told by the rank that it happened to, for the others may have enough."""


USER_ERRORS = (ConfigError, CheckpointError, NonFinite, VideoError, OSError)


def short_log() -> None:
    """Log lines of a command for reading, "warning: ..." on stderr; what progress says goes to stdout."""
    logger.remove()
    logger.add(lambda line: sys.stderr.write(line), level="WARNING", format=lambda record: f"{record['level'].name.lower()}: {{message}}\n")


def exit_status(work: Callable[[], None], *, tell: bool = True) -> int:
    """0 after `work`; 2 after an error that the user can put right, told in one sentence on stderr by the rank that may `tell`."""
    try:
        work()
    except USER_ERRORS as error:
        if tell or isinstance(error, OutOfMemory):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    return 0


def writable(path: str, *, suffix: str) -> Path:
    """The path, once it is clear that a file can be made there: before weights are read and not after the video is computed."""
    target = Path(path)
    if target.suffix != suffix:
        raise ConfigError(f"{path} must end in {suffix}")
    probe = target.with_name(f".{target.name}.{os.getpid()}.probe")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write there: {error.strerror}", path) from error
    return target


def check_device(name: str) -> None:
    """`ConfigError` unless tensors can be made on the device called `name`."""
    if name.partition(":")[0] == "meta":
        raise ConfigError("--device meta has no memory; choose cuda or cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def check_seed(seed: int, *, draws: int = 1) -> None:
    """`ConfigError` unless `seed` .. `seed + draws - 1` are seeds that a generator takes."""
    if not -(2**63) <= seed <= 2**64 - draws:
        raise ConfigError(f"--seed {seed} must be at least -2^63 and, with {draws} in a row, below 2^64; choose a smaller one")
