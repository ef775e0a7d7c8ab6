"""Capturing a step as a CUDA graph while other streams, and other cards, go on working."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch


class CudaGraph:
    """What `step` launches on `device`, captured: it reads and writes memory that stays where it
    is. `pool` shares memory with other graphs, of which none may run beside this one.

    Not `torch.cuda.graph`, which collects garbage, waits for the device, and captures on a stream
    of whichever card came first.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        *,
        pool: torch.cuda._POOL_HANDLE | None = None,
    ) -> None:
        now = torch.cuda.current_stream(device)
        # kernels of a graph keep the priority of the stream on which it was captured, wherever it
        # is launched
        self._graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device, priority=now.priority)
        side.wait_stream(now)
        with torch.cuda.device(device), torch.cuda.stream(side), torch.no_grad():
            # only calls of this thread may not synchronise: others are decoding or launching a
            # denoiser meanwhile
            self._graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                # what a step leaves half done spoils the capture, which then says so itself
                with suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        now.wait_stream(side)

    def replay(self) -> None:
        """Run the step on what its inputs hold, on the current stream."""
        self._graph.replay()
