"""How many bytes a job needs on rank 0: tables of what is stored, and one evaluator.

Counted is what `torch.cuda.max_memory_allocated` counts. `ROWS` was read off `rcm.nets.wan.block`
and its kernels, and is held to allocations of the real networks on the meta device by
`tests/train/test_planner_memory.py`. Letters: E width, H hidden width of the MLP, L tokens of a
rank (those of all packed frames / context-parallel size).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

from rcm.nets.layout import TokenLayout
from rcm.train.kept_adamw import BUCKET
from rcm.train.planner_job import Job, NetPlan, Numbers, Pass, PhasePlan, numbers

LATENT_TENSORS = 8
"""Float32 tensors of the size of the latents that are alive in a loss: data, noise, times them,
velocities, targets, float64 sums.
"""


class Rows(NamedTuple):
    """Values of a block that are alive at a moment: rows per token, E and H wide; E-wide rows per
    cached token; and, where there is a cache, per cached and own token put together.
    """

    wide: float
    hidden: float
    cached: int = 0
    joined: int = 0


ROWS = {
    # kept for the backward pass by a block that is not recomputed: its input and all that it saves
    "none": (Rows(17, 2, joined=2), Rows(28, 2, joined=2)),
    # by one that is: its input, with the results of matrix products and both attentions; of
    # self-attention and MLP; of self-attention
    "mm_only": (Rows(10, 1), Rows(10, 1)),
    "block_wise_keep_attention_mlp": (Rows(3, 0), Rows(3, 0)),
    "block_wise_keep_attention": (Rows(2, 0), Rows(2, 0)),
    "block_wise": (Rows(1, 0), Rows(1, 0)),
    # recomputed and back-propagated, in the MLP's second product: all that is kept, the gradients
    # of the block's output and of the MLP's, and that of the hidden rows
    "train": (Rows(19, 3, joined=2), Rows(30, 3, joined=2)),
    # without gradient: in the MLP (input, residual stream, normalised rows, hidden rows twice), and
    # at the end of self-attention (input, normalised rows, q, k, v, rotated q and k, result, joined
    # keys and values); the same two with tangents
    "infer": (Rows(3, 2), Rows(3, 2)),
    "infer attention": (Rows(8, 0, joined=2), Rows(11, 0, joined=2)),
    "tangent": (Rows(10.5, 4), Rows(18, 2)),
    "tangent attention": (Rows(24, 0, cached=7), Rows(30, 0, cached=7)),
    # Ulysses: q, k, v put together, cut for sending, and received; their gradients
    "exchange": (Rows(9, 0), Rows(9, 0)),
    "train exchange": (Rows(2, 0), Rows(2, 0)),
}
"""With the fused kernels, and with torch's own formulas (norms keep float32 copies, and their
rows).
"""

ROUNDING = {"float32": 0, "bfloat16": 16, "int8": 64, "float8": 16}
"""Bytes per number of the largest tensor while a moment is rounded, by its form."""

Place = Literal["card", "turn", "host"]
"""Where something is: always on the card, there when its role computes, in host memory."""


@dataclass(frozen=True)
class Term:
    """A share of the memory: bytes on rank 0, and what they are."""

    name: str
    bytes: float
    what: str


def holdings(job: Job, net: NetPlan) -> list[tuple[Place, Term]]:
    """What a role holds for the whole run, and where (`rcm.train.state`)."""
    shards, lives = job.shard_ranks, job.lives_on_host(net)
    stored, trained = job.stored(net), job.trained(net)
    weights: Place = "host" if lives else "turn" if job.idle_roles else "card"
    states: Place = "host" if lives or job.host_states else "card"
    part = f"1/{shards} of " if shards > 1 else ""
    found: list[tuple[Place, Term]] = []

    def hold(place: Place, name: str, size: float, what: str) -> None:
        found.append((place, Term(f"{net.role} {name}", float(size), what)))

    if not net.base and (net.rank or not net.trained):
        form = "blocks in e4m3" if job.is_rounded(net) else "in the compute dtype"
        what = f"{part}{net.elements():,} parameters, frozen, {form}"
        hold(weights, "weights", compute_size(job, net, stored.all, of=stored), what)
    if net.trained:
        name = "adapters" if net.rank else "weights"
        kind = f"parameters of rank {net.rank}" if net.rank else "master parameters"
        what = f"{part}{net.trained_elements():,} {kind}"
        hold(weights, name, job.param_bytes * trained, what)
        form = "" if net.states == "float32" else f" in {net.states}"
        what = f"AdamW: first and second moment of every parameter{form}"
        hold(states, "optimiser", moment_bytes(job, net), what)
    if net.trained and net.averaged:
        what = "EMA: a float32 copy of the shards"
        hold(states, "average", max(4, job.param_bytes) * trained, what)
    if net.head:  # on the card, but for its moments
        size = job.param_bytes * -(-net.head // shards) * (1 if job.host_states else 3)
        hold("card", "discriminator", size, "its head: parameters and moments")
    return found


def held_terms(job: Job, place: Place, roles: set[str] | None = None) -> list[Term]:
    """What `roles` (None: all) hold at `place`."""
    nets = [net for net in job.nets if roles is None or net.role in roles]
    return [term for net in nets for where, term in holdings(job, net) if where == place]


def total(terms: Iterable[Term]) -> float:
    """Their bytes."""
    return sum(term.bytes for term in terms)


def host_bytes(job: Job) -> float:
    """What rank 0 keeps in host memory; FSDP2's copies of gradients in pinned memory of torch's."""
    living = [net for net in job.nets if job.lives_on_host(net)]
    gradients = [job.reduce_bytes * job.stored(net).powers for net in living]
    states = total([*held_terms(job, "host"), *held_terms(job, "turn")])
    return states + max(gradients, default=0)


def compute_size(job: Job, net: NetPlan, count: int, *, of: Numbers) -> float:
    """Bytes of `count` parameters as frozen networks are stored and as FSDP2 gathers any, with all
    that are rounded `of` these.
    """
    size = float(job.compute_bytes * count)
    return size + ((1 - job.compute_bytes) * of.rounded + 4 * of.rows) * job.is_rounded(net)


def moment_bytes(job: Job, net: NetPlan) -> float:
    """Both moments of a trained network on rank 0."""
    of = net.trained_numbers(shard=job.shard_ranks)
    if net.states in ("float32", "bfloat16"):
        return 2.0 * of.all * (job.param_bytes if net.states == "float32" else 2)
    return 2.0 * (of.coded + 4 * of.scales + job.param_bytes * (of.all - of.coded))


def update_terms(job: Job, phase: PhasePlan) -> list[Term]:
    """Everything beside the states in an update whose moments are opened bucket by bucket
    (`rcm.train.kept_adamw`); nothing where AdamW works in place.
    """
    net = job.net(phase.role)
    if job.host_parameters or (not job.host_states and net.states == "float32"):
        return []
    count = job.trained(net)
    largest = numbers(net.config).largest / job.shard_ranks
    bucket = min(count, max(BUCKET, largest))
    opened = 0 if net.states == "float32" else 2 * job.param_bytes * bucket
    rounding = ROUNDING[net.states] * min(largest, bucket)
    visitors = min(3 * bucket, count) if job.host_states else 0  # as `rcm.parallel.host.passing`
    visiting = visitors * moment_bytes(job, net) / count
    gradients = float((job.reduce_bytes if job.is_wrapped(net) else job.param_bytes) * count)
    return [
        *held_terms(job, "turn", {phase.role}),
        Term("gradients", gradients, "reduced"),
        Term("moments", visiting + opened + rounding, "of the numbers that are updated at once"),
    ]


class PassMemory:
    """Bytes of one pass of a job, beside the states."""

    def __init__(self, job: Job, step: Pass) -> None:
        self.job, self.step, self.net = job, step, job.net(step.role)
        self.config = self.net.config
        self.row = job.batch * job.compute_bytes / job.context  # of one value per token

    def rows(self, layout: TokenLayout, moment: str) -> float:
        """Of a moment in `ROWS`; of an exchange under context parallelism alone."""
        if "exchange" in moment and self.job.context == 1:
            return 0.0
        of = ROWS[moment][0 if self.job.fused else 1]
        tokens, cached = layout.num_tokens, layout.context_tokens
        wide = of.wide * tokens + of.cached * cached + of.joined * (tokens + cached) * bool(cached)
        return self.row * (wide * self.config.dim + of.hidden * tokens * self.config.ffn_dim)

    def stored(self, layout: TokenLayout, block: int) -> float:
        """What a block keeps of a forward with gradient, by its recompute mode."""
        recomputed = self.net.is_recomputed(block)
        return self.rows(layout, self.net.recompute if recomputed else "none")

    def graph(self) -> float:
        """What all blocks keep of all layouts until the backward pass."""
        count = self.config.num_layers
        return sum(
            self.stored(layout, block)
            for index, layout in enumerate(self.step.layouts)
            for block in range(self.step.runs(index, count))
        )

    def embeddings(self) -> float:
        """Kept by every forward with gradient: float32 copies of the time embedding's matrices
        (7 E^2) if they are trained, and the embedded text.
        """
        copied = self.job.compute_bytes < 4 and not self.net.rank
        text = self.config.text_len * (self.config.text_dim + 3 * self.config.dim)
        return 28 * copied * self.config.dim**2 + self.job.batch * text * self.job.compute_bytes

    def head(self, layout: TokenLayout) -> float:
        """Kept for the head: the last block's rows, and for the predicted frames their normalised
        rows in float32 if it is trained.
        """
        frames = 0 if self.net.rank else layout.num_output_frames
        tokens = frames * layout.tokens_per_frame * self.job.batch / self.job.context
        return self.rows(layout, "block_wise") + 4 * tokens * self.config.dim

    def around(self) -> float:
        """What lies around the blocks until the backward pass."""
        return sum(self.embeddings() + self.head(layout) for layout in self.step.layouts)

    def tables(self, layout: TokenLayout) -> float:
        """Rotary tables of all tokens in float32: cosines and sines, per channel and (fused) per
        pair; the same for all layers.
        """
        return 4 * layout.num_tokens * (3 if self.job.fused else 2) * self.config.head_dim

    def rounded(self, layout: TokenLayout) -> float:
        """Of a network in e4m3: a layer's weight made wide, or its input rounded."""
        if not self.job.is_rounded(self.net):
            return 0.0
        if self.job.frozen_weights == "fp8_storage":
            return float(self.job.compute_bytes * self.config.dim * self.config.ffn_dim)
        tokens = self.job.batch * layout.num_tokens / self.job.context
        return tokens * (self.config.ffn_dim + 4)

    def inside(self, layout: TokenLayout) -> float:
        """Fullest moment inside one block: of its forward, or of its backward pass."""
        mode = self.step.mode
        if mode == "train":
            return self.rows(layout, mode) + self.rows(layout, "train exchange")
        fullest = max(self.rows(layout, mode), self.rows(layout, f"{mode} attention"))
        return fullest + self.rounded(layout) + self.rows(layout, "exchange") + self.tables(layout)

    def held(self) -> list[Term]:
        """What other passes left in memory."""
        terms, frames = [], self.step.cached
        if frames:
            config = self.job.net("student").config
            keys = frames * self.step.layouts[0].tokens_per_frame
            what = f"keys and values of {frames} latent frames in {config.num_layers} layers"
            size = 2 * keys * self.row * config.dim * config.num_layers
            terms.append(Term("key-value cache", size, what))
        if (other := self.step.beside) is not None:
            memory = PassMemory(self.job, other)
            size = memory.graph() + memory.around()
            terms.append(Term(f"stored by {other.name}", size, "kept until its backward pass"))
        return terms


def gathered_terms(job: Job, phase: PhasePlan, step: Pass) -> list[Term]:
    """Parameters that FSDP2 has gathered: of the phase's largest network, and the whole student
    where it stays gathered, until the backward passes of others.
    """
    what = "FSDP2: a block in use, the next one arriving, and what lies outside the blocks"
    nets = [job.net(role) for role in {step.role for step in phase.passes}]
    sizes = [gathered_bytes(job, net) for net in nets if job.is_wrapped(net)]
    terms = [Term("gathered parameters", max(sizes), what)] if sizes else []
    if job.rolls_gathered(phase) and "student" in (phase.role, step.role):
        net = job.net("student")
        others, of = max(0, 1 - 2 / net.config.num_layers), numbers(net.config)
        size = compute_size(job, net, math.ceil(others * of.blocks), of=of)
        size += job.compute_bytes * others * job.adapter_elements(net)
        terms.append(Term("student kept gathered", size, "its other blocks, for a rollout"))
    return terms


def gathered_bytes(job: Job, net: NetPlan) -> float:
    """Two blocks, with all adapters on them, and what lies outside them; from the host, shards of
    two as they are stored.
    """
    of, count = numbers(net.config), min(2, net.config.num_layers)
    arriving = count * job.param_bytes * net.block_elements / job.shard_ranks
    whole = compute_size(job, net, of.blocks, of=of)
    whole += job.compute_bytes * job.adapter_elements(net)
    root = job.compute_bytes * (of.all - of.blocks)
    return whole * count / net.config.num_layers + root + arriving * job.lives_on_host(net)


def gradient_terms(job: Job, phase: PhasePlan, *, earlier: bool) -> tuple[float, float, float]:
    """Bytes of gradients: before a pass's backward, when it reaches the first block, and for a
    moment in every block. `earlier`: terms came before.

    Reduced: shards in the reduce dtype, at once with `gradient_sync` "each". Held back until the
    last of several terms or micro-batches: whole, in the reduce dtype, on every rank ("last"). For
    a moment: the block before, on its way to the other ranks in the reduce dtype.
    """
    net = job.net(phase.role)
    wrapped, several = job.is_wrapped(net), phase.terms * job.accumulation > 1
    of = numbers(net.config)
    root = 0 if net.rank else of.all - of.blocks
    reached = 1 - (net.trained_block + root) / net.trained_elements()
    waiting = several and (earlier or job.accumulation > 1)
    own = float((job.reduce_bytes if wrapped else job.param_bytes) * job.trained(net))
    own *= not job.host_parameters
    moment = float(job.reduce_bytes * net.trained_block) if wrapped else 0.0
    if wrapped and several and job.gradient_sync != "each":
        whole = float(job.reduce_bytes * net.trained_elements())
        return waiting * whole, whole + (job.shard_ranks > 1) * reached * own, moment
    return (own, own, moment) if waiting else (0.0, reached * own, moment)


def pass_terms(job: Job, phase: PhasePlan, step: Pass) -> list[Term]:
    """Everything beside the states at the fullest moment of `step`."""
    memory = PassMemory(job, step)
    latents = float(LATENT_TENSORS * 4 * job.batch * job.latent_elements)
    before_step = takewhile(lambda other: other is not step, phase.passes)
    earlier = any(other.mode == "train" and not other.inputs for other in before_step)
    before, after, moment = gradient_terms(job, phase, earlier=earlier)
    largest = max(step.layouts, key=lambda layout: layout.num_tokens)
    terms = [
        *held_terms(job, "turn", {phase.role, step.role}),
        *gathered_terms(job, phase, step),
        *memory.held(),
        Term("latents", latents, "samples, noise, velocities and targets of the loss"),
    ]
    if step.mode != "train":
        how = "reduced" if job.gradient_sync == "each" else "whole and unreduced"
        inside = max(map(memory.inside, step.layouts))
        what = "rows of the block that is running"
        kept = [Term("gradients", before, f"of earlier terms, {how}")] if before else []
        return [*terms, *kept, Term(f"inside a block ({step.mode})", inside, what)]
    if step.inputs:
        after, moment = before, 0.0
    graph, around = memory.graph(), memory.around()
    block, head = memory.inside(largest), memory.head(largest)
    rest = graph - memory.stored(largest, memory.config.num_layers - 1) + around - head
    moments = {  # what is kept, what is inside a block, gradients
        "before the backward pass": (graph + around, head, before),
        "in the backward of the last block": (rest, block, before + moment),
        "in the backward of the first block": (memory.embeddings(), block, after + moment),
    }
    when, (kept_bytes, inside, gradients) = max(moments.items(), key=lambda item: sum(item[1]))
    inside += memory.tables(largest)
    stored = f"recompute={memory.net.recompute}, {when}"
    how = "reduced shards and those on their way"
    if before and job.gradient_sync == "last":
        how = "held whole until the last term is reduced"
    return [
        *terms,
        Term("stored for the backward pass", kept_bytes, stored),
        Term("inside a block (train)", inside, "one block recomputed and back-propagated"),
        Term("gradients", gradients, how),
    ]
