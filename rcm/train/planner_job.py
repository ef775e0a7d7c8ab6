"""What a planner needs to know of a training job: its networks, and per phase the passes through them. No bytes, no seconds.

The vocabulary is that of the methods (`rcm.methods`): a student phase of TF-sCM is a guided teacher pass, a context pass, a tangent pass
and a pass with gradient. `rcm.configs.plan_job` writes a config down in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import torch

from rcm.core.errors import ConfigError
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT
from rcm.parallel.checkpointing import MODES

Recompute = Literal["none", "mm_only", "block_wise_keep_attention", "block_wise"]
PassMode = Literal["infer", "tangent", "train"]


@cache
def parameter_shapes(config: WanConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of every parameter, read off the network on the meta device."""
    with torch.device("meta"):
        return tuple((name, tuple(p.shape)) for name, p in WanDiT(config, attention="reference").named_parameters())


@cache
def _elements(config: WanConfig, shard: int, part: str) -> int:
    total = 0
    for name, shape in parameter_shapes(config):
        if part == "all" or name.startswith("blocks.") == (part == "blocks"):
            total += -(-shape[0] // shard) * math.prod(shape[1:])
    return total


@dataclass(frozen=True)
class NetPlan:
    """One network of a job. `trained`: it has master weights, an optimiser and gradients; `averaged`: it has an EMA; `recompute`: its
    activation checkpointing (`net.sac_config.mode`) and `recompute_every` (`every_n_blocks`), without meaning for a frozen one.
    """

    role: str
    config: WanConfig
    trained: bool
    averaged: bool = False
    recompute: Recompute = "none"
    recompute_every: int = 1

    def __post_init__(self) -> None:
        if self.recompute not in MODES:
            raise ConfigError(f"{self.role}: recompute={self.recompute!r} is not one of {', '.join(MODES)}")

    def elements(self, *, shard: int = 1, part: Literal["all", "blocks", "root"] = "all") -> int:
        """Parameters that rank 0 of a group of `shard` ranks stores. FSDP2 cuts every tensor along its first axis, so a [1, 6, E] tensor
        stays whole on rank 0.
        """
        return _elements(self.config, shard, part)

    def is_recomputed(self, block: int) -> bool:
        """Whether this block runs again in the backward pass."""
        return self.recompute != "none" and block % self.recompute_every == 0

    @property
    def recomputed_blocks(self) -> int:
        """How many blocks run again in the backward pass: 0, `recompute_every`, 2 `recompute_every`, ..."""
        return sum(map(self.is_recomputed, range(self.config.num_layers)))

    @property
    def block_elements(self) -> int:
        """Parameters of one block."""
        return self.elements(part="blocks") // self.config.num_layers


@dataclass(frozen=True)
class Held:
    """What `role` keeps in memory during a pass: all that the pass `of` stored for its backward pass, or a cache of the keys and values of
    `frames` frames.
    """

    role: str
    frames: int = 0
    of: Pass | None = None


@dataclass(frozen=True)
class Pass:
    """Forwards through one network over `layouts`, one after another.

    mode "infer": without gradient. "tangent": under dual numbers; cached keys have none. "train": with gradient, all layouts kept until one
    backward pass. `repeats`: how often each layout is run (guidance, Euler steps; a mean where it varies), for the time alone; () is once.
    `held`: what is in memory beside it.
    """

    name: str
    role: str
    mode: PassMode
    layouts: tuple[TokenLayout, ...]
    repeats: tuple[float, ...] = ()
    held: tuple[Held, ...] = ()

    def runs(self) -> tuple[tuple[TokenLayout, float], ...]:
        """Each layout with how often it is run."""
        return tuple(zip(self.layouts, self.repeats or (1.0,) * len(self.layouts), strict=True))


@dataclass(frozen=True)
class PhasePlan:
    """One kind of iteration: which role is updated, its passes in order, and the share of iterations that are of this kind.

    `terms`: loss terms that are back-propagated one by one; with more than one (or several micro-batches) gradients are held
    unreduced, unless `gradient_sync` is "each".
    """

    role: str
    passes: tuple[Pass, ...]
    share: float = 1.0
    terms: int = 1


@dataclass(frozen=True)
class Job:
    """A run as the planner sees it.

    `latent_elements` of one sample; `batch` samples per data rank and micro-batch; `accumulation` micro-batches per update; `shard` and
    `context` as `fsdp_shard_size` and `context_parallel_size`; `ranks` in all; element sizes in bytes: `param_bytes` of master weights,
    optimiser and EMA, `compute_bytes` of activations and frozen weights, `reduce_bytes` of gradients. `fused`: whether the fused kernels
    run (CUDA) or the plain formulas. `gradient_sync`: as in the training step's configuration.
    """

    name: str
    nets: tuple[NetPlan, ...]
    phases: tuple[PhasePlan, ...]
    latent_elements: int
    batch: int = 1
    accumulation: int = 1
    ranks: int = 1
    shard: int = 1
    context: int = 1
    param_bytes: int = 4
    compute_bytes: int = 2
    reduce_bytes: int = 4
    fused: bool = True
    gradient_sync: str = "last"

    def __post_init__(self) -> None:
        shard = max(self.shard, self.context)
        if self.ranks % shard or shard % self.context:
            raise ConfigError(
                f"{self.ranks} ranks do not divide into shards of fsdp_shard_size={self.shard} with context_parallel_size={self.context}"
            )

    def net(self, role: str) -> NetPlan:
        """The network of `role`."""
        return next(net for net in self.nets if net.role == role)

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of the parameters; a context group wider than the shard size shares one too."""
        return max(self.shard, self.context)

    @property
    def data_ranks(self) -> int:
        """Ranks with data of their own."""
        return self.ranks // self.context

    @property
    def global_batch(self) -> int:
        """Samples per update."""
        return self.data_ranks * self.batch * self.accumulation

    def is_sharded(self, net: NetPlan) -> bool:
        """Whether FSDP2 wraps `net` (see `rcm.parallel.apply`)."""
        mixed = not self.param_bytes == self.compute_bytes == self.reduce_bytes
        return self.ranks > 1 or (net.trained and mixed)

    def with_recompute(self, mode: Recompute) -> Job:
        """The same job with this recomputation in every trained network."""
        return replace(self, nets=tuple(replace(net, recompute=mode) if net.trained else net for net in self.nets))


@lru_cache(maxsize=1024)
def visible_pairs(layout: TokenLayout, *, first_key: int = 0) -> int:
    """(query, key) pairs that the mask lets through, with keys from `first_key` on: what attention costs."""
    total = 0
    for segment in layout.mask.row_segments():
        keys = sum(max(0, stop - max(start, first_key)) for start, stop in segment.intervals)
        total += (segment.q_stop - segment.q_start) * keys
    return total
