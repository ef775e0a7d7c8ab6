"""What a training command says: short lines on its console, whole ones in the job's folder."""

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
    """Inside, lines from INFO on (ranks other than 0: WARNING) are short on stderr, in place of
    loguru's own, and on rank 0 all are whole in `folder`/train.log, appended.
    """
    with suppress(ValueError):  # taken away before
        logger.remove(0)
    who = f"rank {rank}: " if world_size > 1 else ""

    def short(record: Record) -> str:
        level = record["level"].name
        mark = "" if level == "INFO" else f"{level.lower()}: "
        return f"{{time:HH:mm:ss}}  {who}{mark}{{message}}\n"

    mine = [logger.add(_tell, level="WARNING" if rank else "INFO", format=short)]
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
