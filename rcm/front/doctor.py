"""`rcm doctor`: what this machine, or every rank of a launch, has, whether the kernels are right on
it, and how fast the ranks reach each other. Each line is ok, a warning, or a fault with what to do.

    rcm doctor
    torchrun --nproc_per_node=8 -m rcm doctor
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
import torch.distributed as dist

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError, first_line
from rcm.inference.outcome import command, writable_file
from rcm.nets.attention import BACKENDS
from rcm.parallel.agree import spread
from rcm.parallel.mesh import launch_group
from rcm.train.describe import write_atomically

GIB = 1 << 30
TESTED = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.7")}
"""Versions that the tests and the measurements of docs/performance_log.md ran with."""
PACKAGES = (
    "torch",
    "triton",
    "hydra-core",
    "webdataset",
    "safetensors",
    "imageio",
    "wandb",
    "loguru",
)
EXTRAS = {
    "transformers": "text",
    "flash-attn": "flash",
    "transformer-engine": "te",
    "megatron-core": "te",
    "uvicorn": "serve",
}
"""Packages of optional extras: absent is not a fault."""
PAYLOAD = 64 << 20
"""Bytes per rank of the collectives that are timed: about a block of the 14B network, sharded over
8.
"""
SLOW_LINK = {"cuda": 20.0, "cpu": 0.0}
"""GB/s per rank below which FSDP2 at 14B waits for the network more than it computes."""
State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it unless it is ok."""

    state: State
    name: str
    found: str
    advice: str = ""


def software() -> Iterator[Finding]:
    """Python and the packages, with the versions that are known to work together."""
    yield Finding("ok", "python", platform.python_version())
    for name in PACKAGES:
        try:
            here = version(name)
        except PackageNotFoundError:
            needs_card = name == "triton" and not torch.cuda.is_available()
            state: State = "warning" if needs_card or name == "wandb" else "fault"
            yield Finding(state, name, "not installed", f"pip install {name}")
            continue
        known = TESTED.get(name)
        if known and not any(here.startswith(f"{good}.") for good in known):
            yield Finding(
                "warning", name, here, f"tested with {' and '.join(known)}; others may work"
            )
        else:
            yield Finding("ok", name, here)
    absent = [f"{name} (rcm[{extra}])" for name, extra in EXTRAS.items() if not _installed(name)]
    yield Finding(
        "ok",
        "extras",
        f"absent, needed by nothing but their options: {', '.join(absent) or 'none'}",
    )


def machine() -> Iterator[Finding]:
    """Cores, memory, shared memory, open files, disk and the variables that change what runs."""
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", "cores", f"{cores} for this process, torch uses {torch.get_num_threads()}")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks_here * torch.get_num_threads() > 2 * cores:
        advice = f"export OMP_NUM_THREADS={max(cores // ranks_here, 1)}"
        yield Finding("warning", "threads", f"{ranks_here} ranks on {cores} cores", advice)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", "memory", f"{total / GIB:.0f} GiB")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        small = free < GIB and ranks_here > 1
        advice = (
            "NCCL and data threads exchange through it: start the container with --shm-size=16g"
        )
        yield Finding(
            "warning" if small else "ok",
            "/dev/shm",
            f"{free / GIB:.1f} GiB free",
            advice if small else "",
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < 4096
    yield Finding(
        "warning" if few else "ok", "open files", str(files), "ulimit -n 65536" if few else ""
    )
    free = shutil.disk_usage(".").free
    advice = (
        "a training checkpoint has 16 bytes per trained parameter: 21 GB at 1.3B, 229 GB at 14B"
    )
    yield Finding(
        "warning" if free < 25 * GIB else "ok",
        "disk",
        f"{free / GIB:.0f} GiB free here",
        advice if free < 25 * GIB else "",
    )
    wanted = ("NCCL_", "TORCH", "CUDA_VISIBLE", "RCM_", "PYTORCH_", "OMP_")
    told = sorted(
        f"{k}={v}"
        for k, v in os.environ.items()
        if k.startswith(wanted) and not k.startswith("TORCHELASTIC")
    )
    yield Finding("ok", "environment", ", ".join(told) or "nothing that changes torch, NCCL or rcm")


def card(device: torch.device) -> Iterator[Finding]:
    """The GPU, what is free on it, and what of torch fits it."""
    if device.type != "cuda":
        built = torch.version.cuda
        if built is None:
            advice = "to use a GPU, install torch built for CUDA (docs/questions.md)"
        else:
            advice = (
                f"torch is built for CUDA {built}: nvidia-smi must work, and its driver be new"
                " enough"
            )
        yield Finding("warning", "gpu", "none: the toy recipe runs here, Wan does not", advice)
        return
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    told = (
        f"{properties.name}, compute capability {capability}, CUDA {torch.version.cuda}, cuDNN"
        f" {torch.backends.cudnn.version()}"
    )
    if (properties.major, properties.minor) == (9, 0):
        yield Finding("ok", "gpu", told)
    elif properties.major >= 8:
        yield Finding(
            "warning", "gpu", told, "measured on Hopper only; the portable kernels serve this card"
        )
    else:
        yield Finding("fault", "gpu", told, "bfloat16 needs compute capability 8.0 (A100) or newer")
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free > 0.1 * total
    advice = "another process holds the rest: nvidia-smi names it" if taken else ""
    yield Finding(
        "warning" if taken else "ok",
        "gpu memory",
        f"{free / GIB:.0f} of {total / GIB:.0f} GiB free",
        advice,
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "absent"
    yield Finding(
        "ok" if nccl != "absent" else "fault",
        "nccl",
        nccl,
        "" if nccl != "absent" else "install torch with NCCL",
    )


def kernels(device: torch.device) -> Iterator[Finding]:
    """A few cases of attention with tangent against float64, and which attention back ends can be
    chosen.
    """
    if device.type == "cuda":
        from rcm.kernels.flash_jvp.launch import triton_jvp
        from rcm.kernels.flash_jvp.selfcheck import cases, check, dense_rates

        wrong = []
        chosen = [
            case
            for case in cases()
            if case.name in ("dense", "tangent only from key 301") or "both, window 1" in case.name
        ]
        began = time.perf_counter()
        for case in chosen:
            report = check(case, dtype=torch.bfloat16, device=device, run=triton_jvp)
            wrong += [
                f"{case.name}: {name} {e:.1e} > {b:.1e}"
                for name, (e, b) in report.items()
                if not e <= b
            ]
        told = f"{len(chosen)} cases against float64 in {time.perf_counter() - began:.0f} s"
        advice = "set attention_backend=reference, and run rcm bench check"
        yield Finding(
            "fault" if wrong else "ok", "kernel", "; ".join([told, *wrong]), advice if wrong else ""
        )
        ours, library = dense_rates()
        slow = ours < 0.6 * library
        told = (
            f"attention with tangent {ours:.0f} TFLOP/s, the library's dense forward {library:.0f}"
        )
        yield Finding(
            "warning" if slow else "ok",
            "speed",
            told,
            "is another process on this card?" if slow else "",
        )
    usable, missing = [], []
    for name, build in BACKENDS.items():
        try:
            build()
            usable.append(name)
        except ConfigError as error:
            missing.append(f"{name} ({first_line(error).split(': ')[-1].split(';')[0]})")
    yield Finding(
        "ok", "attention", f"{', '.join(usable)}; not here: {', '.join(missing) or 'none'}"
    )


def links(device: torch.device) -> Iterator[Finding]:
    """Rates of the collectives of FSDP2 and Ulysses between the ranks, GB/s through each rank, and
    their latency.
    """
    world = dist.get_world_size()
    part = torch.ones(PAYLOAD // 4, device=device)
    whole = torch.empty(world * part.numel(), device=device)
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part), (world - 1) * PAYLOAD),
        "all-reduce": (lambda: dist.all_reduce(part), 2 * (world - 1) / world * PAYLOAD),
    }
    if device.type == "cuda":
        split = torch.empty_like(part)[: part.numel() // world * world]
        calls["all-to-all"] = (
            lambda: dist.all_to_all_single(split, part[: split.numel()]),
            (world - 1) / world * PAYLOAD,
        )
    one = torch.ones(1, device=device)
    latency = _seconds(lambda: dist.all_reduce(one), device)
    for name, (call, moved) in calls.items():
        rate = moved / _seconds(call, device) / 1e9
        slow = rate < SLOW_LINK[device.type]
        advice = (
            "see docs/questions.md, 'Which network between machines?'; NCCL_DEBUG=INFO tells the"
            " way that was taken"
        )
        yield Finding(
            "warning" if slow else "ok",
            name,
            f"{rate:.1f} GB/s per rank, {world} ranks",
            advice if slow else "",
        )
    yield Finding("ok", "latency", f"{1e6 * latency:.0f} us for a reduction of one number")


def agreement(told: dict[str, Any]) -> Iterator[Finding]:
    """Whether all ranks have the same software and kind of card, and no two of them the same
    card.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    hosts = {rank["host"] for rank in everyone}
    yield Finding("ok", "ranks", f"{len(everyone)} on {len(hosts)} machine{'s' * (len(hosts) > 1)}")
    for key in ("python", "torch", "triton", "rcm", "nccl", "gpu"):
        values = {str(rank[key]): number for number, rank in reversed(list(enumerate(everyone)))}
        if len(values) > 1:
            found = ", ".join(f"{value} on rank {number}" for value, number in values.items())
            yield Finding(
                "fault",
                key,
                f"ranks differ: {found}",
                "use one image or environment on all machines",
            )
    places = [(rank["host"], rank["card"]) for rank in everyone if rank["card"] is not None]
    if len(places) != len(set(places)):
        yield Finding(
            "fault",
            "gpus",
            "two ranks share a card",
            "start at most one rank per GPU (--nproc_per_node)",
        )


def _facts(device: torch.device) -> dict[str, Any]:
    on_card = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "card": device.index if on_card else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if _installed("triton") else None,
        "rcm": version("rcm") if _installed("rcm") else None,
        "nccl": str(torch.cuda.nccl.version()) if on_card else None,
        "gpu": torch.cuda.get_device_name(device) if on_card else None,
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    samples = []
    for _ in range(repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[1:])


def examine(device: torch.device, *, quick: bool = False) -> Iterator[tuple[str, Finding]]:
    """(section, finding) of this rank. Collective over the ranks of a launch."""
    sections: dict[str, Iterator[Finding]] = {
        "software": software(),
        "machine": machine(),
        "card": card(device),
    }
    if not quick:
        sections["kernels"] = kernels(device)
    if spread():
        sections |= {"ranks": agreement(_facts(device)), "links": links(device)}
    for name, findings in sections.items():
        for finding in findings if name in ("ranks", "links") else _to_its_end(name, findings):
            yield name, finding


def _to_its_end(section: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """`findings` of this rank alone; what breaks on the way is one itself, and the other sections
    go on.
    """
    try:
        yield from findings
    except Exception as error:
        told = f"broke off: {first_line(error)}"
        yield Finding(
            "fault",
            section,
            told,
            "put this right first; what follows in this section was not looked at",
        )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found; 1 if anything is a fault on any rank."""
    parser = Arguments(
        prog="rcm doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave the kernels out")
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="also write the findings of rank 0 here"
    )
    flags = parser.parse_args(argv)
    with launch_group() as device:
        first = not spread() or dist.get_rank() == 0
        found, section = [], ""
        for name, finding in examine(device, quick=flags.quick):
            found.append(finding)
            if first and name != section:
                section = name
                print(f"\n{name}", flush=True)
            if first or finding.state == "fault":
                where = "" if first else f"rank {dist.get_rank()}: "
                print(f"  {where}{finding.state:8} {finding.name:12} {finding.found}", flush=True)
                if finding.advice:
                    print(f"           -> {finding.advice}", flush=True)
        faults = torch.tensor([sum(finding.state == "fault" for finding in found)])
        if spread():
            dist.all_reduce(faults)
        if first:
            warnings = sum(finding.state == "warning" for finding in found)
            print(
                f"\n{int(faults)} faults, {warnings} warnings. rcm plan says what fits.", flush=True
            )
            if flags.json:
                write_atomically(
                    flags.json, json.dumps([asdict(finding) for finding in found], indent=1) + "\n"
                )
    return int(faults.item() > 0)
