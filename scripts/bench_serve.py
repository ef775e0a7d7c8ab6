"""The live page's server under load: viewers of one shared stream, slow readers and vanishing ones
among them, on this machine alone.

    python -m scripts.bench_serve
    python -m scripts.bench_serve --seconds 20 --clients 50 --slow 10 --vanish 10 --json \\
        outputs/serve.json

A server is started on the shipped checkpoint in a process of its own. One client alone is measured
first, then all of them; then its memory, open files and queues are looked at, and more private
streams than it allows are asked for. Exit status 1 where something is not as it should be.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import command, writable_file

with contextlib.suppress(ModuleNotFoundError):  # `_run` tells
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import WebSocketException

WARM_S, GRACE_S = 2.0, 5.0
SLOW_S = 1.0
"""Seconds that a slow reader waits between two messages."""
MOST_GAP = 1.5
"""What the 99th percentile of well-behaved clients may be, against that of one alone."""
MOST_GROWTH = 32 * 2**20


@dataclass
class Load:
    """What was measured. Gaps in milliseconds."""

    seconds: float
    clients: int
    slow: int
    vanish: int
    single: dict[str, float] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)
    slow_pictures: float = 0.0
    queue_max: float = 0.0
    queue_limit: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)
    memory_mib: tuple[float, float] = (0.0, 0.0)
    files: tuple[int, int] = (0, 0)
    refused: str = ""
    faults: list[str] = field(default_factory=list)


class ServedProcess:
    """`rcm serve` in a process of its own, on a free port."""

    def __init__(self, *flags: str) -> None:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        line = [sys.executable, "-m", "rcm", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", first)
        if found is None:
            raise ConfigError(
                f"the server did not start: {(first + self.process.stdout.read()).strip()[-300:]}"
            )
        self.port = int(found[1])

    def metrics(self) -> dict[str, float]:
        """Values by name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def memory(self) -> int:
        """Resident bytes (Linux; 0 elsewhere)."""
        status = Path(f"/proc/{self.process.pid}/status")
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return 1024 * int(found[1]) if found else 0

    def files(self) -> int:
        """Open files (Linux; 0 elsewhere)."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.exists() else 0

    def stop(self) -> str:
        """End it as Ctrl-C does; the last it said."""
        self.process.send_signal(signal.SIGINT)
        try:
            said, _ = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return said.strip()


_FLAGS = """
seconds float = 120.0  of load; a client alone gets a quarter of it first [%(default)s]
clients int = 50       all of them [%(default)s]
slow int = 10          that read one message a second [%(default)s]
vanish int = 10        that go without a word, or stay and take nothing [%(default)s]
fps float = 16.0       [%(default)s]
json FILE
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Entry point of `rcm bench serve`."""
    parser = Arguments(prog="rcm bench serve", description=__doc__)
    add_flags(parser, _FLAGS, json={"type": writable_file})
    flags = parser.parse_args(argv)
    if importlib.util.find_spec("websockets") is None:
        raise ConfigError(
            "rcm bench serve needs websockets, which is not installed; install it with: pip"
            ' install "rcm[serve]"'
        )
    if flags.seconds < 4:
        raise ConfigError(f"--seconds {flags.seconds:g} must be at least 4")
    if not 0 < flags.slow + flags.vanish < flags.clients:
        raise ConfigError(
            f"--slow {flags.slow} and --vanish {flags.vanish} must leave some of --clients"
            f" {flags.clients}"
        )
    load = measure(**{name: value for name, value in vars(flags).items() if name != "json"})
    print(table(load))
    if flags.json:
        flags.json.write(json.dumps(asdict(load), indent=2))
    return 1 if load.faults else 0


def measure(*, seconds: float, clients: int, slow: int, vanish: int, fps: float = 16.0) -> Load:
    """Start a server, load it, look at it, stop it."""
    os.environ["no_proxy"] = "*"  # all of it is on this machine
    server = ServedProcess(
        "--fps", f"{fps:g}", "--format", "jpeg", "--send_kib", "4", "--idle_s", "3"
    )
    try:
        load = Load(seconds, clients, slow, vanish)
        asyncio.run(_measure(server, load))
    finally:
        said = server.stop()
    if not re.search(r"stopped; \d+ sessions? closed$", said):
        load.faults.append(f"the server did not end well: {said[-200:]}")
    return load


async def _measure(server: ServedProcess, load: Load) -> None:
    address = f"ws://127.0.0.1:{server.port}/ws?stream=shared"
    alone = await _watch(address, max(5.0, load.seconds / 4), first={"steps": [1]})
    load.single = _quantiles([alone])
    before = server.memory(), server.files()
    sampling = asyncio.create_task(_sample(server, load))
    good = load.clients - load.slow - load.vanish
    watching = [asyncio.create_task(_watch(address, load.seconds)) for _ in range(good)]
    reading = [asyncio.create_task(_read_slowly(address, load.seconds)) for _ in range(load.slow)]
    going = [
        asyncio.create_task(_vanish(address, load.seconds, stays=i % 2 == 0))
        for i in range(load.vanish)
    ]
    load.shared = _quantiles(await asyncio.gather(*watching))
    pictures = await asyncio.gather(*reading)
    load.slow_pictures = sum(pictures) / max(1, len(pictures))
    await asyncio.gather(*going)
    sampling.cancel()
    load.refused = await _too_many(server)
    await asyncio.sleep(GRACE_S)
    load.counters = {
        name: value
        for name, value in server.metrics().items()
        if "total" in name or name in ("rcm_clients", "rcm_sessions")
    }
    load.memory_mib = before[0] / 2**20, server.memory() / 2**20
    load.files = before[1], server.files()
    load.faults += _faults(load)


def _faults(load: Load) -> list[str]:
    found = []
    if load.shared["p99"] > MOST_GAP * load.single["p99"]:
        found.append(
            f"gap p99 {load.shared['p99']:.0f} ms is more than {MOST_GAP} times that of one client,"
            f" {load.single['p99']:.0f} ms"
        )
    if load.queue_max > load.queue_limit:
        found.append(
            f"{load.queue_max:g} pictures waited for a client, the limit is {load.queue_limit:g}"
        )
    if load.memory_mib[1] - load.memory_mib[0] > MOST_GROWTH / 2**20:
        found.append(f"memory grew from {load.memory_mib[0]:.0f} to {load.memory_mib[1]:.0f} MiB")
    if load.files[1] > load.files[0] + 2:
        found.append(f"open files grew from {load.files[0]} to {load.files[1]}")
    if load.counters["rcm_clients"] != 0:
        found.append(f"{load.counters['rcm_clients']:g} clients are still counted")
    if load.slow and not load.counters["rcm_dropped_total"]:
        found.append("nothing was dropped for slow readers; make --seconds longer")
    if "session limit reached" not in load.refused:
        found.append(f"a session over the limit was answered {load.refused!r}")
    return found


async def _watch(
    address: str, seconds: float, *, first: dict[str, Any] | None = None
) -> list[float]:
    """Times at which pictures came, after the first seconds."""
    times, end = [], time.monotonic() + WARM_S + seconds
    async with connect(address, compression=None, max_queue=None) as client:
        if first is not None:
            await client.send(json.dumps(first))
        while (now := time.monotonic()) < end:
            got = await asyncio.wait_for(client.recv(), 30)
            if isinstance(got, bytes) and now > end - seconds:
                times.append(time.monotonic())
    return times


def _small(address: str) -> socket.socket:
    """A socket that holds a few pictures, so that reading slowly is felt by the server."""
    mine = socket.socket()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    mine.connect(("127.0.0.1", int(re.search(r":(\d+)/", address)[1])))
    mine.setblocking(False)
    return mine


async def _read_slowly(address: str, seconds: float) -> int:
    """How many pictures a reader got that waits between messages."""
    count, end = 0, time.monotonic() + WARM_S + seconds
    try:
        async with connect(
            address, sock=_small(address), compression=None, max_queue=1, close_timeout=1
        ) as client:
            while time.monotonic() < end:
                count += isinstance(await asyncio.wait_for(client.recv(), 30), bytes)
                await asyncio.sleep(SLOW_S)
            client.transport.abort()
    except (WebSocketException, OSError):
        pass  # a server may close who is too slow
    return count


async def _vanish(address: str, seconds: float, *, stays: bool) -> None:
    """Come, and go without a word, over and over; or come once and take nothing more."""
    end = time.monotonic() + WARM_S + seconds
    while time.monotonic() < end:
        client: ClientConnection = await connect(
            address, sock=_small(address), compression=None, max_queue=1, close_timeout=1
        )
        left = max(0.0, end - time.monotonic())
        await asyncio.sleep(left if stays else min(left, 2.0))
        client.transport.abort()


async def _too_many(server: ServedProcess) -> str:
    """What a private stream beyond the limit is told."""
    limit, clients, said = int(server.metrics()["rcm_sessions_limit"]), [], ""
    for _ in range(limit + 1):
        client = await connect(
            f"ws://127.0.0.1:{server.port}/ws?stream=new", compression=None, max_queue=None
        )
        clients.append(client)
        answer = json.loads(await asyncio.wait_for(client.recv(), 30))
        said = answer.get("reason", "") if answer["type"] == "refused" else said
    for client in clients:
        client.transport.abort()
    return said


async def _sample(server: ServedProcess, load: Load) -> None:
    """Keep the longest queue that was seen."""
    while True:
        values = await asyncio.to_thread(server.metrics)
        load.queue_max = max(load.queue_max, values["rcm_client_queue_max"])
        load.queue_limit = values["rcm_client_queue_limit"]
        await asyncio.sleep(0.5)


def _quantiles(times: list[list[float]]) -> dict[str, float]:
    """Of all gaps of all clients."""
    gaps = sorted(1e3 * (b - a) for client in times for a, b in pairwise(client))
    told = {
        f"p{round(100 * q)}": gaps[max(0, math.ceil(q * len(gaps)) - 1)] for q in (0.5, 0.95, 0.99)
    }
    return {"clients": len(times), "gaps": len(gaps), **told, "max": gaps[-1]}


def table(load: Load) -> str:
    """The measurements as Markdown."""
    lines = ["| clients | gaps | p50 ms | p95 ms | p99 ms | max ms |", "|---|---|---|---|---|---|"]
    for name, q in (
        ("one alone", load.single),
        (f"{load.shared['clients']:g} well-behaved of {load.clients}", load.shared),
    ):
        lines.append(
            f"| {name} | {q['gaps']:g} | {q['p50']:.1f} | {q['p95']:.1f} | {q['p99']:.1f} |"
            f" {q['max']:.1f} |"
        )
    counted = ", ".join(
        f"{name.removeprefix('rcm_').removesuffix('_total')} {value:g}"
        for name, value in load.counters.items()
    )
    lines += [
        "",
        (
            f"{load.seconds:g} s; slow readers got {load.slow_pictures:.0f} pictures each; queues"
            f" of clients held {load.queue_max:g} of {load.queue_limit:g} at most"
        ),
        f"counters: {counted}",
        (
            f"memory {load.memory_mib[0]:.0f} -> {load.memory_mib[1]:.0f} MiB, open files"
            f" {load.files[0]} -> {load.files[1]}"
        ),
        f"over the limit: {load.refused}",
        *(f"FAULT: {fault}" for fault in load.faults),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
