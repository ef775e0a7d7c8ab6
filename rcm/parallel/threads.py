"""Threads of torch: how many a process computes with on a CPU, and that those of its groups end
before it does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

TOY_PARAMETERS = 20_000_000
"""A network with fewer is a toy: its tensors are too small to share among threads, which on a busy
machine then wait for each other.
"""
HELD = "waits for all ranks"
"""Name of a thread that does, in collectives of its own."""
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle_threads(net: nn.Module, *, device: torch.device | str) -> None:
    """One thread for a toy network on a CPU, unless the environment says how many. Others keep
    torch's choice.
    """
    told = any(os.environ.get(name) for name in ENVIRONMENT)
    if (
        torch.device(device).type == "cpu"
        and not told
        and sum(p.numel() for p in net.parameters()) < TOY_PARAMETERS
    ):
        torch.set_num_threads(1)


def end_threads_at_exit() -> None:
    """See to it that gloo's threads are joined when the interpreter ends, before it is taken down.

    Such a thread lets go of a collective's tensors after the one that waited for it has gone on,
    and needs the interpreter for that. Python up to 3.13 ends a thread that asks for an interpreter
    which is being taken down, inside C++, which aborts the process: "terminate called without an
    active exception", in a run that was finished.
    """
    atexit.unregister(_end_threads)
    atexit.register(_end_threads, os.getpid())


def _end_threads(process: int) -> None:
    """A group that was destroyed joins its threads when the last reference to it goes: with frames
    of an error that ended the process, cycles of a model, meshes in caches of DTensor's.
    """
    if os.getpid() != process:  # a fork has none of the threads, and would wait for them
        return
    for name in ("last_exc", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    gc.unfreeze()
    for kept in gc.get_objects():
        if type(kept) is DeviceMesh:
            getattr(kept, "_pg_registry", {}).clear()
    gc.collect()


def end_if_held(status: int) -> None:
    """End the process at once, with all said and closed, where a `HELD` thread of it still waits.

    The interpreter would wait for that thread, it for another rank, and that one for this: only
    with the connections of this process closed do the others hear that it has ended.
    """
    if any(thread.name == HELD for thread in threading.enumerate()):
        for said in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                said.flush()
        os._exit(status)
