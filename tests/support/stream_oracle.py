"""A stream computed the long way: every pass attends to a list of tokens with explicit positions,
rotated by complex numbers.

Nothing of the package's cache, rotary tables or policies is used; the network is, with keys and
queries given from outside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rcm.nets.denoiser import Denoiser, Guided, PairedView
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopePair, RopeTable


def spin(x: Tensor, where: tuple[Tensor, Tensor, Tensor], ntk: float = 1.0) -> Tensor:
    """Turn `x` [B, S, N, D] float64 to (time, row, column) [B, S] each."""
    d = x.shape[-1]
    side = 2 * (d // 6)
    turns = []
    for at, channels, ratio in zip(where, (d - 2 * side, side, side), (ntk, 1.0, 1.0), strict=True):
        base = 10000.0 * ratio ** (channels / (channels - 2))
        rate = torch.tensor([base ** (-2 * j / channels) for j in range(channels // 2)], dtype=torch.float64)
        turns.append(at.double()[..., None] * rate)
    angle = torch.cat(turns, dim=-1)[:, :, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)


@dataclass(eq=False)
class Piece:
    """A run of cached tokens of one layer: keys as stored, values, temporal positions [B, S], rows
    and columns [B, S]; `seen` now. All that one block left: its number.
    """

    k: Tensor
    v: Tensor
    t: Tensor
    row: Tensor
    col: Tensor
    seen: bool = True
    block: int | None = None

    def part(self, start: int, stop: int) -> Piece:
        parts = {name: getattr(self, name)[:, start:stop] for name in ("k", "v", "t", "row", "col")}
        return replace(self, block=None, **parts)

    def take(self, index: Tensor) -> Piece:
        """Tokens `index` [B, L]."""

        def pick(x: Tensor) -> Tensor:
            return torch.stack([x[b, index[b]] for b in range(len(x))])

        return replace(self, block=None, **{name: pick(getattr(self, name)) for name in ("k", "v", "t", "row", "col")})


def joined(pieces: list[Piece]) -> Piece:
    """One piece of several."""
    return Piece(*(torch.cat([getattr(p, name) for p in pieces], dim=1) for name in ("k", "v", "t", "row", "col")))


@dataclass
class Branch:
    """What one branch has cached, per layer a list of pieces. `turned`: keys are stored rotated to
    `t`. `codecs`: of the ranks, each of which stores its heads by its own.
    """

    num_layers: int
    turned: bool
    codecs: tuple = ()
    ntk: float = 1.0
    layers: list[list[Piece]] = field(default_factory=list)
    seen_by: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = [[] for _ in range(self.num_layers)]

    def stored(self, piece: Piece, layer: int) -> Piece:
        """What comes back of a piece that is cached."""
        if not self.codecs:
            return piece
        made = {}
        for name, side in (("k", "key"), ("v", "value")):
            heads = zip(self.codecs, getattr(piece, name).chunk(len(self.codecs), dim=2), strict=True)
            blobs = [(codec, codec.encode(x.contiguous(), side=side, layer=layer)) for codec, x in heads]
            made[name] = torch.cat([codec.decode(blob, side=side) for codec, blob in blobs], dim=2)
        return replace(piece, **made)

    def rotated(self, piece: Piece) -> Tensor:
        return piece.k.double() if self.turned else spin(piece.k, (piece.t, piece.row, piece.col), self.ntk)

    def moved(self, piece: Piece, delta: Tensor | float) -> Piece:
        """The piece at other temporal positions."""
        delta = torch.as_tensor(delta).expand_as(piece.t)
        zero = torch.zeros_like(piece.t)
        k = spin(piece.k, (delta, zero, zero), self.ntk).to(piece.k.dtype) if self.turned else piece.k
        return replace(piece, k=k, t=piece.t + delta)

    def cut(self, at: int) -> None:
        """Let a piece begin at token `at`; a coded piece is coded again in two."""
        for layer, pieces in enumerate(self.layers):
            start = 0
            for i, piece in enumerate(pieces):
                stop = start + piece.t.shape[1]
                if start < at < stop:
                    pieces[i : i + 1] = [self.stored(p, layer) for p in (piece.part(0, at - start), piece.part(at - start, stop - start))]
                    break
                start = stop


class View:
    """The network's side of one pass of one branch."""

    def __init__(self, branch: Branch, own: tuple[int, ...], grid: tuple[int, int], *, batch: int, append: bool, block: int) -> None:
        self.branch, self.append, self.block = branch, append, block
        self.prefix_tokens = sum(p.t.shape[1] for p in branch.layers[0] if p.seen)
        time, row, col = torch.meshgrid(torch.tensor(own), *(torch.arange(n) for n in grid), indexing="ij")
        self.where = tuple(x.reshape(1, -1).expand(batch, -1).double() for x in (time, row, col))
        self.num_layers, self.keys, self.tables, self.times = branch.num_layers, "pre_rope", None, None

    def begin(self, layout: TokenLayout) -> None:
        count, total = self.where[0].shape[1], self.prefix_tokens + self.where[0].shape[1]
        d = self.branch_head_dim
        unit = torch.zeros(1, count, 1, d, dtype=torch.float64)
        unit[..., 0::2] = 1
        spun = spin(unit, tuple(x[:1] for x in self.where), self.branch.ntk)
        cos, sin = spun[..., 0::2], spun[..., 1::2]
        query = RopeTable(torch.stack([cos, cos], -1).flatten(-2)[0], torch.stack([-sin, sin], -1).flatten(-2)[0])
        one = torch.ones(total, 1, d, dtype=torch.float64)
        self.tables = RopePair(query, RopeTable(one, torch.zeros_like(one)))

    branch_head_dim = 16

    def layer(self, index: int) -> LayerSide:
        return LayerSide(self, index)

    def commit(self, layout: TokenLayout) -> None:
        pass


class LayerSide:
    def __init__(self, view: View, index: int) -> None:
        self.view, self.index, self.keys, self.prefix_tokens, self.appends = view, index, "pre_rope", view.prefix_tokens, view.append
        self.takes_projections = False
        self.attends = False

    def assemble(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        branch, (t, row, col) = self.view.branch, self.view.where
        own = Piece(spin(k, self.view.where, branch.ntk) if branch.turned else k, v, t, row, col, block=self.view.block)
        past = [p for p in branch.layers[self.index] if p.seen]
        if self.view.append:
            kept = branch.stored(own, self.index)
            branch.layers[self.index].append(kept)
            own = kept
        pieces = [*past, own]
        return torch.cat([branch.rotated(p) for p in pieces], dim=1), torch.cat([p.v for p in pieces], dim=1)

    def observe(self, q: Tensor, k: Tensor) -> None:
        if self.view.append:
            self.view.branch.seen_by[self.index] = (q, k)


class Rule:
    """A policy written out: where a chunk stands and what of `branches` it sees (`before`), and
    what becomes of them (`after`). What a change of prompt rewrites is all but the first `kept`
    pieces; before, `frames` of the newest are forgotten, and each is told when it is there again.
    """

    turned = False

    def before(self, branches: list[Branch], plan) -> tuple[int, ...]:
        return tuple(range(plan.start, plan.stop))

    def after(self, branches: list[Branch], plan) -> None:
        pass

    def kept(self, pieces: list[Piece]) -> int:
        return 0

    def forget(self, branches: list[Branch], frames: int) -> None:
        pass

    def again(self, branches: list[Branch]) -> None:
        pass


class Merged(Exception):
    """What is cached is no longer what blocks left."""


@dataclass
class Oracle:
    """A stream under way, the long way: `conds` gives the condition of a block, `recached` the
    blocks before which the past is entered anew under it; `prefix` [B, C, k, h, w] given latents;
    `ranks` store their heads apart.
    """

    model: Denoiser | Guided
    conds: Callable[[int], object]
    recipe: object
    rule: Rule
    noise: object
    latent: tuple[int, int, int]
    batch: int
    codec: object = None
    ntk: float = 1.0
    prefix: Tensor | None = None
    recached: frozenset[int] = frozenset()
    ranks: int = 1

    def __post_init__(self) -> None:
        guided = isinstance(self.model, Guided) and self.model.active
        base = self.model.denoiser if isinstance(self.model, Guided) else self.model
        self.grid, layers = self.model.token_grid(*self.latent[1:]), base.net.config.num_layers
        turned = self.rule.turned and self.codec is not None
        self.branches = []
        for _ in range(2 if guided else 1):
            codecs = () if self.codec is None else tuple(self.codec.fork() for _ in range(self.ranks))
            self.branches.append(Branch(layers, turned, codecs, self.ntk))
        self.contexts: dict[int, tuple[Tensor, float]] = {}
        ends = [
            block for block in range(99) if self.recipe.blocks.frames_before(block) == (0 if self.prefix is None else self.prefix.shape[2])
        ]
        self.given = ends[0]

    def run(self, x: Tensor, t: float, own: tuple[int, ...], cond: object, *, block: int, append: bool) -> Tensor:
        views = [View(b, own, self.grid, batch=self.batch, append=append, block=block) for b in self.branches]
        layout = TokenLayout.over_cache(own, grid=self.grid, context_tokens=views[0].prefix_tokens)
        view = PairedView(*views) if isinstance(self.model, Guided) else views[0]
        return self.model.velocity(x, torch.full((self.batch, 1), t, dtype=torch.float64), cond, layout, cache=view)

    def recache(self, cond: object) -> None:
        """Enter all but the sinks again where they stand, oldest first."""
        count = self.rule.kept(self.branches[0].layers[0])
        old = self.branches[0].layers[0][count:]
        if any(piece.block is None for piece in old):
            raise Merged
        for branch in self.branches:
            branch.layers = [pieces[:count] for pieces in branch.layers]
        per_frame = self.grid[0] * self.grid[1]
        self.rule.forget(self.branches, sum(piece.t.shape[1] for piece in old) // per_frame)
        for piece in old:
            own = tuple(int(t) for t in piece.t[0, ::per_frame])
            self.run(*self.contexts[piece.block], own, cond, block=piece.block, append=True)
            for pieces in (pieces for branch in self.branches for pieces in branch.layers):
                pieces[-1].seen = piece.seen
            self.rule.again(self.branches)

    def chunk(self, block: int) -> Tensor:
        """Latents of the next block."""
        cond = self.conds(block)
        if block in self.recached:
            self.recache(cond)
        plan = self.recipe.plan(max(block, self.given), prefix_blocks=self.given)
        if block < self.given:
            start, stop = (self.recipe.blocks.frames_before(b) for b in (block, block + 1))
            noisy = self.recipe.noisy_context and block >= self.recipe.noisy_context_start_chunk
            plan, x = replace(plan, block=block, start=start, stop=stop, commit="clean"), self.prefix[:, :, start:stop]
            t = plan.times[-2] if noisy else 0.0
            own = self.rule.before(self.branches, plan)
            context = ((1 - t) * x + t * self.noise.context(slice(start, stop)) if t else x), t
        else:
            own = self.rule.before(self.branches, plan)
            x, context = self.denoised(plan, own, cond)
        if plan.commit == "clean":
            self.run(*context, own, cond, block=block, append=True)
        self.contexts[block] = context
        self.rule.after(self.branches, plan)
        return x

    def denoised(self, plan: object, own: tuple[int, ...], cond: object) -> tuple[Tensor, tuple[Tensor, float]]:
        frames = slice(plan.start, plan.stop)
        x = self.noise.start(frames) * plan.times[0]
        steps = list(itertools.pairwise(plan.times))
        for i, (t, t_next) in enumerate(steps):
            append, seen = i == len(steps) - 1 and plan.commit == "last_input", x
            v = self.run(x, t, own, cond, block=plan.block, append=append)
            if self.recipe.kind == "ode":
                x = x - (t - t_next) * v
            else:
                x = (1 - t_next) * (x - t * v) + (t_next * self.noise.step(i, frames) if t_next else 0)
        assert math.isfinite(float(x.abs().max()))
        return x, ((seen, t) if plan.commit == "last_input" else (x, 0.0))


@torch.no_grad()
def stream(model: Denoiser | Guided, cond, recipe, rule: Rule, *, blocks: int, **options: object) -> Tensor:
    """Latents [B, C, T, H, W] of the first `blocks` blocks; `options` of `Oracle`."""
    oracle = Oracle(model, lambda _: cond, recipe, rule, **options)
    return torch.cat([oracle.chunk(block) for block in range(blocks)], dim=2)
