"""What a checkpoint costs: how long a step stands still, how long the write goes on behind it, and
the way back.

    python -m scripts.bench_checkpoint --size 1.3B --blocks 8 --folder /scratch
    torchrun --nproc_per_node=4 -m scripts.bench_checkpoint --size 14B --folder /scratch
    python -m scripts.bench_checkpoint --size 1.3B --blocks 8 --of 14B --gpus 4

A student with random weights, its average and AdamW's moments (float32, sharded over the ranks) is
saved by the checkpointer of training, at once and in the background, and read into another one;
numbers are compared bit for bit. `--of` says what the measured bytes per second would mean for
another size: computed, not measured. Files are removed in the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.inference.outcome import command
from rcm.nets.wan.config import PRESETS, WanConfig, preset
from rcm.nets.wan.model import WanDiT
from rcm.parallel.agree import on_first, shared, together
from rcm.parallel.apply import parallelize
from rcm.parallel.fsdp import local, stored_parameters
from rcm.parallel.init import materialise, on_meta
from rcm.parallel.launch import is_first, this_launch
from rcm.parallel.mesh import ParallelDims, launch_group
from rcm.train.checkpoint import Checkpointer
from rcm.train.describe import Description
from rcm.train.ema import EMAConfig
from rcm.train.monitor import resident_bytes
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.snapshot import capture
from rcm.train.state import TrainState
from rcm.train.stragglers import OwnTime
from scripts.bench_measure import bench_flags, fill, in_words, machine, present_folder, write

GB = 1e9
DISK_BYTES = 2**30
COPIES = 4
"""Float32 numbers that a checkpoint holds per trained parameter with an average: weight, average,
two moments.
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the process with status 2 for a wrong one."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add("--size", choices=sorted(PRESETS), default="1.3B", help="network [%(default)s]")
    add("--blocks", type=int, help="only so many of its blocks, where memory ends")
    add("--folder", type=present_folder, help="file system to write to [the temporary one]")
    add("--repeats", type=int, default=2, help="saves of each kind [%(default)s]")
    add("--cold", action="store_true", help="drop the files from the page cache before reading")
    add("--of", choices=sorted(PRESETS), help="compute for this network too")
    add("--gpus", type=int, default=4, help="of --of [%(default)s]")
    parser.idle("gpus", without="of")
    return parser.parse_args(argv)


def parameters(config: WanConfig) -> int:
    """Number of a network's parameters."""
    return sum(p.numel() for p in on_meta(lambda: WanDiT(config)).parameters())


def trained(config: WanConfig, *, dims: ParallelDims, device: torch.device) -> TrainState:
    """A student that has been updated once, so that its moments exist."""
    net = on_meta(lambda: WanDiT(config))
    parallelize(net, dims=dims, precision=Precision.preset("fp32"))
    fill(materialise(net, device=device))
    state = TrainState.create(
        {"student": net},
        optim={"student": AdamWConfig(lr=1e-4)},
        schedule=LambdaLinear(warm_up_steps=0),
        ema=EMAConfig(),
    )
    for number, p in enumerate(stored_parameters(net).values()):
        p.grad = torch.full_like(p, 1e-3 * (number + 1))
    state.roles["student"].step()
    state.roles["student"].optimizer.zero_grad(set_to_none=True)
    state.iteration = 1
    return state


def shards_of(state: TrainState) -> dict[str, Tensor]:
    """All tensors that this rank holds of a checkpoint, by part and name."""
    parts = capture(state, positions=[None])
    return {f"{part}/{name}": local(t) for part, held in parts.items() for name, t in held.items()}


def checkpointer(job: Path, dims: ParallelDims, *, size: str, asynchronous: bool) -> Checkpointer:
    """As training has it."""
    told = Description(stage="bench", network={}, network_name=size, pattern=None, sigma_max=1.0)
    return Checkpointer(
        job, dims=dims, description=told, keep_last=1, asynchronous=asynchronous, own=OwnTime()
    )


def saved(keeper: Checkpointer, state: TrainState, *, size: int) -> dict[str, float]:
    """One save: seconds until the step may go on (and of the processor in them), those of this
    rank's own work, those until the checkpoint is whole; memory that the copy takes.
    """
    keeper.own.take()
    before, worked, begun = resident_bytes(), time.thread_time(), time.perf_counter()
    keeper.save(state)
    stall, worked = time.perf_counter() - begun, time.thread_time() - worked
    copied = resident_bytes() - before
    own = keeper.own.take()["checkpoint"]
    keeper.wait()
    whole = time.perf_counter() - begun
    return {
        "stall_s": stall,
        "stall_cpu_s": worked,
        "own_s": own,
        "whole_s": whole,
        "gb_per_s_stall": size / stall / GB,
        "gb_per_s_whole": size / whole / GB,
        "copy_gb": copied / GB,
    }


def loaded(job: Path, fresh: TrainState, dims: ParallelDims, *, cold: bool) -> float:
    """Seconds to read the newest checkpoint into `fresh`."""
    keeper = checkpointer(job, dims, size="", asynchronous=False)
    if cold and dims.rank == 0:
        for path in job.rglob("*.distcp"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    keeper.load(fresh)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def disk(job: Path) -> float:
    """GB per second of one process that writes so many random bytes and has them flushed."""
    block = torch.randint(256, (DISK_BYTES // 16,), dtype=torch.uint8).numpy().tobytes()
    begun = time.perf_counter()
    with open(job / "alone", "wb") as file:
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    spent = time.perf_counter() - begun
    (job / "alone").unlink()
    return 16 * len(block) / spent / GB


def measured(
    options: argparse.Namespace, config: WanConfig, job: Path, device: torch.device
) -> dict[str, Any]:
    """All rows of this rank."""
    world = this_launch().world_size
    dims = ParallelDims(dp_shard=world, device_type=device.type)
    state = trained(config, dims=dims, device=device)
    held = shards_of(state)
    size = sum(t.numel() * t.element_size() for t in held.values())
    found: dict[str, Any] = {
        "ranks": world,
        "parameters": parameters(config),
        "gb_per_rank": size / GB,
        "disk_gb_per_s": on_first(lambda: disk(job)),
    }
    for name, asynchronous in (("at once", False), ("in the background", True)):
        keeper = checkpointer(job, dims, size=options.size, asynchronous=asynchronous)
        for number in range(options.repeats):
            row = saved(keeper, state, size=size)
            found[f"saved {name}, {number + 1}"] = row
            if dims.rank == 0:
                print(f"saved {name:18} {in_words(row)}", flush=True)
    truth = {name: tensor.clone() for name, tensor in held.items()}
    for tensor in held.values():
        if tensor.is_floating_point():
            tensor.zero_()
    found["load_s"] = loaded(job, state, dims, cold=options.cold)
    found["gb_per_s_load"] = size / found["load_s"] / GB
    after = shards_of(state)
    wrong = [name for name in truth if not torch.equal(truth[name], after[name])]
    together(lambda: _require_same(wrong))
    return found


def _require_same(wrong: list[str]) -> None:
    if wrong:
        raise ConfigError(f"{len(wrong)} tensors came back otherwise, the first is {wrong[0]}")


def computed(found: dict[str, Any], name: str, *, gpus: int, repeats: int) -> dict[str, float]:
    """Seconds for another network at the bytes per second of the last saves."""
    size = COPIES * 4 * parameters(preset(name)) / gpus
    at_once = found[f"saved at once, {repeats}"]
    behind = found[f"saved in the background, {repeats}"]
    return {
        "gb_per_rank": size / GB,
        "stall_at_once_s": size / GB / at_once["gb_per_s_stall"],
        "stall_in_the_background_s": size / GB / behind["gb_per_s_stall"],
        "whole_in_the_background_s": size / GB / behind["gb_per_s_whole"],
        "load_s": size / GB / found["gb_per_s_load"],
    }


def room(folder: Path, config: WanConfig) -> None:
    """ConfigError where the disk has no room for two checkpoints."""
    needed, free = 2 * COPIES * 4 * parameters(config), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {free / GB:.0f} GB free, two checkpoints take {needed / GB:.0f} GB;"
            " choose another --folder, or fewer --blocks"
        )


def chosen(options: argparse.Namespace) -> WanConfig:
    """The network that the flags ask for."""
    config = preset(options.size)
    if options.blocks is None:
        return config
    if not 1 <= options.blocks <= config.num_layers:
        raise ConfigError(
            f"--blocks {options.blocks} must be in 1 to the {config.num_layers} of {options.size}"
        )
    return replace(config, num_layers=options.blocks)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure on all ranks; rank 0 prints and writes."""
    options = arguments(argv)
    config = chosen(options)
    with launch_group() as device:
        folder = Path(options.folder or tempfile.gettempdir())
        on_first(lambda: room(folder, config))
        job = shared(on_first(lambda: tempfile.mkdtemp(dir=folder, prefix="bench_checkpoint_")))
        here = machine(device)
        try:
            found = measured(options, config, Path(job), device)
        finally:
            shutil.rmtree(job, ignore_errors=True)
        if is_first():
            tell(options, here, found)


def tell(options: argparse.Namespace, here: dict[str, Any], found: dict[str, Any]) -> None:
    """What was measured, and apart from it what follows for `--of`."""
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    print(f"{in_words(here)}\nmeasured: {in_words(plain)}")
    result = {"machine": here, "options": vars(options), "measured": found}
    if options.of:
        other = computed(found, options.of, gpus=options.gpus, repeats=options.repeats)
        result["computed"] = other
        print(f"computed, not measured, for {options.of} on {options.gpus}: {in_words(other)}")
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    raise SystemExit(main())
