"""What a training command says on its console, and what it keeps in the job's folder: short lines
there, whole ones here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

LOG_FILE = "train.log"
FULL = "{time:YYYY-MM-DD HH:mm:ss.SSS} | {level: <8} | {name}:{function}:{line} - {message}"


def _tell(line: str) -> None:
    sys.stderr.write(line)


@contextmanager
def told(folder: Path, *, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Inside, log lines are short on stderr (time and message, from INFO on; ranks other than 0:
    warnings), in place of loguru's own handler, and whole in `folder`/train.log (rank 0, from DEBUG
    on, appended).
    """
    with suppress(ValueError):  # taken away before
        logger.remove(0)
    who = f"rank {rank}: " if world_size > 1 else ""

    def short(record: Record) -> str:
        level = record["level"].name
        return (
            "{time:HH:mm:ss} "
            f" {who}{'' if level == 'INFO' else level.lower() + ': '}{{message}}\n"
        )

    mine = [
        logger.add(
            _tell,
            level="WARNING" if rank else "INFO",
            format=short,
        )
    ]
    if rank == 0:
        # loguru fills in braces of a name
        path = str(folder / LOG_FILE).replace("{", "{{").replace("}", "}}")
        mine.append(logger.add(path, level="DEBUG", format=FULL, mode="a"))
    try:
        yield
    finally:
        for handler in mine:
            try:
                logger.remove(handler)
            # what could not be written comes up again when the file is closed; it must not hide why
            # the run ends
            except OSError as error:
                sys.stderr.write(f"warning: {folder / LOG_FILE} is incomplete: {error.strerror}\n")
