"""What a planner needs to know of a training job: its networks, and per phase the passes through
them. No bytes, no seconds.

The vocabulary is that of the methods (`rcm.methods`): a student phase of TF-sCM is a guided teacher
pass, a context pass, a tangent pass and a pass with gradient. `rcm.configs.plan_job` writes a
config down in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch

from rcm.core.errors import ConfigError
from rcm.nets.frozen_fp8 import FrozenWeights, fits
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.adapters import factor_shapes
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


class Numbers(NamedTuple):
    """Parameters of a network on rank 0 of the ranks that share them."""

    all: int = 0
    blocks: int = 0
    rounded: int = 0  # in e4m3 where it is frozen and rounded,
    rows: int = 0  # and the rows of those, which have a scale each
    coded: int = 0  # with moments in 8-bit codes where it is trained so,
    scales: int = 0  # and the blocks of those, which have a scale each
    powers: int = 0  # the next power of two of every tensor's, as torch hands pinned memory out
    largest: int = 0  # of one tensor


@cache
def numbers(config: WanConfig, shard: int = 1) -> Numbers:
    """Of the weights of a network."""
    return _counted(parameter_shapes(config), shard)


@cache
def adapter_numbers(config: WanConfig, layers: tuple[str, ...], rank: int, shard: int) -> Numbers:
    """Of one set of adapters."""
    shapes = factor_shapes(layers, config, rank=rank) * config.num_layers
    return _counted([("blocks.", shape) for shape in shapes], shard)


def _counted(shapes: Iterable[tuple[str, tuple[int, ...]]], shard: int) -> Numbers:
    """FSDP2 cuts every tensor along its first axis: [1, 6, E] stays whole on rank 0."""
    columns: list[tuple[int, ...]] = []
    for name, shape in shapes:
        rows, group = -(-shape[0] // shard), math.gcd(shape[-1], BLOCK)
        count, inside = rows * math.prod(shape[1:]), name.startswith("blocks.")
        linear = inside and len(shape) == 2 and fits(shape)
        coded = len(shape) > 1 and group >= SMALLEST_BLOCK
        own = (count, inside * count, linear * count, linear * rows)
        columns.append(
            (*own, coded * count, coded * (count // group), 1 << (count - 1).bit_length())
        )
    sums = Numbers(*(sum(column) for column in zip(*columns, strict=True)))
    return sums._replace(largest=max(count for count, *_ in columns))


@dataclass(frozen=True)
class NetPlan:
    """One network of a job."""

    role: str
    config: WanConfig
    trained: bool  # it has master weights, an optimiser and gradients
    averaged: bool = False  # it has an EMA
    recompute: Mode = "none"  # `sac_config.mode`, of a trained network
    recompute_every: int = 1  # `sac_config.every_n_blocks`
    keep_last: int = 0  # `sac_config.keep_last_blocks`
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

    def elements(self, *, shard: int = 1) -> int:
        """Parameters on rank 0 of `shard` ranks."""
        return numbers(self.config, shard).all

    def trained_numbers(self, *, shard: int = 1) -> Numbers:
        """Of what is trained, on rank 0 of `shard` ranks."""
        if self.rank:
            return adapter_numbers(self.config, self.layers, self.rank, shard)
        return numbers(self.config, shard)

    def trained_elements(self, *, shard: int = 1) -> int:
        """As `elements`, of what is trained."""
        return self.trained_numbers(shard=shard).all

    @property
    def block_elements(self) -> int:
        """Parameters of one block."""
        return numbers(self.config).blocks // self.config.num_layers

    @property
    def trained_block(self) -> int:
        """What is trained of one block."""
        adapters = self.trained_elements() // self.config.num_layers
        return adapters if self.rank else self.block_elements

    def is_recomputed(self, block: int) -> bool:
        """Whether this block runs again in the backward pass."""
        reached = block < self.config.num_layers - self.keep_last
        return self.recompute != "none" and reached and block % self.recompute_every == 0

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
    micro-batches) gradients are held unreduced, unless `gradient_sync` is "each". `rollout`: the
    student makes a video, as `rcm.methods.base.Phase` says.
    """

    role: str
    passes: tuple[Pass, ...]
    share: float = 1.0
    terms: int = 1
    rollout: bool = False


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
    keep_gathered: int = 0  # parameters of the largest student that rolls out gathered

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

    def is_wrapped(self, net: NetPlan) -> bool:
        """Whether FSDP2 wraps `net` (see `rcm.parallel.apply`)."""
        mixed = not self.param_bytes == self.compute_bytes == self.reduce_bytes
        return self.ranks > 1 or (net.trained and (mixed or self.host_parameters))

    def rolls_gathered(self, phase: PhasePlan) -> bool:
        """Whether the student's weights stay gathered from pass to pass (`rcm.train.step`)."""
        student = self.net("student")
        count = student.elements() + self.adapter_elements(student)
        return phase.rollout and self.is_wrapped(student) and count <= self.keep_gathered

    def adapter_elements(self, net: NetPlan) -> int:
        """Of all sets of adapters on the network that `net` computes with."""
        base = net.base or net.role
        sets = (own for own in self.nets if own.rank and (own.base or own.role) == base)
        return sum(own.trained_elements() for own in sets)

    def is_rounded(self, net: NetPlan) -> bool:
        """Whether the blocks' weights of `net` are e4m3."""
        return self.frozen_weights != "compute" and not (net.trained or net.base)

    def lives_on_host(self, net: NetPlan) -> bool:
        """Whether `net` comes to the card block by block."""
        return self.host_parameters and net.trained

    def stored(self, net: NetPlan) -> Numbers:
        """Parameters of `net` on rank 0."""
        return numbers(net.config, self.shard_ranks)

    def trained(self, net: NetPlan) -> int:
        """What is trained of `net` on rank 0."""
        return net.trained_elements(shard=self.shard_ranks)

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
