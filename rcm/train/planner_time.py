"""How long a job takes: arithmetic, memory traffic and communication of every pass, over rates that were measured.

FLOPs count two per multiply-add (spec/wan 9), and per block and sample L (12 E^2 + 4 E H) + 512 * 4 E^2 for the linear layers, 4 P E for
self-attention over the P pairs that the mask lets through, 4 L 512 E for cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from rcm.nets.layout import TokenLayout
from rcm.nets.wan.config import WanConfig
from rcm.train.planner_card import Card
from rcm.train.planner_job import Job, NetPlan, Pass, PhasePlan, visible_pairs

ELEMENTWISE_ROWS = 25
"""E-wide rows that the fused elementwise kernels of a block read and write per token, beside two H-wide ones."""

BACKWARD_ATTENTION = 2.5
"""Matrix products of attention's backward pass over those of its forward: five against two."""


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of all blocks for one sample: linear layers, self-attention (dense mask or not), cross-attention."""

    linear: float
    attention: float
    cross: float
    masked: bool

    @property
    def total(self) -> float:
        """All together."""
        return self.linear + self.attention + self.cross


def forward_work(config: WanConfig, layout: TokenLayout) -> Work:
    """Forward FLOPs of one sample (spec/wan 9)."""
    tokens, width, hidden, text = layout.num_tokens, config.dim, config.ffn_dim, config.text_len
    linear = tokens * (12 * width**2 + 4 * width * hidden) + text * 4 * width**2
    scale = config.num_layers
    pairs = visible_pairs(layout)
    return Work(scale * linear, scale * 4.0 * pairs * width, scale * 4.0 * tokens * text * width, masked=not layout.mask.is_full)


def pass_flops(job: Job, step: Pass) -> float:
    """FLOPs of a pass on all ranks of a context group, one micro-batch: recomputation included."""
    net = job.net(step.role)
    total = 0.0
    for layout, count in step.runs():
        work = forward_work(net.config, layout)
        linear, attention = _factors(net, step, layout)
        total += count * job.batch * (linear * (work.linear + work.cross) + attention * work.attention)
    return total


def _factors(net: NetPlan, step: Pass, layout: TokenLayout) -> tuple[float, float]:
    """Multiples of the forward's FLOPs: linear layers and cross-attention; self-attention."""
    if step.mode == "infer":
        return 1.0, 1.0
    if step.mode == "tangent":
        pairs = visible_pairs(layout)
        own = visible_pairs(layout, first_key=layout.context_tokens)
        return 2.0, (3.0 * own + 2.0 * (pairs - own)) / pairs  # six products of two, four where the keys are constant
    again = 1.0 if net.recompute.startswith("block_wise") else 0.0
    attention_again = 1.0 if net.recompute == "block_wise" else 0.0
    return 3.0 + again, 1.0 + attention_again + BACKWARD_ATTENTION


def pass_seconds(job: Job, card: Card, step: Pass) -> float:
    """Seconds of a pass for one micro-batch: the slower of arithmetic and communication that it hides, plus the exchanges it cannot."""
    net = job.net(step.role)
    config, total = net.config, 0.0
    for layout, count in step.runs():
        work = forward_work(config, layout)
        linear, attention = _factors(net, step, layout)
        share = job.batch / job.context
        dense = card.masked if work.masked else 1.0
        seconds = linear * work.linear * share / card.matmul + linear * work.cross * share / card.attention
        if step.mode == "train":
            forwards = attention - BACKWARD_ATTENTION
            rates = forwards / card.attention + BACKWARD_ATTENTION / card.attention_backward
            seconds += work.attention * share * rates / dense
        else:
            rate = card.attention_tangent if step.mode == "tangent" else card.attention
            seconds += attention * work.attention * share / (rate * dense)
        seconds += _elementwise(job, net, step, layout) / card.bandwidth
        passes = 3.0 if step.mode == "train" else 1.0
        seconds = max(seconds, passes * config.num_layers * card.launch)
        total += count * (max(seconds, _gathering(job, card, net, step)) + _exchanging(job, card, net, step, layout))
    return total


def _elementwise(job: Job, net: NetPlan, step: Pass, layout: TokenLayout) -> float:
    """Bytes that norms, rotations, gates and GELU move: twice that with tangents; twice in a backward pass, once more if recomputed."""
    config = net.config
    rows = ELEMENTWISE_ROWS * config.dim + 2 * config.ffn_dim
    forward = config.num_layers * job.batch * layout.num_tokens / job.context * rows * job.compute_bytes
    if step.mode == "train":
        return forward * (3.0 if net.recompute == "none" else 4.0)
    return forward * (2.0 if step.mode == "tangent" else 1.0)


def _gathering(job: Job, card: Card, net: NetPlan, step: Pass) -> float:
    """FSDP2's traffic of one forward (and backward): every block gathered, again for the backward, its gradients scattered."""
    ranks = job.shard_ranks
    if not job.is_sharded(net) or ranks == 1:
        return 0.0
    speed = card.link if ranks <= card.node else card.network
    parameters = net.elements() * (ranks - 1) / ranks
    bytes_moved = job.compute_bytes * parameters
    if step.mode == "train":
        bytes_moved = 2 * bytes_moved + job.reduce_bytes * parameters
    return bytes_moved / speed


def _exchanging(job: Job, card: Card, net: NetPlan, step: Pass, layout: TokenLayout) -> float:
    """Ulysses: q, k, v and the result cross the group in every block; with tangents twice, with gradient forward, again and backward."""
    if job.context == 1:
        return 0.0
    rows = 4 * job.batch * layout.num_tokens / job.context * (job.context - 1) / job.context
    again = {"infer": 1.0, "tangent": 2.0, "train": 2.0 if net.recompute == "none" else 3.0}[step.mode]
    speed = card.link if job.context <= card.node else card.network
    return again * rows * net.config.dim * job.compute_bytes * net.config.num_layers / speed


def update_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """AdamW reads four and writes three numbers per parameter, the EMA reads two and writes one."""
    net = job.net(phase.role)
    stored = net.elements(shard=job.shard_ranks if job.is_sharded(net) else 1)
    return stored * job.param_bytes * (7 + (3 if net.averaged else 0)) / card.bandwidth


def phase_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """Seconds of one iteration of this kind, all micro-batches and the update."""
    return job.accumulation * sum(pass_seconds(job, card, step) for step in phase.passes) + update_seconds(job, card, phase)
