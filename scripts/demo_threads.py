"""How many threads a stage of the demo takes: small tensors lose by every thread that waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

PROC_STAT = Path("/proc/stat")


def free_threads() -> int:
    """Threads for the stage that runs alone: the idle cores, at most 2; what OMP_NUM_THREADS says
    where it is set.
    """
    if told := os.environ.get("OMP_NUM_THREADS", ""):
        return int(told) if told.isdecimal() and int(told) > 0 else 1
    return max(1, min(2, round(idle_cores())))


def idle_cores(seconds: float = 0.5) -> float:
    """Cores that had nothing to do while this waited. The load average would still count what has
    ended, such as the installation before this; it is asked where Linux's count is missing.
    """
    try:
        idle = _idle_seconds()
        time.sleep(seconds)
        return (_idle_seconds() - idle) / seconds
    except (OSError, ValueError, IndexError):
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return (os.cpu_count() or 1) - busy


def _idle_seconds() -> float:
    """Idle time since the machine's start, summed over its cores."""
    idle, waiting = map(int, PROC_STAT.read_text().split("\n", 1)[0].split()[4:6])
    return (idle + waiting) / os.sysconf("SC_CLK_TCK")
