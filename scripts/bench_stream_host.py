"""Where the host's time goes while a stream runs: what issuing a chunk costs call by call, what
waits for the device, and which runtime calls block. A part of `scripts.bench_stream`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rcm.kernels.cuda_graph import CudaGraph
from rcm.nets.wan.block import SelfAttention
from rcm.pipelines import captured_inputs, decode_lane
from rcm.pipelines.session import Session


def host_time(session: Session, *, steps: int = 8) -> dict[str, Any]:
    """Of a stream in its steady state, per step and in milliseconds of the host: whole and by call,
    with the largest single call; where torch made the host wait for the device; the runtime calls
    that took longest.
    """
    parts: dict[str, list[float]] = defaultdict(list)
    with timing(session, parts):
        for _ in range(steps):
            begin = time.perf_counter()
            session.step()
            parts["step"].append(1e3 * (time.perf_counter() - begin))
    rows = {
        name: {"per_step": sum(spent) / steps, "calls": len(spent) / steps, "largest": max(spent)}
        for name, spent in parts.items()
        if spent
    }
    rows["step"]["median"] = statistics.median(parts["step"])
    return {"ms": rows, "waits": waits(session), "runtime_calls": runtime_calls(session)}


@contextmanager
def timing(session: Session, parts: dict[str, list[float]]) -> Iterator[None]:
    """Within, the calls that a step is made of leave their times in `parts`; nested ones in
    both.
    """
    places: list[tuple[Any, str, str]] = [
        (session, "_produce", "produce (issue of a chunk)"),
        (session._lane, "decode", "decode (issue)"),
        (decode_lane.Decoding, "result", "result (wait for pixels)"),
        (CudaGraph, "replay", "graph launch"),
        (captured_inputs.CapturedInputs, "set", "inputs: latents and times"),
        (captured_inputs.CapturedInputs, "place", "inputs: slots and tables"),
        (captured_inputs.CapturedInputs, "prompt", "inputs: prompt"),
        (session.loop, "_begin", "cache: slots"),
        (session.loop, "place", "policy before"),
        (session.loop, "settle", "policy after"),
        (session.loop.noise, "start", "noise: start"),
        (session.loop.noise, "step", "noise: step"),
    ]
    found = [
        (where, name, label)
        for where, name, label in places
        if where is not None and hasattr(where, name)
    ]
    before = [(where, name, vars(where).get(name)) for where, name, _ in found]
    for where, name, label in found:
        setattr(where, name, _timed(getattr(where, name), parts[label]))
    try:
        yield
    finally:
        for where, name, old in before:
            setattr(where, name, old) if old is not None else delattr(where, name)


def _timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            spent.append(1e3 * (time.perf_counter() - begin))

    return run


@contextmanager
def variant(net: nn.Module, *, joined: bool, priority: int) -> Iterator[None]:
    """Within, sessions are opened whose captured passes take one product for q, k and v or three,
    and whose decoder runs on a stream of this priority (0: the network's).
    """
    before, join = decode_lane.DecodeLane.PRIORITY, SelfAttention.join
    net._apply(lambda x: x)  # forgets what was joined
    decode_lane.DecodeLane.PRIORITY = priority
    if not joined:
        SelfAttention.join = lambda _: None
    try:
        yield
    finally:
        decode_lane.DecodeLane.PRIORITY, SelfAttention.join = before, join


def waits(session: Session) -> list[str]:
    """Lines of this package in which torch waits for the device during one step, the wait for the
    pixels left out.
    """
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted(
        {
            f"{w.filename.rsplit('/rcm/', 1)[-1]}:{w.lineno}"
            for w in told
            if "synchroniz" in str(w.message)
        }
    )


def runtime_calls(session: Session, *, steps: int = 3, most: int = 8) -> list[dict[str, Any]]:
    """The CUDA runtime calls of a few steps by total time: milliseconds and calls per step, and the
    largest single one.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            session.step()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if (
            event.name.startswith(("cuda", "cu"))
            and event.device_type == torch.autograd.DeviceType.CPU
        ):
            spent[event.name].append(event.time_range.elapsed_us() / 1e3)
    ordered = sorted(spent.items(), key=lambda item: -sum(item[1]))[:most]
    return [
        {"call": name, "ms": sum(x) / steps, "calls": len(x) / steps, "largest_ms": max(x)}
        for name, x in ordered
    ]
