"""What the equivalence tests measure on a network, sharded or not: losses, gradients of parameters
and inputs, tangents, a streamed chunk.

`measure` runs on any rank; every data rank takes its part of one global batch, so results can be
compared with one rank that takes all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcm.core.dtypes import Precision
from rcm.core.dual import guard_tangents, jvp
from rcm.core.rng import StepRng, randn
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.condition import Condition
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from rcm.parallel.apply import parallelize
from rcm.parallel.mesh import ParallelDims
from tests.support.toy_method import CHANNELS, CONFIG, HEIGHT, WIDTH, make_net

BATCH, T = 4, 4
PATTERN = BlockPattern(1, 3)
GRID = CONFIG.token_grid(HEIGHT, WIDTH)
TF = TokenLayout.teacher_forcing(T, grid=GRID, pattern=PATTERN)


def inputs(name: str, frames: int) -> Tensor:
    """Global batch of latents, float64."""
    return randn((BATCH, CHANNELS, frames, HEIGHT, WIDTH), generator=StepRng(7, 0, 0).generator(name), dtype=torch.float64)


def mine(x: Tensor, dims: ParallelDims) -> Tensor:
    """This data rank's part of a global batch."""
    return x.chunk(dims.num_data_ranks)[dims.data_rank]


def everyone(x: Tensor, dims: ParallelDims) -> Tensor:
    """The global batch from every data rank's part (each present cp times)."""
    if dims.world_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dims.world_size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts[:: dims.cp])


def full(x: Tensor) -> Tensor:
    """The whole tensor of a shard."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def build(dims: ParallelDims, *, checkpoint: str = "block_wise") -> nn.Module:
    """A float64 network, parallelised."""
    return parallelize(make_net(seed=3, dtype=torch.float64), dims=dims, precision=Precision.preset("fp64"), checkpoint=checkpoint)


def measure(dims: ParallelDims, net: nn.Module) -> dict[str, Any]:
    """Packed teacher forcing: tangent, loss, gradients; then one chunk streamed over a cache, value
    and tangent; then the tangent again.
    """
    x, x_dot, target = (mine(inputs(name, 2 * T), dims) for name in ("x", "x_dot", "target"))
    times = torch.linspace(50, 950, BATCH * 2 * T, dtype=torch.float64).view(BATCH, -1)
    times, times_dot = mine(times, dims), mine(times.flip(1), dims)
    text = mine(randn((BATCH, 5, CONFIG.text_dim), generator=StepRng(7, 0, 0).generator("text"), dtype=torch.float64), dims)
    cond = Condition(text)
    found: dict[str, Any] = {"keys": sorted(net.state_dict())}

    def tangent() -> tuple[Tensor, Tensor]:
        with guard_tangents(net):
            return jvp(lambda a, t: net(a, t, cond, TF), (x, times), (x_dot, times_dot))

    value, dot = tangent()
    found["value"], found["tangent"] = everyone(value, dims), everyone(dot, dims)

    x_in = x.clone().requires_grad_()
    loss = (net(x_in, times, cond, TF) - target[:, :, T:]).square().mean()
    loss.backward()
    found["loss"] = everyone(loss.detach().view(1), dims).mean()
    found["grads"] = {name: full(p.grad) for name, p in net.named_parameters()}
    found["input_grad"] = everyone(x_in.grad, dims) / dims.num_data_ranks
    net.zero_grad()

    cache = KVCache(CONFIG.num_layers, capacity_tokens=T * GRID[0] * GRID[1])
    first, second = (TokenLayout.cached_chunk(i, grid=GRID, pattern=PATTERN, num_frames=T) for i in (0, 1))
    with torch.no_grad():
        net(x[:, :, :1], times[:, :1], cond, first, cache.append())
    chunk = [a[:, :, 1:T] for a in (x, x_dot)]
    _, streamed_dot = jvp(lambda a: net(a, times[:, 1:T], cond, second, cache.readonly()), (chunk[0],), (chunk[1],))
    streamed = net(chunk[0], times[:, 1:T], cond, second, cache.readonly())
    streamed.square().mean().backward()
    found["streamed"], found["streamed_dot"] = everyone(streamed.detach(), dims), everyone(streamed_dot, dims)
    found["streamed_grads"] = {name: full(p.grad) for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    found["tangent_again"] = everyone(tangent()[1], dims)
    return found


def worst(found: Any, truth: Any) -> float:
    """Largest relative difference (infinity norm over infinity norm) between two results, over all
    tensors of matching structure.
    """
    if isinstance(truth, dict):
        assert sorted(found) == sorted(truth)
        return max(worst(found[key], truth[key]) for key in truth)
    if isinstance(truth, Tensor):
        assert found.shape == truth.shape
        return ((found - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()
    assert found == truth
    return 0.0
