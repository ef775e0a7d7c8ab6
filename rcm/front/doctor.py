"""Check this machine, or every rank of a launch: what it has, whether the kernels are correct, and
how fast the ranks communicate. Each line is ok, a warning, or a fault with what to do.

    rcm doctor
    rcm doctor --quick --compile 480x832    # so that the first stream of that size starts at once
    torchrun --nproc_per_node=8 -m rcm doctor
"""

from __future__ import annotations

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
from rcm.front.ahead import compiled, frame_size
from rcm.inference.outcome import command, writable_file
from rcm.nets.attention import BACKENDS, resolve
from rcm.nets.attention_packages import NotInstalled, Package
from rcm.parallel.agree import spread
from rcm.parallel.launch import launch_number
from rcm.parallel.mesh import launch_group

GIB = 1 << 30
TESTED = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.7")}
"""Versions that the tests and the measurements of docs/performance_log.md ran with."""
PACKAGES: tuple[str, ...] = ("torch", "triton", "hydra-core", "webdataset")
PACKAGES += ("safetensors", "imageio", "wandb", "loguru")
EXTRAS = {
    "transformers": "text",
    "flash-attn": "flash",
    "transformer-engine": "te",
    "megatron-core": "te",
    "uvicorn": "serve",
}
"""Packages of optional extras: absent is not a fault."""
_VARIABLES: tuple[str, ...] = ("NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_")
_VARIABLES += ("NVIDIA_TF32", "TRITON_", "OMP_", "RCM_", "IMAGINAIRE_")
"""How names of the variables begin that are told; secrets among them without their values."""
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


def _ok(name: str, found: str) -> Finding:
    return Finding("ok", name, found)


def _judged(name: str, found: str, *, bad: bool, advice: str, state: State = "warning") -> Finding:
    """`state` with its advice where `bad`, else ok without."""
    return Finding(state, name, found, advice) if bad else _ok(name, found)


def software() -> Iterator[Finding]:
    """Python and the packages, with the versions that are known to work together."""
    yield _ok("python", platform.python_version())
    for name in PACKAGES:
        here, known = _version(name), TESTED.get(name, ())
        if here is None:
            needs_card = name == "triton" and not torch.cuda.is_available()
            state: State = "warning" if needs_card or name == "wandb" else "fault"
            yield Finding(state, name, "not installed", f"pip install {name}")
            continue
        foreign = bool(known) and not any(here.startswith(f"{good}.") for good in known)
        advice = f"tested with {' and '.join(known)}; others may work"
        yield _judged(name, here, bad=foreign, advice=advice)
    absent = [f"{name} (rcm[{extra}])" for name, extra in EXTRAS.items() if _version(name) is None]
    yield _ok(
        "extras", f"absent, needed by nothing but their options: {', '.join(absent) or 'none'}"
    )


def machine() -> Iterator[Finding]:
    """Cores, memory, shared memory, open files, disk and the variables that change what runs."""
    cores = len(os.sched_getaffinity(0))
    yield _ok("cores", f"{cores} for this process, torch uses {torch.get_num_threads()}")
    ranks_here = launch_number("LOCAL_WORLD_SIZE", 1)
    if ranks_here * torch.get_num_threads() > 2 * cores:
        advice = f"export OMP_NUM_THREADS={max(cores // ranks_here, 1)}"
        yield Finding("warning", "threads", f"{ranks_here} ranks on {cores} cores", advice)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _ok("memory", f"{total / GIB:.0f} GiB")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        advice = (
            "NCCL and data threads exchange through it: start the container with --shm-size=16g"
        )
        small = free < GIB and ranks_here > 1
        yield _judged("/dev/shm", f"{free / GIB:.1f} GiB free", bad=small, advice=advice)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _judged("open files", str(files), bad=0 <= files < 4096, advice="ulimit -n 65536")
    free = shutil.disk_usage(".").free
    advice = (
        "a training checkpoint has 16 bytes per trained parameter: 21 GB at 1.3B, 229 GB at 14B"
    )
    yield _judged("disk", f"{free / GIB:.0f} GiB free here", bad=free < 25 * GIB, advice=advice)
    told = sorted(
        f"{k}={'(set)' if k.endswith(('TOKEN', 'KEY')) else v}"
        for k, v in os.environ.items()
        if k.startswith(_VARIABLES) and not k.startswith("TORCHELASTIC")
    )
    yield _ok("environment", ", ".join(told) or "nothing that changes torch, NCCL or rcm")


def card(device: torch.device) -> Iterator[Finding]:
    """The GPU, what is free on it, and what of torch fits it."""
    if device.type != "cuda":
        built = torch.version.cuda
        advice = (
            "to use a GPU, install torch built for CUDA (docs/questions.md)"
            if built is None
            else f"torch is built for CUDA {built}: nvidia-smi must work, its driver be new enough"
        )
        yield Finding("warning", "gpu", "none: the toy recipe runs here, Wan does not", advice)
        return
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    told = (
        f"{properties.name}, compute capability {'.'.join(map(str, capability))},"
        f" CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )
    if capability < (8, 0):
        yield Finding("fault", "gpu", told, "bfloat16 needs compute capability 8.0 (A100) or newer")
    else:
        advice = "measured on Hopper only; the portable kernels serve this card"
        yield _judged("gpu", told, bad=capability != (9, 0), advice=advice)
    free, total = torch.cuda.mem_get_info(device)
    told = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
    advice = "another process holds the rest: nvidia-smi names it"
    yield _judged("gpu memory", told, bad=total - free > 0.1 * total, advice=advice)
    there = dist.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if there else "absent"
    yield _judged("nccl", nccl, bad=not there, advice="install torch with NCCL", state="fault")


def kernels(device: torch.device) -> Iterator[Finding]:
    """A few cases of attention with tangent against float64, and which attention back ends can be
    chosen.
    """
    if device.type == "cuda":
        yield from _kernels_on_card(device)
    usable, missing = [], []
    for name, build in BACKENDS.items():
        try:
            backend = resolve(name) if name == "auto" else build()
            if isinstance(backend, Package) and device.type == "cuda":
                _try_first_call(backend, device)
            usable.append(name)
        except ConfigError as error:
            if name == "auto":  # the environment's choice: nothing starts without naming another
                yield Finding(
                    "fault", name, str(error), "unset it, or name a back end that is here"
                )
            elif isinstance(error, NotInstalled):
                missing.append(f"{name} ({first_line(error).split(': ')[-1].split(';')[0]})")
            else:
                yield Finding("warning", name, str(error), "auto goes on without it")
    yield _ok("attention", f"{', '.join(usable)}; not here: {', '.join(missing) or 'none'}")


def _try_first_call(backend: Package, device: torch.device) -> None:
    """`ConfigError` where a package of attention loads and cannot be called, with gradient."""
    x = torch.zeros(1, 1, 12, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
    if (problem := backend.problem(x, x, x)) is not None:
        raise ConfigError(problem)


def _kernels_on_card(device: torch.device) -> Iterator[Finding]:
    from rcm.kernels.flash_jvp.launch import triton_jvp
    from rcm.kernels.flash_jvp.selfcheck import cases, check, dense_rates

    names = ("dense", "tangent only from key 301")
    chosen = [case for case in cases() if case.name in names or "both, window 1" in case.name]
    began, wrong = time.perf_counter(), []
    for case in chosen:
        report = check(case, dtype=torch.bfloat16, device=device, run=triton_jvp)
        off = {name: (e, b) for name, (e, b) in report.items() if not e <= b}
        wrong += [f"{case.name}: {name} {e:.1e} > {b:.1e}" for name, (e, b) in off.items()]
    told = f"{len(chosen)} cases against float64 in {time.perf_counter() - began:.0f} s"
    advice = "set attention_backend=reference, and run rcm bench check"
    found = "; ".join([told, *wrong])
    yield _judged("kernel", found, bad=bool(wrong), advice=advice, state="fault")
    ours, library = dense_rates()
    told = f"attention with tangent {ours:.0f} TFLOP/s, the library's dense forward {library:.0f}"
    advice = "is another process on this card?"
    yield _judged("speed", told, bad=ours < 0.6 * library, advice=advice)


def links(device: torch.device) -> Iterator[Finding]:
    """Rates of the collectives of FSDP2 and Ulysses between the ranks, GB/s through each rank, and
    their latency.
    """
    world = dist.get_world_size()
    part = torch.ones(PAYLOAD // 4, device=device)
    whole = torch.empty(world * part.numel(), device=device)
    # the latter warns of the former's name from torch 2.13 on
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all-gather": (lambda: gather(whole, part), (world - 1) * PAYLOAD),
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
    advice = (
        "see docs/questions.md, 'Which network between machines?'; NCCL_DEBUG=INFO tells the way"
        " that was taken"
    )
    for name, (call, moved) in calls.items():
        rate = moved / _seconds(call, device) / 1e9
        told = f"{rate:.1f} GB/s per rank, {world} ranks"
        yield _judged(name, told, bad=rate < SLOW_LINK[device.type], advice=advice)
    yield _ok("latency", f"{1e6 * latency:.0f} us for a reduction of one number")


def agreement(told: dict[str, Any]) -> Iterator[Finding]:
    """Whether all ranks have the same software and kind of card, and no two of them the same
    card.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    hosts = {rank["host"] for rank in everyone}
    yield _ok("ranks", f"{len(everyone)} on {len(hosts)} machine{'s' * (len(hosts) > 1)}")
    for key in ("python", "torch", "triton", "rcm", "nccl", "gpu"):
        values = {str(rank[key]): number for number, rank in reversed(list(enumerate(everyone)))}
        if len(values) > 1:
            found = ", ".join(f"{value} on rank {number}" for value, number in values.items())
            advice = "use one image or environment on all machines"
            yield Finding("fault", key, f"ranks differ: {found}", advice)
    places = [(rank["host"], rank["card"]) for rank in everyone if rank["card"] is not None]
    if len(places) != len(set(places)):
        advice = "start at most one rank per GPU (--nproc_per_node)"
        yield Finding("fault", "gpus", "two ranks share a card", advice)


def _facts(device: torch.device) -> dict[str, Any]:
    on_card = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "card": device.index if on_card else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "rcm": _version("rcm"),
        "nccl": str(torch.cuda.nccl.version()) if on_card else None,
        "gpu": torch.cuda.get_device_name(device) if on_card else None,
    }


def _version(name: str) -> str | None:
    """Of an installed package; None for one that is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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


def compilation(device: torch.device, size: tuple[int, int]) -> Iterator[Finding]:
    """The kernels of streams of `size` pixels, compiled into Triton's cache on disk."""
    if device.type != "cuda":
        told = "no CUDA device: nothing was compiled"
        yield Finding("warning", "compile", told, "run it where streams will run")
        return
    for name, done in compiled(device, size):
        yield Finding("ok", name, f"{done.kernels} kernels ready in {done.seconds:.1f} s")


def examine(
    device: torch.device, *, quick: bool = False, compile_size: tuple[int, int] | None = None
) -> Iterator[tuple[str, Finding]]:
    """(section, finding) of this rank. Collective over the ranks of a launch."""
    sections: dict[str, Iterator[Finding]] = {
        "software": software(),
        "machine": machine(),
        "card": card(device),
    }
    if not quick:
        sections["kernels"] = kernels(device)
    if compile_size is not None:
        sections["compiled"] = compilation(device, compile_size)
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
        advice = "put this right first; what follows in this section was not looked at"
        yield Finding("fault", section, f"broke off: {first_line(error)}", advice)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found; 1 if anything is a fault on any rank."""
    parser = Arguments(prog="rcm doctor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave the kernels out")
    parser.add_argument(
        "--compile",
        type=frame_size,
        metavar="HxW",
        help="also compile, ahead of time, the kernels of streams of such frames",
    )
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="also write the findings of rank 0 here"
    )
    flags = parser.parse_args(argv)
    with launch_group() as device:
        first = not spread() or dist.get_rank() == 0
        found, section = [], ""
        for name, finding in examine(device, quick=flags.quick, compile_size=flags.compile):
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
                flags.json.write(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return int(faults.item() > 0)
