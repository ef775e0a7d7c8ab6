"""How long a job takes: arithmetic, memory traffic and communication of every pass, over rates that were measured.

FLOPs count two per multiply-add (docs/reference/wan.md#cost), and per block and sample L (12 E^2 + 4 E H) + 512 * 4 E^2 for the linear
layers, 4 P E for self-attention over the P pairs that the mask lets through, 4 L 512 E for cross-attention.
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
    """Forward FLOPs of one sample (docs/reference/wan.md#cost)."""
    tokens, width, hidden, text = layout.num_tokens, config.dim, config.ffn_dim, config.text_len
    linear = tokens * (12 * width**2 + 4 * width * hidden) + text * 4 * width**2
    scale = config.num_layers
    pairs = visible_pairs(layout)
    return Work(scale * linear, scale * 4.0 * pairs * width, scale * 4.0 * tokens * text * width, masked=not layout.mask.is_full)


@dataclass(frozen=True)
class _Multiples:
    """A pass in units of one forward: linear layers and cross-attention; self-attention forward and backward; elementwise traffic;
    exchanges of context parallelism; launches.
    """

    linear: float
    attention: float
    backward: float
    rows: float
    exchanges: float
    launches: float


def _multiples(net: NetPlan, step: Pass, layout: TokenLayout) -> _Multiples:
    if step.mode == "infer":
        return _Multiples(1, 1, 0, 1, 1, 1)
    if step.mode == "tangent":
        constant = 1 - visible_pairs(layout, first_key=layout.context_tokens) / visible_pairs(layout)
        return _Multiples(2, 3 - constant, 0, 2, 2, 1)  # attention: six products of two, four where the keys are constant
    again = net.recomputed_blocks / net.config.num_layers
    linear, attention = 3 + again * net.recompute.startswith("block_wise"), 1 + again * (net.recompute == "block_wise")
    return _Multiples(linear, attention, BACKWARD_ATTENTION, 3 + again, 2 + again, 3)


def pass_flops(job: Job, step: Pass) -> float:
    """FLOPs of a pass on all ranks of a context group, one micro-batch: recomputation included."""
    net, total = job.net(step.role), 0.0
    for layout, count in step.runs():
        work, times = forward_work(net.config, layout), _multiples(net, step, layout)
        attention = times.attention + times.backward
        total += count * job.batch * (times.linear * (work.linear + work.cross) + attention * work.attention)
    return total


def pass_seconds(job: Job, card: Card, step: Pass) -> float:
    """Seconds of a pass for one micro-batch: the slower of arithmetic and communication that it hides, plus the exchanges it cannot."""
    net = job.net(step.role)
    config, total, share = net.config, 0.0, job.batch / job.context
    rate = card.attention_tangent if step.mode == "tangent" else card.attention
    for layout, count in step.runs():
        work, times = forward_work(config, layout), _multiples(net, step, layout)
        attention = work.attention / (card.masked if work.masked else 1.0)
        seconds = share * times.linear * (work.linear / card.matmul + work.cross / card.attention)
        seconds += share * attention * (times.attention / rate + times.backward / card.attention_backward)
        # norms, rotations, gates and GELU
        rows = share * layout.num_tokens * (ELEMENTWISE_ROWS * config.dim + 2 * config.ffn_dim)
        seconds += times.rows * config.num_layers * rows * job.compute_bytes / card.bandwidth
        seconds = max(seconds, times.launches * config.num_layers * card.launch)
        exchanging = times.exchanges * _exchanging(job, card, net, layout)
        total += count * (max(seconds, _gathering(job, card, net, step)) + exchanging)
    return total


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


def _exchanging(job: Job, card: Card, net: NetPlan, layout: TokenLayout) -> float:
    """Ulysses, of one forward: q, k, v and the result cross the group in every block."""
    rows = 4 * job.batch * layout.num_tokens / job.context * (job.context - 1) / job.context
    return rows * net.config.dim * job.compute_bytes * net.config.num_layers / (card.link if job.context <= card.node else card.network)


def update_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """AdamW reads four and writes three numbers per parameter, the EMA reads two and writes one."""
    net = job.net(phase.role)
    stored = net.elements(shard=job.shard_ranks if job.is_sharded(net) else 1)
    return stored * job.param_bytes * (7 + (3 if net.averaged else 0)) / card.bandwidth


def phase_seconds(job: Job, card: Card, phase: PhasePlan) -> float:
    """Seconds of one iteration of this kind, all micro-batches and the update."""
    return job.accumulation * sum(pass_seconds(job, card, step) for step in phase.passes) + update_seconds(job, card, phase)
