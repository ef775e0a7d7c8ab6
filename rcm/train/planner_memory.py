"""How many bytes a job needs on rank 0, term by term; every term says where it comes from.

Counted is what `torch.cuda.max_memory_allocated` counts. The numbers of tensors per block were read
off `rcm.nets.wan.block` and its kernels, and are held to allocations of the real networks on the
meta device by `tests/train/test_planner_memory.py`. Letters: E width, H hidden width of the MLP,
L tokens of a rank (those of all packed frames / context-parallel size).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from rcm.nets.layout import TokenLayout
from rcm.train.kept_adamw import BUCKET
from rcm.train.planner_job import Job, NetPlan, Pass, PhasePlan

LATENT_TENSORS = 8
"""Float32 tensors of the size of the latents that are alive in a loss: data, noise, times them,
velocities, targets, float64 sums.
"""

# with the fused kernels, with torch's own formulas (norms keep float32 copies, and their rows)
ROWS = {
    # what one block keeps for its backward pass, its input not counted
    "saved": ((16, 2), (27, 2)),
    # its input and the results of matrix products and both attentions
    "mm_only": ((10, 1), (10, 1)),
    # its input, the results of self-attention and MLP
    "block_wise_keep_attention_mlp": ((3, 0), (3, 0)),
    "block_wise_keep_attention": ((2, 0), (2, 0)),  # its input and the result of self-attention
    "block_wise": ((1, 0), (1, 0)),  # its input
    # recomputed and back-propagated, in the MLP's second product: all that is saved, the gradients
    # of the block's output and of the MLP's, and that of the hidden rows; its input not counted
    "backward": ((18, 3), (29, 3)),
    # without gradient: in the MLP (input, residual stream, attention's result, normalised rows,
    # hidden rows twice), and at the end of self-attention (input, normalised rows, q, k, v, rotated
    # q and k, result); the same two with tangents
    "infer": ((4, 2), (4, 2)),
    "infer attention": ((8, 0), (11, 0)),
    "tangent": ((12.5, 4), (20, 2)),
    "tangent attention": ((24, 0), (30, 0)),
    "exchange": ((9, 0), (9, 0)),  # Ulysses: q, k, v put together, cut for sending, and received
}
"""Tensors of a block that are alive at its fullest moments: E-wide and H-wide rows per token."""

ROUNDING = {"float32": 0, "bfloat16": 16, "int8": 64, "float8": 16}
"""Bytes per number of the largest tensor while a moment is rounded, by its form."""

TANGENT_KEYS = 7
"""E-wide rows per cached token of attention with tangents."""


@dataclass(frozen=True)
class Term:
    """A share of the memory: bytes on rank 0, and what they are."""

    name: str
    bytes: float
    what: str


def state_terms(job: Job) -> list[Term]:
    """What is there all the time: weights, unless they come and go, optimiser states and averages,
    unless they live on the host (`rcm.train.state`).
    """
    terms = []
    for net in job.nets:
        lives = net.trained and job.host_parameters
        terms += [] if job.idle_roles or lives else weight_terms(job, net)
        if not net.trained or job.host_states or lives:
            continue
        told = "" if net.states == "float32" else f" in {net.states}"
        adam = f"AdamW: first and second moment of every parameter{told}"
        terms.append(Term(f"{net.role} optimiser", moment_bytes(job, net), adam))
        if net.averaged:
            average = average_bytes(job, net)
            terms.append(Term(f"{net.role} average", average, "EMA: a float32 copy of the shards"))
    return terms + [head_term(job, net) for net in job.nets if net.head]


def head_term(job: Job, net: NetPlan) -> Term:
    """A discriminator's head, spread as its network is."""
    count = -(-net.head // max(1, job.shards_of(net)))
    size = job.param_bytes * count * (1 if job.host_states else 3)
    return Term(f"{net.role} discriminator", size, "its head: parameters and moments")


def host_bytes(job: Job) -> float:
    """What rank 0 keeps in host memory."""
    size = 0.0
    for net in job.nets:
        lives = net.trained and job.host_parameters
        if job.idle_roles or lives:
            size += sum(term.bytes for term in weight_terms(job, net))
        if lives or (job.host_states and net.trained):
            size += moment_bytes(job, net) + average_bytes(job, net) * net.averaged
    if job.host_parameters:  # gradients, of one role at a time
        size += job.reduce_bytes * max(job.trained(net) for net in job.nets if net.trained)
    return size


def moment_bytes(job: Job, net: NetPlan) -> float:
    """Both moments of a trained network on rank 0."""
    return net.moment_bytes(shard=max(1, job.shards_of(net)), wide=job.param_bytes)


def average_bytes(job: Job, net: NetPlan) -> float:
    """An average on rank 0."""
    return float(max(4, job.param_bytes) * job.trained(net))


def weight_terms(job: Job, net: NetPlan) -> list[Term]:
    """Weights of one network, or its adapters and the base that they lie on."""
    terms, shards = [], job.shards_of(net)
    part = f"1/{shards} of " if shards > 1 else ""
    if not net.base and (net.rank or not net.trained):
        form = "blocks in e4m3" if job.is_rounded(net) else "in the compute dtype"
        what = f"{part}{net.elements():,} parameters, frozen, {form}"
        size = job.compute_size(net, shard=max(1, shards))
        terms.append(Term(f"{net.role} weights", size, what))
    if net.trained:
        name, kind = (
            ("adapters", f"parameters of rank {net.rank}")
            if net.rank
            else ("weights", "master parameters")
        )
        size = float(job.param_bytes * job.trained(net))
        terms.append(Term(f"{net.role} {name}", size, f"{part}{net.trained_elements():,} {kind}"))
    return terms


def present_terms(job: Job, phase: PhasePlan, role: str) -> list[Term]:
    """Weights that are there while `role` computes, where others wait on the host: its own, and
    those of the role in training.
    """
    present = {phase.role, role} if job.idle_roles else set()
    if job.host_parameters:
        present -= {net.role for net in job.nets if net.trained}
    return [term for net in job.nets if net.role in present for term in weight_terms(job, net)]


def update_terms(job: Job, phase: PhasePlan) -> list[Term]:
    """Everything beside the states in an update whose moments are opened bucket by bucket
    (`rcm.train.kept_adamw`); nothing where AdamW works in place.
    """
    net = job.net(phase.role)
    if job.host_parameters or (not job.host_states and net.states == "float32"):
        return []
    count, largest = job.trained(net), net.largest / max(1, job.shards_of(net))
    bucket = min(count, max(BUCKET, largest))
    opened = 0 if net.states == "float32" else 2 * job.param_bytes * bucket
    rounding = ROUNDING[net.states] * min(largest, bucket)
    visitors = min(3 * bucket, count) if job.host_states else 0  # as `rcm.parallel.host.passing`
    visiting = visitors * moment_bytes(job, net) / count
    gradients = float((job.reduce_bytes if job.shards_of(net) else job.param_bytes) * count)
    return [
        *present_terms(job, phase, phase.role),
        Term("gradients", gradients, "reduced"),
        Term("moments", visiting + opened + rounding, "of the numbers that are updated at once"),
    ]


class PassMemory:
    """Bytes of one pass of a job, beside the states."""

    def __init__(self, job: Job, step: Pass) -> None:
        self.job, self.step, self.net = job, step, job.net(step.role)
        self.config = self.net.config
        self.row = job.batch * job.compute_bytes / job.context  # of one value per token
        self.exchanged = job.context > 1

    def rows(self, layout: TokenLayout, moment: str) -> float:
        """Of the rows that `ROWS` names."""
        e_rows, h_rows = ROWS[moment][0 if self.job.fused else 1]
        return (
            layout.num_tokens * self.row * (e_rows * self.config.dim + h_rows * self.config.ffn_dim)
        )

    def joined_keys(self, layout: TokenLayout) -> float:
        """Cached and own keys and values put together for attention; no copy without a cache."""
        keys = layout.num_tokens + layout.context_tokens if layout.context_tokens else 0
        return 2 * keys * self.row * self.config.dim

    def stored(self, layout: TokenLayout, block: int) -> float:
        """What a block keeps of a forward with gradient, by its recompute mode."""
        if self.net.is_recomputed(block):
            return self.rows(layout, self.net.recompute)
        return (
            self.rows(layout, "block_wise") + self.rows(layout, "saved") + self.joined_keys(layout)
        )

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
        copies = (
            4 * 7 * self.config.dim**2 if self.job.compute_bytes < 4 and not self.net.rank else 0
        )
        text = self.config.text_len * (self.config.text_dim + 3 * self.config.dim)
        return copies + self.job.batch * text * self.job.compute_bytes

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

    def forward(self, layout: TokenLayout) -> float:
        """Fullest moment inside one block without gradient."""
        mode = self.step.mode
        attention, exchange = self.rows(layout, f"{mode} attention"), self.rows(layout, "exchange")
        if mode == "infer":
            attention += self.joined_keys(layout)
        else:
            attention += TANGENT_KEYS * layout.context_tokens * self.row * self.config.dim
        inside = max(self.rows(layout, mode), attention) + self.rounded(layout)
        return inside + self.exchanged * exchange + self.tables(layout)

    def rounded(self, layout: TokenLayout) -> float:
        """Of a network in e4m3: a layer's weight made wide, or its input rounded."""
        if not self.job.is_rounded(self.net):
            return 0.0
        if self.job.frozen_weights == "fp8_storage":
            return float(self.job.compute_bytes * self.config.dim * self.config.ffn_dim)
        rows = self.job.batch * layout.num_tokens / self.job.context
        return rows * (self.config.ffn_dim + 4)

    def backward(self, layout: TokenLayout) -> float:
        """One block's input, what it saves, and its gradients on the way, under context
        parallelism to other ranks.
        """
        rows = (1 + 2 * self.exchanged) * self.rows(layout, "block_wise")
        return rows + self.rows(layout, "backward") + self.joined_keys(layout)

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


def gathered_terms(job: Job, phase: PhasePlan) -> list[Term]:
    """Parameters that FSDP2 has gathered, of the phase's largest network."""
    nets = [job.net(role) for role in {step.role for step in phase.passes}]
    sizes = [
        job.compute_size(net, blocks=2)
        + job.compute_bytes * (2 * bool(net.rank) * net.trained_block + net.elements(part="root"))
        + arriving(job, net)
        for net in nets
        if job.shards_of(net)
    ]
    what = "FSDP2: a block in use, the next one arriving, and what lies outside the blocks"
    return [Term("gathered parameters", max(sizes), what)] if sizes else []


def arriving(job: Job, net: NetPlan) -> float:
    """Shards of two blocks on their way from the host, as they are stored there."""
    lives = net.trained and job.host_parameters
    return 2.0 * lives * job.param_bytes * net.block_elements / max(1, job.shards_of(net))


def gradient_terms(job: Job, phase: PhasePlan, *, earlier: bool) -> tuple[float, float, float]:
    """Bytes of gradients: before a pass's backward, when it reaches the first block, and for a
    moment in every block. `earlier`: terms came before.

    Reduced: shards in the reduce dtype, at once with `gradient_sync` "each". Held back until the
    last of several terms or micro-batches: whole, in the reduce dtype, on every rank ("last"). For
    a moment: the block before, on its way to the other ranks in the reduce dtype.
    """
    net, shards = job.net(phase.role), job.shards_of(job.net(phase.role))
    root = 0 if net.rank else net.elements(part="root")
    reached = 1 - (net.trained_block + root) / net.trained_elements()
    several = phase.terms * job.accumulation > 1
    waiting = several and (earlier or job.accumulation > 1)
    own = float((job.reduce_bytes if shards else job.param_bytes) * job.trained(net))
    own *= not job.host_parameters
    moment = float(job.reduce_bytes * net.trained_block) if shards else 0.0
    if shards and several and job.gradient_sync != "each":
        whole = float(job.reduce_bytes * net.trained_elements())
        return waiting * whole, (whole if shards == 1 else whole + reached * own), moment
    return (own, own, moment) if waiting else (0.0, reached * own, moment)


def pass_terms(job: Job, phase: PhasePlan, step: Pass) -> list[Term]:
    """Everything beside the states at the fullest moment of `step`."""
    memory = PassMemory(job, step)
    latents = float(LATENT_TENSORS * 4 * job.batch * job.latent_elements)
    told = "samples, noise, velocities and targets of the loss"
    terms = [*gathered_terms(job, phase), *memory.held(), Term("latents", latents, told)]
    before_step = takewhile(lambda other: other is not step, phase.passes)
    earlier = any(other.mode == "train" and not other.inputs for other in before_step)
    before, after, moment = gradient_terms(job, phase, earlier=earlier)
    if step.inputs:
        after, moment = before, 0.0
    if step.mode != "train":
        how = "reduced" if job.gradient_sync == "each" else "whole and unreduced"
        inside, running = (
            max(map(memory.forward, step.layouts)),
            "rows of the block that is running",
        )
        kept = [Term("gradients", before, f"of earlier terms, {how}")] if before else []
        return [*terms, *kept, Term(f"inside a block ({step.mode})", inside, running)]
    largest = max(step.layouts, key=lambda layout: layout.num_tokens)
    graph, around = memory.graph(), memory.around()
    block, head = memory.backward(largest), memory.head(largest)
    rest = graph - memory.stored(largest, memory.config.num_layers - 1) + around - head
    moments = {  # what is kept, what is inside a block, gradients
        "before the backward pass": (graph + around, head, before),
        "in the backward of the last block": (rest, block, before + moment),
        "in the backward of the first block": (memory.embeddings(), block, after + moment),
    }
    when, (kept_bytes, inside, grads) = max(moments.items(), key=lambda item: sum(item[1]))
    whole = before and job.gradient_sync == "last"
    how = (
        "held whole until the last term is reduced"
        if whole
        else "reduced shards and those on their way"
    )
    return [
        *terms,
        Term(
            "stored for the backward pass", kept_bytes, f"recompute={memory.net.recompute}, {when}"
        ),
        Term(
            "inside a block (train)",
            inside + memory.tables(largest),
            "one block recomputed and back-propagated",
        ),
        Term("gradients", grads, how),
    ]
