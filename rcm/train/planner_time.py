"""How long a job takes: arithmetic, memory traffic and communication of every pass, over rates that
were measured.

FLOPs count two per multiply-add (docs/reference/wan.md#cost), and per block and sample L (12 E^2 +
4 E H) + 512 * 4 E^2 for the linear layers, 4 P E for self-attention over the P pairs that the mask
lets through, 4 L 512 E for cross-attention.
"""

from __future__ import annotations

from typing import NamedTuple

from rcm.nets.layout import TokenLayout
from rcm.nets.wan.adapters import adapter_elements
from rcm.nets.wan.config import WanConfig
from rcm.train.planner_card import Card
from rcm.train.planner_job import Job, NetPlan, Pass, PhasePlan, visible_pairs
from rcm.train.planner_memory import average_bytes, moment_bytes, weight_terms

ELEMENTWISE_ROWS = 25
"""E-wide rows that the fused elementwise kernels of a block read and write per token, beside two
H-wide ones.
"""

HOST_MEMORY = 150e9
"""Bytes/s of a machine's host memory in an update there, assumed."""

BACKWARD_ATTENTION = 2.5
"""Matrix products of attention's backward pass over those of its forward: five against two."""


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


class _Multiples(NamedTuple):
    """A pass in units of one forward."""

    linear: float  # linear layers and cross-attention
    attention: float
    backward: float  # attention's own
    rows: float  # elementwise traffic
    exchanges: float  # of context parallelism
    launches: float


def _multiples(net: NetPlan, step: Pass, layout: TokenLayout) -> _Multiples:
    if step.mode == "infer":
        return _Multiples(1, 1, 0, 1, 1, 1)
    if step.mode == "tangent":  # attention: six products of two, four where the keys are constant
        constant = 1 - visible_pairs(layout, first_key=layout.context_tokens) / visible_pairs(
            layout
        )
        return _Multiples(2, 3 - constant, 0, 2, 2, 1)
    again = net.recomputed_blocks / net.config.num_layers
    # of the MLP's products
    second = net.config.ffn_dim / (6 * net.config.dim + 2 * net.config.ffn_dim)
    kept = second if net.recompute.endswith("_mlp") else 0
    linear = 3 + again * net.recompute.startswith("block_wise") * (1 - kept)
    attention = 1 + again * (net.recompute == "block_wise")
    return _Multiples(linear, attention, BACKWARD_ATTENTION, 3 + again, 2 + again, 3)


class Cost(NamedTuple):
    """Of a pass and one micro-batch: FLOPs on all ranks of a context group, recomputation included,
    and seconds.
    """

    flops: float
    seconds: float


def pass_cost(job: Job, card: Card, step: Pass) -> Cost:
    """Seconds: the slower of arithmetic and the communication that it hides, plus the exchanges
    that it cannot hide.
    """
    net, flops, total, share = job.net(step.role), 0.0, 0.0, job.batch / job.context
    config, gathering = net.config, _gathering(job, card, net, step)
    rate = card.attention_tangent if step.mode == "tangent" else card.attention
    # no gradient of the weights themselves
    frozen = step.mode == "train" and (bool(net.rank) or step.inputs)
    # of tokens, not of the text
    own = [layer for layer in net.layers if layer not in ("cross_attn.k", "cross_attn.v")]
    # forward passes add factors to weights, which costs no token anything; of the backward pass
    # each factor's gradient is two products
    adapted = frozen and not step.inputs
    factors = 4 * adapter_elements(own, config, rank=net.rank) if adapted else 0
    repeats = step.repeats or (1.0,) * len(step.layouts)
    for index, (layout, runs) in enumerate(zip(step.layouts, repeats, strict=True)):
        count = runs * step.runs(index, config.num_layers) / config.num_layers
        work, times = forward_work(config, layout), _multiples(net, step, layout)
        products = (times.linear - frozen) * work.linear + factors * layout.num_tokens
        dense = products + times.linear * work.cross
        flops += count * job.batch * (dense + (times.attention + times.backward) * work.attention)
        attention = work.attention / (1.0 if layout.mask.is_full else card.masked)
        seconds = products / card.matmul + times.linear * work.cross / card.attention
        seconds += attention * (times.attention / rate + times.backward / card.attention_backward)
        # norms, rotations, gates and GELU
        rows = layout.num_tokens * (ELEMENTWISE_ROWS * config.dim + 2 * config.ffn_dim)
        traffic = times.rows * config.num_layers * rows * job.compute_bytes
        seconds = share * (seconds + traffic / card.bandwidth) + _widening(job, card, net)
        seconds = max(seconds, times.launches * config.num_layers * card.launch, gathering)
        total += count * (seconds + times.exchanges * _exchanging(job, card, net, layout))
    return Cost(flops, total)


def _widening(job: Job, card: Card, net: NetPlan) -> float:
    """Of weights in e4m3 for one forward: each is read, written wide, scaled in place, and read."""
    wide = job.is_rounded(net) and job.frozen_weights == "fp8_storage"
    return wide * net.rounded()[0] * (1 + 3 * job.compute_bytes) / card.bandwidth


def _speed(card: Card, ranks: int) -> float:
    return card.link if ranks <= card.node else card.network


def _gathering(job: Job, card: Card, net: NetPlan, step: Pass) -> float:
    """FSDP2's traffic of one forward (and backward): every block gathered, again for the backward,
    its gradients scattered.
    """
    ranks = max(1, job.shards_of(net))
    training = step.mode == "train"
    reduced = training and not step.inputs
    moved = (
        job.compute_size(net) * (1 + training) + job.reduce_bytes * net.trained_elements() * reduced
    )
    between = moved * (ranks - 1) / ranks / _speed(card, ranks)
    if not (job.host_parameters and net.trained):
        return between
    crossing = job.param_bytes * (1 + training) + job.reduce_bytes * training
    return between + crossing * job.stored(net) / card.host


def _exchanging(job: Job, card: Card, net: NetPlan, layout: TokenLayout) -> float:
    """Ulysses, of one forward: q, k, v and the result cross the group in every block."""
    rows = 4 * job.batch * layout.num_tokens / job.context * (job.context - 1) / job.context
    moved = rows * net.config.dim * job.compute_bytes * net.config.num_layers
    return moved / _speed(card, job.context)


def update_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """AdamW reads four and writes three numbers per parameter, the EMA reads two and writes one.
    States on the host pass both ways at once, beside the arithmetic.
    """
    net = job.net(phase.role)
    touched = job.trained(net) * job.param_bytes * (7 + 3 * net.averaged)
    if job.host_parameters:  # all ranks of a machine share its memory's speed
        return touched * min(job.ranks, card.node) / HOST_MEMORY
    inside = touched / card.bandwidth
    if not job.host_states:
        return inside
    return max(
        inside, (moment_bytes(job, net) + net.averaged * average_bytes(job, net)) / card.host
    )


def moving_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """Networks that come from the host, one after another, none of it hidden. The role in training
    comes and goes when the turn passes to it, for it was changed; others come for each micro-batch
    as often as another one computed in between.
    """
    if not job.idle_roles:
        return 0.0
    sizes = {
        net.role: 0.0
        if net.trained and job.host_parameters
        else sum(term.bytes for term in weight_terms(job, net))
        for net in job.nets
    }
    turns = min(other.share for other in job.phases) / phase.share
    moved = 2 * turns * sizes[phase.role] if len(job.phases) > 1 else 0.0
    present = phase.role
    for step in phase.passes:
        if step.role not in (phase.role, present):
            moved += job.accumulation * sizes[step.role]
        present = step.role
    return moved / card.host
