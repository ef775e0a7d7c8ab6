"""Signs of life of a run, and how its devices are doing: a heartbeat with a watch over stalls, and
figures of memory, load and temperature.

Names of the figures are those of the release: `DeviceMonitor/max_temp`, `min_`, `avg_` over all
ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger

from rcm.core.errors import ConfigError, first_line
from rcm.core.records import Record, within
from rcm.train.describe import write_atomically
from rcm.train.observers import is_main
from rcm.train.state import TrainState
from rcm.train.stragglers import StragglersConfig

_PLACES = 3
"""Places of the main thread that a stall tells of."""


@dataclass(frozen=True)
class HeartBeatConfig(Record):
    """Signs of life, `heartbeat.json` in the job's folder."""

    every_n: int = within(0, least=0, most=10**12)  # iterations between two beats; 0 = no heartbeat
    # minutes between lines; as long without an iteration is a stall
    update_interval_in_minute: float = within(20.0, above=0, most=1e6)


@dataclass(frozen=True)
class DeviceMonitorConfig(Record):
    """Figures of every rank's process and card, as `DeviceMonitor/...` in the log."""

    every_n: int = within(0, least=0, most=10**12)  # iterations between two figures; 0 = never
    # CUDA: also what torch's allocator holds, splits and had to ask for again
    log_memory_detail: bool = True


@dataclass(frozen=True)
class CallbacksConfig:
    """What watches a run without changing a weight. `callbacks=[basic]` turns the first two on."""

    heart_beat: HeartBeatConfig = field(default_factory=HeartBeatConfig)
    device_monitor: DeviceMonitorConfig = field(default_factory=DeviceMonitorConfig)
    stragglers: StragglersConfig = field(default_factory=StragglersConfig)

    def __post_init__(self) -> None:
        for name, given, idle in (
            ("heart_beat", self.heart_beat, HeartBeatConfig()),
            ("device_monitor", self.device_monitor, DeviceMonitorConfig()),
            ("stragglers", self.stragglers, StragglersConfig()),
        ):
            if given.every_n == 0 and given != idle:
                key = next(
                    key.name
                    for key in fields(given)
                    if getattr(given, key.name) != getattr(idle, key.name)
                )
                raise ConfigError(
                    f"{name}.{key}={getattr(given, key)} has no effect while its every_n=0; set"
                    " that too"
                )


class HeartBeat:
    """A file that says when the run was last seen at work, and a watch over it, on rank 0.

    Every `every` iterations the JSON file `path` is written anew (atomically): iteration, time
    (UTC), seconds per iteration since the last beat, host, process, `state` ("training", "stalled",
    "ended"). A log line comes once in `minutes`. When no iteration ends for `minutes`, a thread of
    its own writes "stalled" and warns, with the places where the main thread stands; once per
    stall.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int,
        minutes: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.every, self.minutes, self._clock = Path(path), every, minutes, clock
        self._lock, self._writing, self._over = (
            threading.Lock(),
            threading.Lock(),
            threading.Event(),
        )
        self._watcher: threading.Thread | None = None
        # iteration and time: of the last iteration, of the last beat
        self._seen = self._beat = (0, 0.0)
        self._told, self._stalled = 0.0, False

    def started(self, state: TrainState) -> None:
        """First beat; the watch begins."""
        if not is_main():
            return
        now = self._clock()
        self._seen = self._beat = (state.iteration, now)
        self._told = now
        self._write("training", seconds=None)
        self._over.clear()
        self._watcher = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._watcher.start()

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """A beat when it is time, a line when it is."""
        if not is_main:
            return {}
        now = self._clock()
        with self._lock:
            since, was_stalled = now - self._seen[1], self._stalled
            self._seen, self._stalled = (state.iteration, now), False
        if was_stalled:
            logger.warning(
                "iterations go on: number {} took {:.1f} minutes", state.iteration, since / 60
            )
        if was_stalled or state.iteration % self.every == 0:
            count, seconds = state.iteration - self._beat[0], now - self._beat[1]
            self._beat = (state.iteration, now)
            self._write_if_possible("training", seconds=seconds / count if count else None)
        if now - self._told >= 60 * self.minutes:
            self._told = now
            logger.info("heartbeat: at work on iteration {}", state.iteration + 1)
        return {}

    def finished(self) -> None:
        """The watch ends; the file says so."""
        if self._watcher is None:
            return
        self._over.set()
        self._watcher.join()
        self._watcher = None
        self._write_if_possible("ended")

    def _watch(self) -> None:
        pause = max(0.01, min(30.0, 15 * self.minutes))
        while not self._over.wait(pause):
            with self._lock:
                iteration, since = self._seen[0], self._clock() - self._seen[1]
                news = since >= 60 * self.minutes and not self._stalled
                self._stalled |= news
            if news:
                logger.warning(
                    "no iteration has ended for {:.1f} minutes, the last was {}; the main thread is"
                    " in {}",
                    since / 60,
                    iteration,
                    _places(),
                )
                self._write_if_possible("stalled")

    def _write_if_possible(self, state: str, *, seconds: float | None = None) -> None:
        try:
            with self._writing:  # both threads write the file
                if state != "stalled" or self._stalled:
                    self._write(state, seconds=seconds)
        except OSError as error:  # the file is a sign, and must not end what it is a sign of
            logger.warning("heartbeat not written: {}", first_line(error))

    def _write(self, state: str, *, seconds: float | None) -> None:
        record = {
            "state": state,
            "iteration": self._seen[0],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds_per_iteration": None if seconds is None else round(seconds, 4),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        write_atomically(self.path, json.dumps(record) + "\n")


def _places() -> str:
    """The innermost calls of the main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = traceback.extract_stack(frame)[-_PLACES:] if frame is not None else []
    return (
        " < ".join(
            f"{Path(call.filename).name}:{call.lineno} {call.name}" for call in reversed(calls)
        )
        or "no place that can be seen"
    )


NVML: Mapping[str, tuple[Callable[[torch.device], float], float]] = {
    "util": (torch.cuda.utilization, 1),
    "temp": (torch.cuda.temperature, 1),
    "power": (torch.cuda.power_draw, 1000),
    "clock": (torch.cuda.clock_rate, 1),
    "gpu_mem_used_gb": (torch.cuda.device_memory_used, 2**30),
}
"""Figure -> (who is asked, units of the answer per unit of the figure)."""


class DeviceMonitor:
    """Figures of every rank's process and card, every `every` iterations, as highest, lowest and
    mean over ranks.

    cpu_mem_gb: resident memory of the process; on CUDA peak_gpu_mem_gb, peak_gpu_mem_reserved_gb,
    with `detail` also gpu_mem_active_gb, gpu_mem_inactive_split_gb and alloc_retries (of torch's
    allocator); where NVML answers (package nvidia-ml-py) util (%), temp (degrees Celsius), power
    (W), clock (MHz), gpu_mem_used_gb (of all processes). GB here is 2^30 bytes, as in the release.
    `gather` gives every rank the figures of all.
    """

    def __init__(
        self,
        *,
        every: int,
        device: torch.device,
        detail: bool = True,
        gather: Callable[[dict[str, float]], list[dict[str, float]]] | None = None,
    ) -> None:
        self.every, self.device, self.detail, self._gather = (
            every,
            device,
            detail,
            gather or _of_all_ranks,
        )
        self._silent = set(() if device.type == "cuda" else NVML)

    def started(self, state: TrainState) -> None:
        """Forget earlier peaks; see what NVML answers."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._nvml_figures()

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Highest, lowest and mean figures when it is time; the same on every rank. Collective."""
        if state.iteration % self.every:
            return {}
        everyone = self._gather(self._figures())
        found = {}
        for name in sorted({name for figures in everyone for name in figures}):
            values = [figures[name] for figures in everyone if name in figures]
            found[f"DeviceMonitor/max_{name}"] = max(values)
            found[f"DeviceMonitor/min_{name}"] = min(values)
            found[f"DeviceMonitor/avg_{name}"] = sum(values) / len(values)
        return found

    def _figures(self) -> dict[str, float]:
        figures = {"cpu_mem_gb": resident_bytes() / 2**30}
        if self.device.type == "cuda":
            figures["peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            figures["peak_gpu_mem_reserved_gb"] = (
                torch.cuda.max_memory_reserved(self.device) / 2**30
            )
            if self.detail:
                stats = torch.cuda.memory_stats(self.device)
                figures["gpu_mem_active_gb"] = stats.get("active_bytes.all.current", 0) / 2**30
                figures["gpu_mem_inactive_split_gb"] = (
                    stats.get("inactive_split_bytes.all.current", 0) / 2**30
                )
                figures["alloc_retries"] = float(stats.get("num_alloc_retries", 0))
        return figures | self._nvml_figures()

    def _nvml_figures(self) -> dict[str, float]:
        """What NVML answers; what it does not is said once and not asked again."""
        figures, reasons = {}, {}
        for name in NVML.keys() - self._silent:
            ask, unit = NVML[name]
            try:
                figures[name] = ask(self.device) / unit
            # NVML has errors of its own kind, and a card need not answer every question
            except Exception as error:
                reasons[name] = (
                    "pip install 'rcm[monitor]'"
                    if isinstance(error, ImportError)
                    else first_line(error)
                )
        if reasons:
            self._silent |= reasons.keys()
            told = "; ".join(sorted(set(reasons.values())))
            logger.warning(
                "device monitor: {} left out, NVML does not tell ({})",
                ", ".join(sorted(reasons)),
                told,
            )
        return figures


def resident_bytes() -> int:
    """Memory of this process that is in RAM; its peak where the system tells only that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _of_all_ranks(own: dict[str, float]) -> list[dict[str, float]]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return everyone
