"""How long a job takes: arithmetic, memory traffic and communication of every pass, over rates that
were measured.

FLOPs count two per multiply-add (docs/reference/wan.md#cost), and per block and sample L (12 E^2 +
4 E H) + 512 * 4 E^2 for the linear layers, 4 P E for self-attention over the P pairs that the mask
lets through, 4 L 512 E for cross-attention.
"""

from __future__ import annotations

from typing import NamedTuple

from rcm.nets.layout import TokenLayout
from rcm.nets.wan.adapters import factor_shapes
from rcm.nets.wan.config import WanConfig
from rcm.train.planner_card import Card
from rcm.train.planner_job import (
    Job,
    NetPlan,
    Pass,
    PhasePlan,
    numbers,
    parameter_shapes,
    visible_pairs,
)
from rcm.train.planner_memory import compute_size, held_terms, total

ELEMENTWISE_ROWS = 25
"""E-wide rows that the fused elementwise kernels of a block read and write per token, beside two
H-wide ones.
"""

UPDATE_LAUNCH = 0.11e-3
"""Seconds per trained tensor in which an update leaves the device idle: 90 ms of 825."""

HOST_MEMORY = 150e9
"""Bytes/s of a machine's host memory in an update there, assumed."""


class Times(NamedTuple):
    """A pass in units of one forward."""

    linear: float  # linear layers and cross-attention
    attention: float
    backward: float  # attention's own: five matrix products against two
    rows: float  # elementwise traffic
    exchanges: float  # of context parallelism
    launches: float
    launches_alone: float  # on a rank that waits for no other


TIMES = {
    "infer": Times(1, 1, 0, 1, 1, 1, 1),
    "tangent": Times(2, 3, 0, 2, 2, 1, 1),  # attention: six products of two
    "train": Times(3, 1, 2.5, 3, 2, 3, 5),
}

AGAIN: dict[str, tuple[float, float]] = {"none": (0, 0), "mm_only": (0, 0), "block_wise": (1, 1)}
AGAIN |= {"block_wise_keep_attention": (1, 0), "block_wise_keep_attention_mlp": (1, 0)}
"""Forwards of linear layers and of attention that a recomputed block adds."""


class Work(NamedTuple):
    """Forward FLOPs of all blocks for one sample."""

    linear: float
    attention: float
    cross: float


def forward_work(config: WanConfig, layout: TokenLayout) -> Work:
    """Forward FLOPs of one sample (docs/reference/wan.md#cost)."""
    tokens, width, text, scale = layout.num_tokens, config.dim, config.text_len, config.num_layers
    linear = tokens * (12 * width**2 + 4 * width * config.ffn_dim) + text * 4 * width**2
    pairs = visible_pairs(layout)
    return Work(scale * linear, scale * 4.0 * pairs * width, scale * 4.0 * tokens * text * width)


def _times(net: NetPlan, step: Pass, layout: TokenLayout) -> Times:
    once = TIMES[step.mode]
    if step.mode == "tangent":  # four products where the keys are constant
        own = visible_pairs(layout, first_key=layout.context_tokens) / visible_pairs(layout)
        return once._replace(attention=once.attention - (1 - own))
    if step.mode == "infer":
        return once
    again, config = net.recomputed_blocks / net.config.num_layers, net.config
    linear, attention = AGAIN[net.recompute]
    if net.recompute.endswith("_mlp"):  # less the second product of the MLP
        linear -= config.ffn_dim / (6 * config.dim + 2 * config.ffn_dim)
    return once._replace(
        linear=once.linear + again * linear,
        attention=once.attention + again * attention,
        rows=once.rows + again,
        exchanges=once.exchanges + again,
    )


class Cost(NamedTuple):
    """Of a pass and one micro-batch: FLOPs on all ranks of a context group, recomputation included,
    and seconds.
    """

    flops: float
    seconds: float


def pass_cost(job: Job, card: Card, step: Pass, *, gathered: bool = False) -> Cost:
    """Seconds: the slower of arithmetic and the communication that it hides, plus the exchanges
    that it cannot hide. `gathered`: the weights are there.
    """
    net, flops, taken, share = job.net(step.role), 0.0, 0.0, job.batch / job.context
    gathers = (step.mode == "train") + 1 if not gathered else 0
    config, gathering = net.config, _gathering(job, card, net, step, gathers)
    # no gradient of the weights themselves
    frozen = step.mode == "train" and (net.rank > 0 or step.inputs)
    factors = 0 if step.inputs or step.mode != "train" else _factors(net)
    repeats = step.repeats or (1.0,) * len(step.layouts)
    for index, (layout, runs) in enumerate(zip(step.layouts, repeats, strict=True)):
        count = runs * step.runs(index, config.num_layers) / config.num_layers
        work, times = forward_work(config, layout), _times(net, step, layout)
        products = (times.linear - frozen) * work.linear + factors * layout.num_tokens
        cross, attention = times.linear * work.cross, times.attention * work.attention
        back = times.backward * work.attention
        flops += count * job.batch * (products + cross + attention + back)
        masked = 1.0 if layout.mask.is_full else card.masked
        ahead = card.attention_tangent * masked if step.mode == "tangent" else card.attention
        # norms, rotations, gates and GELU
        rows = layout.num_tokens * (ELEMENTWISE_ROWS * config.dim + 2 * config.ffn_dim)
        traffic = times.rows * config.num_layers * rows * job.compute_bytes
        seconds = products / card.matmul + cross / card.attention + traffic / card.bandwidth
        seconds += attention / ahead + back / (masked * card.attention_backward)
        seconds = max(share * seconds + _widening(job, card, net), gathering)
        seconds += times.exchanges * _exchanging(job, card, net, layout)
        taken += count * _issued(job, card, seconds, times=times, blocks=config.num_layers)
    return Cost(flops, taken)


def _issued(job: Job, card: Card, seconds: float, *, times: Times, blocks: int) -> float:
    """With the time in which the host issues so many blocks: beside the device's; beside half of it
    where ranks share parameters, for they meet in every block.
    """
    if job.shard_ranks == 1:
        return max(seconds, times.launches_alone * blocks * card.launch)
    return max(seconds, seconds / 2 + times.launches * blocks * card.launch_ranks)


def gather_seconds(job: Job, card: Card, role: str) -> float:
    """Gathering the weights of `role` once, nothing beside it."""
    return _gathering(job, card, job.net(role), None, 1)


def _factors(net: NetPlan) -> int:
    """FLOPs per token of the gradients of low-rank factors, two products each; forward passes add
    factors to weights, which costs no token anything. Layers of the text have few tokens.
    """
    own = [layer for layer in net.layers if layer not in ("cross_attn.k", "cross_attn.v")]
    shapes = factor_shapes(own, net.config, rank=net.rank)
    return 4 * net.config.num_layers * sum(rows * columns for rows, columns in shapes)


def _widening(job: Job, card: Card, net: NetPlan) -> float:
    """Of weights in e4m3 for one forward: each is read, written wide, scaled in place, and read."""
    wide = job.is_rounded(net) and job.frozen_weights == "fp8_storage"
    return wide * numbers(net.config).rounded * (1 + 3 * job.compute_bytes) / card.bandwidth


def _speed(card: Card, ranks: int) -> float:
    return card.link if ranks <= card.node else card.network


def _gathering(job: Job, card: Card, net: NetPlan, step: Pass | None, gathers: int) -> float:
    """FSDP2's traffic of one forward (and backward): every block gathered so many times, its
    gradients scattered; from the host, where it lives there.
    """
    ranks, whole = job.shard_ranks, numbers(net.config)
    training = step is not None and step.mode == "train"
    reduced = job.reduce_bytes * (training and step is not None and not step.inputs)
    moved = compute_size(job, net, whole.all, of=whole) * gathers
    moved += reduced * net.trained_elements()
    crossing = job.param_bytes * gathers + job.reduce_bytes * training
    crossing *= job.stored(net).all * job.lives_on_host(net)
    return moved * (ranks - 1) / ranks / _speed(card, ranks) + crossing / card.host_gather


def _exchanging(job: Job, card: Card, net: NetPlan, layout: TokenLayout) -> float:
    """Ulysses, of one forward: q, k, v and the result cross the group in every block."""
    rows = 4 * job.batch * layout.num_tokens / job.context * (job.context - 1) / job.context
    moved = rows * net.config.dim * job.compute_bytes * net.config.num_layers
    return moved / _speed(card, job.context) + moved / card.reorder


def update_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """AdamW reads four and writes three numbers per parameter, the EMA reads two and writes one.
    States on the host pass both ways at once, beside the arithmetic.
    """
    net = job.net(phase.role)
    touched = job.trained(net) * job.param_bytes * (7 + 3 * net.averaged)
    if job.host_parameters:  # all ranks of a machine share its memory's speed
        return touched * min(job.ranks, card.node) / HOST_MEMORY
    passing = total(held_terms(job, "host", {phase.role})) / card.host
    idle = UPDATE_LAUNCH * len(parameter_shapes(net.config))
    return max(touched / card.bandwidth, passing) + idle


def moving_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """Networks that come from the host, one after another, none of it hidden. The role in training
    comes and goes when the turn passes to it, for it was changed; others come for each micro-batch
    as often as another one computed in between.
    """
    sizes = {net.role: total(held_terms(job, "turn", {net.role})) for net in job.nets}
    turns = min(other.share for other in job.phases) / phase.share * (len(job.phases) > 1)
    moved, present = 2 * turns * sizes[phase.role], phase.role
    for step in phase.passes:
        if step.role not in (phase.role, present):
            moved += job.accumulation * sizes[step.role]
        present = step.role
    return moved / card.host


def summing_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """Gradients of every backward pass but the first, where they are reduced after each and lie on
    the host: copied to pageable memory tensor by tensor, and added by the processor.
    """
    net = job.net(phase.role)
    if job.gradient_sync != "each" or not job.lives_on_host(net):
        return 0.0
    passes = [step for step in phase.passes if step.role == phase.role and step.mode == "train"]
    times = max(job.accumulation * len(passes) - 1, 0)
    return times * job.reduce_bytes * job.stored(net).all / card.host_sum
