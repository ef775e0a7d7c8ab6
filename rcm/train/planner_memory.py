"""How many bytes a job needs on rank 0, term by term; every term says where it comes from.

Counted is what `torch.cuda.max_memory_allocated` counts. The numbers of tensors per block were read off `rcm.nets.wan.block` and its
kernels, and are held to allocations of the real networks on the meta device by `tests/train/test_planner_memory.py`.
Letters: E width, H hidden width of the MLP, L tokens of a rank (those of all packed frames / context-parallel size).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from rcm.nets.layout import TokenLayout
from rcm.train.planner_job import Job, Pass, PhasePlan

LATENT_TENSORS = 8
"""Float32 tensors of the size of the latents that are alive in a loss: data, noise, times them, velocities, targets, float64 sums."""


@dataclass(frozen=True)
class Term:
    """A share of the memory: bytes on rank 0, and what they are."""

    name: str
    bytes: float
    what: str


@dataclass(frozen=True)
class BlockTensors:
    """How many tensors of a block are alive at its fullest moments, in E-wide and H-wide rows per token of the compute dtype.

    saved       what one block keeps for its backward pass, its input not counted.
    products    of these, the outputs of matrix products and of both attentions: what mm_only keeps.
    backward    the fullest moment of recomputing and back-propagating one block, its input not counted: in the backward of the MLP's
                second product, all that is saved, the gradients of the block's output and of the MLP's, and that of the hidden rows.
    infer       without gradient, in the MLP: input, residual stream, attention's result, normalised rows; hidden rows twice.
    attention   without gradient, at the end of self-attention: input, normalised rows, q, k, v, rotated q and k, result (E-wide).
    tangent, tangent_attention   the same two moments with tangents; the second grows by `tangent_keys` per row of cached keys.
    """

    saved: tuple[float, float]
    products: tuple[float, float]
    backward: tuple[float, float]
    infer: tuple[float, float]
    attention: float
    tangent: tuple[float, float]
    tangent_attention: float
    tangent_keys: float


FUSED = BlockTensors(
    saved=(16, 2), products=(9, 1), backward=(18, 3), infer=(4, 2), attention=8, tangent=(12.5, 4), tangent_attention=24, tangent_keys=7
)
"""With the fused kernels: a norm keeps its input alone, a rotation nothing."""

PLAIN = BlockTensors(
    saved=(27, 2), products=(9, 1), backward=(29, 3), infer=(4, 2), attention=11, tangent=(20, 2), tangent_attention=30, tangent_keys=7
)
"""With torch's own formulas as on the CPU: norms keep float32 copies of q and k and the normalised rows."""


def state_terms(job: Job) -> list[Term]:
    """What is there all the time: weights, optimiser states, averages (`rcm.train.state`)."""
    terms = []
    for net in job.nets:
        shard = job.shard_ranks if job.is_sharded(net) else 1
        stored = net.elements(shard=shard)
        place = f"1/{shard} of {net.elements():,}" if shard > 1 else f"{net.elements():,}"
        if not net.trained:
            terms.append(Term(f"{net.role} weights", job.compute_bytes * stored, f"{place} parameters, frozen, in the compute dtype"))
            continue
        terms.append(Term(f"{net.role} weights", job.param_bytes * stored, f"{place} master parameters"))
        terms.append(Term(f"{net.role} optimiser", 2 * job.param_bytes * stored, "AdamW: first and second moment of every parameter"))
        if net.averaged:
            terms.append(Term(f"{net.role} average", max(4, job.param_bytes) * stored, "EMA: a float32 copy of the shards"))
    return terms


class PassMemory:
    """Bytes of one pass of a job, beside the states."""

    def __init__(self, job: Job, step: Pass) -> None:
        self.job, self.step, self.net = job, step, job.net(step.role)
        self.tensors = FUSED if job.fused else PLAIN

    def tokens(self, layout: TokenLayout) -> float:
        """Packed tokens of this rank, all samples."""
        return self.job.batch * layout.num_tokens / self.job.context

    def rows(self, layout: TokenLayout, e_rows: float, h_rows: float = 0.0) -> float:
        """Bytes of that many E-wide and H-wide rows per token."""
        config = self.net.config
        return self.tokens(layout) * self.job.compute_bytes * (e_rows * config.dim + h_rows * config.ffn_dim)

    def joined_keys(self, layout: TokenLayout) -> float:
        """Cached and own keys and values put together for one block's attention; no copy without a cache."""
        if not layout.context_tokens:
            return 0.0
        keys = layout.num_tokens + layout.context_tokens
        return 2 * self.job.batch * keys / self.job.context * self.job.compute_bytes * self.net.config.dim

    def stored(self, layout: TokenLayout, block: int) -> float:
        """What a block keeps of a forward with gradient: its input, and by recompute mode nothing, self-attention's result, all products,
        or everything.
        """
        if not self.net.is_recomputed(block):
            return self.rows(layout, 1 + self.tensors.saved[0], self.tensors.saved[1]) + self.joined_keys(layout)
        products, hidden = self.tensors.products
        kept = {"block_wise": (1,), "block_wise_keep_attention": (2,), "mm_only": (1 + products, hidden)}
        return self.rows(layout, *kept[self.net.recompute])

    def blocks_graph(self) -> float:
        """What all blocks keep of all layouts until the backward pass."""
        blocks = range(self.net.config.num_layers)
        return sum(self.stored(layout, block) for layout in self.step.layouts for block in blocks)

    def graph(self) -> float:
        """The same with what lies around the blocks."""
        return self.blocks_graph() + sum(self.embeddings() + self.head(layout) for layout in self.step.layouts)

    def embeddings(self) -> float:
        """Kept by every forward with gradient: float32 copies of the time embedding's matrices (7 E^2), and the embedded text."""
        config = self.net.config
        copies = 4 * 7 * config.dim**2 if self.job.compute_bytes < 4 else 0
        return copies + self.job.batch * config.text_len * (config.text_dim + 3 * config.dim) * self.job.compute_bytes

    def forward(self, layout: TokenLayout) -> float:
        """Fullest moment inside one block without gradient."""
        t = self.tensors
        if self.step.mode == "tangent":
            extra = t.tangent_keys * layout.context_tokens / layout.num_tokens
            return max(self.rows(layout, *t.tangent), self.rows(layout, t.tangent_attention + extra))
        return max(self.rows(layout, *t.infer), self.rows(layout, t.attention) + self.joined_keys(layout))

    def exchange(self, layout: TokenLayout) -> float:
        """Context parallelism: q, k, v put together, cut for sending, and received (Ulysses)."""
        return self.rows(layout, 9) if self.job.context > 1 else 0.0

    def tables(self, layout: TokenLayout) -> float:
        """Rotary tables of all tokens in float32: cosines and sines, per channel and (fused) per pair; the same for all layers."""
        return 4 * layout.num_tokens * (3 if self.job.fused else 2) * self.net.config.head_dim

    def head(self, layout: TokenLayout) -> float:
        """Kept for the head: the last block's rows, and for the predicted frames their normalised rows in float32."""
        tokens = self.job.batch * layout.num_output_frames * layout.tokens_per_frame / self.job.context
        return self.rows(layout, 1) + 4 * tokens * self.net.config.dim

    def backward(self, layout: TokenLayout) -> float:
        """One block's input, what it saves, and its gradients on the way, under context parallelism to other ranks."""
        e_rows, h_rows = self.tensors.backward
        return self.rows(layout, 1 + e_rows + (2 if self.job.context > 1 else 0), h_rows) + self.joined_keys(layout)

    def held(self) -> Iterator[Term]:
        """What other passes left in memory."""
        for thing in self.step.held:
            if thing.of is not None:
                yield Term(f"stored by {thing.of.name}", PassMemory(self.job, thing.of).graph(), "kept until its backward pass")
                continue
            config, frames = self.job.net(thing.role).config, thing.frames
            keys = self.job.batch * frames * self.step.layouts[0].tokens_per_frame / self.job.context
            size = 2 * keys * self.job.compute_bytes * config.dim * config.num_layers
            yield Term("key-value cache", size, f"keys and values of {frames} latent frames in {config.num_layers} layers")


def gathered_terms(job: Job, phase: PhasePlan) -> list[Term]:
    """Parameters that FSDP2 has gathered, of the largest network: a block in use, the next one arriving, and what lies outside blocks."""
    nets = [job.net(role) for role in {step.role for step in phase.passes} if job.is_sharded(job.net(role))]
    if not nets:
        return []
    size = max(2 * net.block_elements + net.elements(part="root") for net in nets) * job.compute_bytes
    return [Term("gathered parameters", size, "FSDP2: a block in use, the next one arriving, and what lies outside the blocks")]


def gradient_terms(job: Job, phase: PhasePlan, *, earlier: bool) -> tuple[float, float, float]:
    """Bytes of gradients: before a pass's backward, when it reaches the first block, and for a moment in every block. `earlier`: terms
    came before.

    Reduced: shards in the reduce dtype, at once with `gradient_sync` "each". Held back until the last of several terms or micro-batches:
    whole, in the reduce dtype, on every rank ("last"). For a moment: the block before, on its way to the other ranks in the reduce dtype.
    """
    net, shards = job.net(phase.role), job.shard_ranks
    reached = 1 - (net.block_elements + net.elements(part="root")) / net.elements()
    several = phase.terms * job.accumulation > 1
    waiting = several and (earlier or job.accumulation > 1)
    own, moment = float(job.param_bytes * net.elements()), 0.0
    if job.is_sharded(net):
        own, moment = float(job.reduce_bytes * net.elements(shard=shards)), float(job.reduce_bytes * net.block_elements)
        if several and job.gradient_sync != "each":
            whole = float(job.reduce_bytes * net.elements())
            return (whole if waiting else 0.0), (whole if shards == 1 else whole + reached * own), moment
    return (own, own, moment) if waiting else (0.0, reached * own, moment)


def pass_terms(job: Job, phase: PhasePlan, step: Pass) -> list[Term]:
    """Everything beside the states at the fullest moment of `step`."""
    memory = PassMemory(job, step)
    small = Term("latents", LATENT_TENSORS * 4 * job.batch * job.latent_elements, "samples, noise, velocities and targets of the loss")
    common = [*gathered_terms(job, phase), *memory.held(), small]
    follows = any(other.mode == "train" for other in takewhile(lambda other: other is not step, phase.passes))
    before, after, moment = gradient_terms(job, phase, earlier=follows)
    if step.mode != "train":
        inside = max(memory.forward(layout) + memory.exchange(layout) + memory.tables(layout) for layout in step.layouts)
        how = "reduced" if job.gradient_sync == "each" else "whole and unreduced"
        kept = [Term("gradients", before, f"of earlier terms, {how}")] if before else []
        return [*common, *kept, Term(f"inside a block ({step.mode})", inside, "rows of the block that is running")]
    largest = max(step.layouts, key=lambda layout: layout.num_tokens)
    graph, around = memory.blocks_graph(), sum(memory.embeddings() + memory.head(layout) for layout in step.layouts)
    block, head = memory.backward(largest), memory.head(largest)
    last = memory.stored(largest, memory.net.config.num_layers - 1)
    moments = {
        "before the backward pass": (graph + around, head, before),
        "in the backward of the last block": (graph - last + around - head, block, before + moment),
        "in the backward of the first block": (memory.embeddings(), block, after + moment),
    }
    unreduced = "held whole until the last term is reduced"
    when, (kept_bytes, inside, grads) = max(moments.items(), key=lambda item: sum(item[1]))
    return [
        *common,
        Term("stored for the backward pass", kept_bytes, f"recompute={memory.net.recompute}, {when}"),
        Term("inside a block (train)", inside + memory.tables(largest), "one block recomputed and back-propagated"),
        Term("gradients", grads, unreduced if before and job.gradient_sync == "last" else "reduced shards and those on their way"),
    ]
