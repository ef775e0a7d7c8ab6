"""What a planner needs to know of a training job: its networks, and per phase the passes through
them. No bytes, no seconds.

The vocabulary is that of the methods (`rcm.methods`): a student phase of TF-sCM is a guided teacher
pass, a context pass, a tangent pass and a pass with gradient. `rcm.configs.plan_job` writes a
config down in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import torch

from rcm.core.errors import ConfigError
from rcm.nets.frozen_fp8 import FrozenWeights, fits
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.adapters import adapter_elements
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT
from rcm.parallel.checkpointing import MODES, Mode
from rcm.train.moments import BLOCK, SMALLEST_BLOCK, States


@cache
def parameter_shapes(config: WanConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of every parameter, read off the network on the meta device."""
    with torch.device("meta"):
        return tuple(
            (name, tuple(p.shape))
            for name, p in WanDiT(config, attention="reference").named_parameters()
        )


@cache
def _elements(config: WanConfig, shard: int, part: str) -> int:
    shapes = [
        shape
        for name, shape in parameter_shapes(config)
        if part == "all" or name.startswith("blocks.") == (part == "blocks")
    ]
    return sum(-(-shape[0] // shard) * math.prod(shape[1:]) for shape in shapes)


@cache
def _rounded(config: WanConfig, shard: int) -> tuple[int, int]:
    """Weights that a rounded frozen network keeps in e4m3 on rank 0 of `shard` ranks, and their
    rows.
    """
    shapes = [
        shape
        for name, shape in parameter_shapes(config)
        if name.startswith("blocks.") and len(shape) == 2 and fits(shape)
    ]
    rows = [-(-shape[0] // shard) for shape in shapes]
    return sum(n * shape[1] for n, shape in zip(rows, shapes, strict=True)), sum(rows)


@cache
def _coded(config: WanConfig, shard: int) -> tuple[int, int]:
    """Trained numbers whose moments are 8-bit codes on rank 0 of `shard` ranks, and blocks that
    share a scale.
    """
    sizes = [
        (-(-shape[0] // shard) * math.prod(shape[1:]), math.gcd(shape[-1], BLOCK))
        for _, shape in parameter_shapes(config)
        if len(shape) > 1 and math.gcd(shape[-1], BLOCK) >= SMALLEST_BLOCK
    ]
    return sum(size for size, _ in sizes), sum(size // block for size, block in sizes)


@dataclass(frozen=True)
class NetPlan:
    """One network of a job."""

    role: str
    config: WanConfig
    trained: bool  # it has master weights, an optimiser and gradients
    averaged: bool = False  # it has an EMA
    recompute: Mode = "none"  # `sac_config.mode`, of a trained network
    recompute_every: int = 1  # `sac_config.every_n_blocks`
    # of the low-rank adapters on `layers`, which are trained in place of the weights; 0 = none
    rank: int = 0
    layers: tuple[str, ...] = ()
    base: str = ""  # role whose network in memory computes this one, too; "" = its own
    states: States = "float32"  # form of its optimiser's moments
    head: int = 0  # numbers of a discriminator's head on its tokens, trained with it

    def __post_init__(self) -> None:
        if self.recompute not in MODES:
            raise ConfigError(
                f"{self.role}: recompute={self.recompute!r} is not one of {', '.join(MODES)}"
            )

    def elements(self, *, shard: int = 1, part: Literal["all", "blocks", "root"] = "all") -> int:
        """Parameters on rank 0 of `shard` ranks. FSDP2 cuts every tensor along its first axis: [1,
        6, E] stays whole on rank 0.
        """
        return _elements(self.config, shard, part)

    def rounded(self, *, shard: int = 1) -> tuple[int, int]:
        """As `elements`, of what is e4m3 where a frozen network is rounded, and its rows."""
        return _rounded(self.config, shard)

    def moment_bytes(self, *, shard: int, wide: int) -> float:
        """Both moments on rank 0; `wide`: bytes of a number in full precision."""
        count = self.trained_elements(shard=shard)
        if self.states in ("int8", "float8") and not self.rank:
            coded, blocks = _coded(self.config, shard)
            return 2.0 * (coded + 4 * blocks + wide * (count - coded))
        if self.states in ("int8", "float8"):  # factors have a few blocks per row
            return 2.0 * count * (1 + 4 / math.gcd(self.rank, BLOCK))
        return 2.0 * count * (2 if self.states == "bfloat16" else wide)

    @property
    def largest(self) -> int:
        """Numbers of the largest tensor."""
        return max(math.prod(shape) for _, shape in parameter_shapes(self.config))

    def trained_elements(self, *, shard: int = 1) -> int:
        """As `elements`, of what is trained."""
        if self.rank:
            return adapter_elements(self.layers, self.config, rank=self.rank, shard=shard)
        return self.elements(shard=shard)

    @property
    def block_elements(self) -> int:
        """Parameters of one block."""
        return self.elements(part="blocks") // self.config.num_layers

    @property
    def trained_block(self) -> int:
        """What is trained of one block."""
        return (
            self.trained_elements() // self.config.num_layers if self.rank else self.block_elements
        )

    def is_recomputed(self, block: int) -> bool:
        """Whether this block runs again in the backward pass."""
        return self.recompute != "none" and block % self.recompute_every == 0

    @property
    def recomputed_blocks(self) -> int:
        """How many blocks run again in the backward pass."""
        return sum(map(self.is_recomputed, range(self.config.num_layers)))


@dataclass(frozen=True)
class Pass:
    """Forwards through one network over `layouts`, one after another."""

    name: str
    role: str
    # without gradient; under dual numbers (cached keys have none); with gradient, all layouts kept
    # until one backward pass
    mode: Literal["infer", "tangent", "train"]
    layouts: tuple[TokenLayout, ...]
    # runs of each layout (guidance, steps; a mean where it varies), for time alone; () is once
    repeats: tuple[float, ...] = ()
    cached: int = 0  # latent frames whose student keys and values are in memory
    beside: Pass | None = None  # an earlier pass whose backward pass is yet to come
    reach: tuple[int, ...] = ()  # blocks that run of each layout; () is all of them
    inputs: bool = False  # a backward pass reaches the network's input alone, none of its weights

    def runs(self, index: int, blocks: int) -> int:
        """How many of `blocks` run of a layout."""
        return self.reach[index] if self.reach else blocks


@dataclass(frozen=True)
class PhasePlan:
    """One kind of iteration: which role is updated, its passes in order, and its share of the
    iterations.

    `terms`: loss terms that are back-propagated one by one; with more than one (or several
    micro-batches) gradients are held unreduced, unless `gradient_sync` is "each".
    """

    role: str
    passes: tuple[Pass, ...]
    share: float = 1.0
    terms: int = 1


@dataclass(frozen=True)
class Job:
    """A run as the planner sees it; sizes of elements in bytes."""

    name: str
    nets: tuple[NetPlan, ...]
    phases: tuple[PhasePlan, ...]
    latent_elements: int  # of one sample
    batch: int = 1  # samples per data rank and micro-batch
    accumulation: int = 1  # micro-batches per update
    ranks: int = 1
    shard: int = 1  # `fsdp_shard_size`
    context: int = 1  # `context_parallel_size`
    param_bytes: int = 4  # master weights, optimiser, EMA
    compute_bytes: int = 2  # activations, frozen weights
    reduce_bytes: int = 4  # gradients
    fused: bool = True  # the fused kernels run (CUDA), not the plain formulas
    gradient_sync: str = "last"  # as in the training step's configuration
    frozen_weights: FrozenWeights = "compute"  # form of frozen networks
    host_states: bool = False  # moments and averages live in host memory
    idle_roles: bool = False  # networks whose turn it is not wait in host memory
    host_parameters: bool = False  # trained networks live in host memory

    def __post_init__(self) -> None:
        if self.ranks % self.shard_ranks or self.shard_ranks % self.context:
            raise ConfigError(
                f"{self.ranks} ranks do not divide into shards of fsdp_shard_size={self.shard} with"
                f" context_parallel_size={self.context}"
            )

    def net(self, role: str) -> NetPlan:
        """The network of `role`."""
        return next(net for net in self.nets if net.role == role)

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of the parameters; a context group wider than the shard size
        shares one too.
        """
        return max(self.shard, self.context)

    @property
    def data_ranks(self) -> int:
        """Ranks with data of their own."""
        return self.ranks // self.context

    @property
    def global_batch(self) -> int:
        """Samples per update."""
        return self.data_ranks * self.batch * self.accumulation

    def shards_of(self, net: NetPlan) -> int:
        """Ranks over which FSDP2 spreads `net`; 0 where it does not wrap it (see
        `rcm.parallel.apply`).
        """
        mixed = not self.param_bytes == self.compute_bytes == self.reduce_bytes
        wrapped = net.trained and (mixed or self.host_parameters)
        return self.shard_ranks if self.ranks > 1 or wrapped else 0

    def stored(self, net: NetPlan) -> int:
        """Parameters of `net` on rank 0."""
        return net.elements(shard=max(1, self.shards_of(net)))

    def is_rounded(self, net: NetPlan) -> bool:
        """Whether the blocks' weights of `net` are e4m3."""
        return self.frozen_weights != "compute" and not (net.trained or net.base)

    def compute_size(self, net: NetPlan, *, shard: int = 1, blocks: int | None = None) -> float:
        """Bytes of `net` as frozen networks are stored and as FSDP2 gathers any, of rank 0 of
        `shard` ranks. `blocks`: of that many blocks alone, whole.
        """
        layers = net.config.num_layers
        of_blocks = 1.0 if blocks is None else blocks / layers
        count = net.elements(shard=shard, part="blocks" if blocks is not None else "all")
        size = self.compute_bytes * count * of_blocks
        if not self.is_rounded(net):
            return size
        rounded, rows = net.rounded(shard=shard)
        return size + ((1 - self.compute_bytes) * rounded + 4 * rows) * of_blocks

    def trained(self, net: NetPlan) -> int:
        """What is trained of `net` on rank 0."""
        return net.trained_elements(shard=max(1, self.shards_of(net)))

    def with_recompute(self, mode: Mode) -> Job:
        """The same job with this recomputation in every trained network."""
        return replace(
            self,
            nets=tuple(replace(net, recompute=mode) if net.trained else net for net in self.nets),
        )


@lru_cache(maxsize=1024)
def visible_pairs(layout: TokenLayout, *, first_key: int = 0) -> int:
    """(query, key) pairs that the mask lets through, with keys from `first_key` on: what attention
    costs.
    """
    return sum(
        (segment.q_stop - segment.q_start) * max(0, stop - max(start, first_key))
        for segment in layout.mask.row_segments()
        for start, stop in segment.intervals
    )
