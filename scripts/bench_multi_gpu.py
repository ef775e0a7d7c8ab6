"""Several GPUs against one: the TF-sCM passes of a real-width network, values and peak memory.

    torchrun --nproc_per_node=1 -m scripts.bench_multi_gpu --truth truth.pt
    torchrun --nproc_per_node=4 -m scripts.bench_multi_gpu --truth truth.pt --json result.json

One rank writes the truth file; more ranks run FSDP2, Ulysses, and, from four ranks on, both and
HSDP, with recomputation of blocks, and compare outputs, tangents and parameter gradients with it;
exit status 0 says that all are within `LIMITS`. Two samples make a batch whatever the number of
ranks. Random weights, the same for every world size.
"""

from __future__ import annotations

import os
import shlex

# multicast over NVLink is not to be had on shared machines
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import io
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.core.rng import StepRng, randn
from rcm.diffusion.blocks import BlockPattern
from rcm.inference.outcome import command
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.fsdp import local, stored_tensors
from rcm.parallel.init import materialise, on_meta
from rcm.parallel.mesh import ParallelDims, process_group
from rcm.storage.pickle_file import read_pickle
from scripts.bench_measure import bench_flags, in_words, machine, require_card, write

SAMPLES, HEAD = 2, 128
# of every gradient, evenly spread: a wrong shard, factor or order cannot hide from them
KEPT_ENTRIES = 65536
LIMITS = {"fp32": 1e-5, "bf16": 1e-2}
"""Largest allowed relative L2 difference of outputs, tangents and all gradients together: reordered
sums in float32; two bfloat16 runs with other kernels and orders.
"""


@dataclass(frozen=True)
class Size:
    """What is run: precision preset, latent frames, latent height and width, blocks."""

    precision: str
    frames: int
    height: int = 60
    width: int = 104
    layers: int = 30


SIZES = (Size("fp32", 6, 16, 32, layers=10), Size("bf16", 21))


@command
def main(arguments: list[str] | None = None) -> int:
    """Run all sizes and combinations; exit status 1 when a comparison exceeds its limit."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add(
        "--truth",
        type=Path,
        required=True,
        help="file of one rank's results: written by one rank, read by several",
    )
    add("--layers", type=int, help="blocks, other than 10 in float32 and 30 in bfloat16")
    add("--dim", type=int, default=1536, help=f"width, a multiple of {HEAD}")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--small", action="store_true", help="tiny latents, for trying the script")
    options = parser.parse_args(arguments)
    if options.dim % HEAD:
        raise ConfigError(f"--dim {options.dim} must be a multiple of {HEAD}, the size of a head")
    if options.device == "cuda":
        require_card("bench_multi_gpu", instead="--device cpu --small tries the script")
    text = {"text_len": 16, "text_dim": 64} if options.small else {}
    shape = {
        "dim": options.dim,
        "ffn_dim": options.dim * 35 // 6,
        "num_heads": options.dim // HEAD,
        **text,
    }
    sizes = (Size("fp32", 6, 4, 8), Size("bf16", 6, 4, 8)) if options.small else SIZES
    rows: list[dict[str, Any]] = []
    with process_group(options.device):
        world = dist.get_world_size()
        layouts = combinations(world, heads=shape["num_heads"])
        written = OutputFile.claim(options.truth, knob="--truth") if world == 1 else None
        truth = {} if written else read_truth(options.truth)
        for size in sizes:
            for name, mesh in layouts.items():
                config = WanConfig(num_layers=options.layers or size.layers, **shape)
                found, row = run(config, size, ParallelDims(*mesh, options.device))
                row = {"size": f"{size.precision} {size.frames} frames", "ranks": name, **row}
                if written:
                    truth[size.precision] = found
                else:
                    require_alike(found, truth.get(size.precision, {}), options.truth)
                    row |= compare(found, truth[size.precision], options.device)
                    row["ok"] = (
                        max(row[key] for key in ("v", "v_dot", "grad")) <= LIMITS[size.precision]
                    )
                rows.append(row)
                if dist.get_rank() == 0:
                    print(in_words(row), flush=True)
        if written:
            torch.save(truth, whole := io.BytesIO())
            written.write(whole.getvalue())
        if dist.get_rank() == 0 and options.json:
            write(options.json, {"machine": machine(options.device), "rows": rows})
    return 0 if all(row.get("ok", True) for row in rows) else 1


def read_truth(path: Path) -> dict[str, dict[str, Tensor]]:
    """What one rank wrote, by precision and name."""
    if not path.is_file():
        raise ConfigError(
            f"--truth {path} is not there; write it first, on one rank with the same flags:"
            f" torchrun --nproc_per_node=1 -m rcm bench multi-gpu --truth"
            f" {shlex.quote(str(path))}"
        )
    truth: dict[str, dict[str, Tensor]] = {}
    for key, value in read_pickle(path).tensors.items():
        precision, _, name = key.partition(".")
        truth.setdefault(precision, {})[name] = value
    return truth


def require_alike(found: dict[str, Tensor], truth: dict[str, Tensor], path: Path) -> None:
    """`ConfigError` for results of another network, or of other latents."""
    gradients = [{name for name in held if name.startswith("grad.")} for held in (found, truth)]
    alike = (name in truth and truth[name].shape == x.shape for name, x in found.items())
    if gradients[0] != gradients[1] or not all(alike):
        raise ConfigError(
            f"--truth {path} is of another network; write it anew on one rank, with the same"
            " --layers, --dim and --small"
        )


def combinations(world: int, *, heads: int) -> dict[str, tuple[int, int, int]]:
    """Name -> copies of the parameters, data ranks that share one, ranks that share a sample.
    `ConfigError` where some data ranks would take one of `SAMPLES` more often than the other, and
    for heads that the ranks of a sample cannot share.
    """
    if heads % world:
        raise ConfigError(
            f"--dim {heads * HEAD} has {heads} head(s), which {world} ranks cannot share evenly"
            f" under Ulysses; choose a multiple of {world * HEAD}"
        )
    if world > 2 and world % 4:
        raise ConfigError(
            f"{world} ranks cannot share {SAMPLES} samples evenly in every layout; start 1, 2, or a"
            " multiple of 4"
        )
    if world == 1:
        return {"one": (1, 1, 1)}
    found = {f"FSDP2 over {world}": (1, world, 1), f"Ulysses over {world}": (1, 1, world)}
    if world >= 4:
        found |= {
            f"FSDP2 over {world // 2} x Ulysses 2": (1, world // 2, 2),
            f"HSDP 2 x {world // 2}": (2, world // 2, 1),
        }
    return found


def run(
    config: WanConfig, size: Size, dims: ParallelDims
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Outputs, tangents and sampled gradients of this rank's samples; seconds of both passes, the
    compilation of kernels included, and peak GiB (worst rank).
    """
    precision = Precision.preset(size.precision)
    net = parallelize(
        on_meta(lambda: WanDiT(config)), dims=dims, precision=precision, checkpoint="block_wise"
    )
    materialise(net, device=dims.device_type)
    fill(net)
    denoiser, forcing = Denoiser(net, precision), TeacherForcing(BlockPattern(3, 3))
    samples = [s for s in range(SAMPLES) if s % dims.num_data_ranks == dims.data_rank % SAMPLES]
    found: dict[str, Tensor] = {}
    measured: dict[str, float] = {}
    tangents = Meter(dims.device_type)
    for s in samples:
        x0, x_t, x_dot, t, cond = inputs(config, size, s, dims.device_type)
        clean = forcing.clean(x0)
        _, v_dot = forcing.tangent(
            denoiser, x_t, t, cond, context=clean, x_dot=x_dot, t_dot=torch.ones_like(t)
        )
        found[f"v_dot.{s}"] = v_dot.cpu()
    measured |= tangents.read("tangent", per=len(samples))
    gradients = Meter(dims.device_type)
    net.zero_grad(set_to_none=True)
    for s in samples:
        x0, x_t, target, t, cond = inputs(config, size, s, dims.device_type)
        v = forcing.velocity(denoiser, x_t, t, cond, context=forcing.clean(x0))
        found[f"v.{s}"] = v.detach().cpu()
        ((v - target).square().mean() / len(samples)).backward()
    measured |= gradients.read("gradient", per=len(samples))
    for name, parameter in net.named_parameters():
        full = (
            parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        )
        flat = full.flatten()
        found[f"grad.{name}"] = flat[:: max(1, flat.numel() // KEPT_ENTRIES)].float().cpu()
    return found, worst_over_ranks(measured, dims.device_type)


def inputs(
    config: WanConfig, size: Size, sample: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
    """Clean and noisy latents, a third tensor (direction or target), time and text of one sample;
    float32 on the CPU, then moved.
    """
    rng = StepRng(3, sample, 0)
    shape = (1, 16, size.frames, size.height, size.width)
    x0, x_t, other = (
        randn(shape, generator=rng.generator(name)).to(device) for name in ("x0", "x_t", "other")
    )
    text = randn((1, config.text_len, config.text_dim), generator=rng.generator("text")).to(device)
    return (
        x0,
        x_t,
        other,
        torch.full((1, 1), 0.7 - 0.2 * sample, dtype=torch.float64, device=device),
        Condition(text),
    )


@torch.no_grad()
def fill(net: nn.Module) -> None:
    """Weights from the name of each tensor alone, drawn whole on this rank's device, of which it
    keeps its shard.
    """
    for name, target in stored_tensors(net).items():
        shard = local(target)
        generator = torch.Generator(shard.device).manual_seed(zlib.crc32(name.encode()))
        draws = torch.randn(target.shape, generator=generator, device=shard.device)
        if name.endswith("modulation") or target.ndim >= 2:
            draws = draws * target.shape[-1] ** -0.5
        else:
            draws = 0.02 * draws + float(name.endswith("weight"))
        if isinstance(target, DTensor):
            draws = distribute_tensor(
                draws, target.device_mesh, target.placements, src_data_rank=None
            ).to_local()
        shard.copy_(draws)


class Meter:
    """Seconds and peak memory from its making to `read`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.begin = time.perf_counter()

    def read(self, name: str, *, per: int) -> dict[str, float]:
        """`name`_s, seconds per sample, and `name`_gib."""
        if self.cuda:
            torch.cuda.synchronize()
        found = {f"{name}_s": (time.perf_counter() - self.begin) / per}
        return found | (
            {f"{name}_gib": torch.cuda.max_memory_allocated() / 2**30} if self.cuda else {}
        )


def compare(
    found: dict[str, Tensor], truth: dict[str, Tensor], device: str = "cpu"
) -> dict[str, Any]:
    """Relative L2 differences, worst over ranks: of outputs and tangents (worst sample), of all
    gradients together, of the worst tensor.

    The worst tensor is one whose gradient nearly cancels (a key's bias or norm), so in bfloat16 it
    says little; its name is given.
    """
    numbers, squares, name = (
        {"v": 0.0, "v_dot": 0.0, "grad": 0.0, "worst_grad": 0.0},
        [0.0, 0.0],
        "",
    )
    for key, value in found.items():
        expected = truth[key].double()
        off, size = (value.double() - expected).norm().item(), expected.norm().item()
        difference = off / size if off == off else float("inf")
        kind = key.split(".")[0]
        if kind == "grad":
            squares = [squares[0] + off * off, squares[1] + size * size]
            if difference > numbers["worst_grad"]:
                numbers["worst_grad"], name = difference, key.removeprefix("grad.")
        else:
            numbers[kind] = max(numbers[kind], difference)
    numbers["grad"] = (squares[0] / squares[1]) ** 0.5
    return {**worst_over_ranks(numbers, device), "worst_grad_of": name}


def worst_over_ranks(numbers: dict[str, float], device: str) -> dict[str, float]:
    """The largest value of every rank, by name."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(numbers, values.tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
