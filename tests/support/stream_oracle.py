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
    and columns [B, S]; `seen` now.
    """

    k: Tensor
    v: Tensor
    t: Tensor
    row: Tensor
    col: Tensor
    seen: bool = True

    def part(self, start: int, stop: int) -> Piece:
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in ("k", "v", "t", "row", "col")})

    def take(self, index: Tensor) -> Piece:
        """Tokens `index` [B, L]."""

        def pick(x: Tensor) -> Tensor:
            return torch.stack([x[b, index[b]] for b in range(len(x))])

        return replace(self, **{name: pick(getattr(self, name)) for name in ("k", "v", "t", "row", "col")})


def joined(pieces: list[Piece]) -> Piece:
    """One piece of several."""
    return Piece(*(torch.cat([getattr(p, name) for p in pieces], dim=1) for name in ("k", "v", "t", "row", "col")))


@dataclass
class Branch:
    """What one branch has cached, per layer a list of pieces. `turned`: keys are stored rotated to
    `t`.
    """

    num_layers: int
    turned: bool
    codec: object = None
    ntk: float = 1.0
    layers: list[list[Piece]] = field(default_factory=list)
    seen_by: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = [[] for _ in range(self.num_layers)]

    def stored(self, piece: Piece, layer: int) -> Piece:
        """What comes back of a piece that is cached."""
        if self.codec is None:
            return piece
        k = self.codec.decode(self.codec.encode(piece.k, side="key", layer=layer), side="key")
        v = self.codec.decode(self.codec.encode(piece.v, side="value", layer=layer), side="value")
        return replace(piece, k=k, v=v)

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

    def __init__(self, branch: Branch, own: tuple[int, ...], grid: tuple[int, int], *, batch: int, append: bool, coded_self: bool) -> None:
        self.branch, self.append, self.coded_self = branch, append, coded_self
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
        own = Piece(spin(k, self.view.where, branch.ntk) if branch.turned else k, v, t, row, col)
        past = [p for p in branch.layers[self.index] if p.seen]
        if self.view.append:
            kept = branch.stored(own, self.index)
            branch.layers[self.index].append(kept)
            own = kept if self.view.coded_self else own
        pieces = [*past, own]
        return torch.cat([branch.rotated(p) for p in pieces], dim=1), torch.cat([p.v for p in pieces], dim=1)

    def observe(self, q: Tensor, k: Tensor) -> None:
        if self.view.append:
            self.view.branch.seen_by[self.index] = (q, k)


class Rule:
    """A policy written out: where a chunk stands and what of `branches` it sees (`before`), and
    what becomes of them (`after`).
    """

    turned = False

    def before(self, branches: list[Branch], plan) -> tuple[int, ...]:
        return tuple(range(plan.start, plan.stop))

    def after(self, branches: list[Branch], plan) -> None:
        pass


@torch.no_grad()
def stream(model: Denoiser | Guided, cond, recipe, rule: Rule, *, blocks: int, noise, latent, batch: int, codec=None, ntk: float = 1.0,
           conds: Callable[[int], object] | None = None) -> Tensor:  # fmt: skip
    """Latents [B, C, T, H, W] of the first `blocks` blocks."""
    guided = isinstance(model, Guided) and model.active
    base = model.denoiser if isinstance(model, Guided) else model
    grid, layers = model.token_grid(*latent[1:]), base.net.config.num_layers
    turned = rule.turned and codec is not None
    codecs = [codec, None if codec is None else codec.fork()]
    branches = [Branch(layers, turned, codecs[i], ntk) for i in range(2 if guided else 1)]

    def run(x: Tensor, t: float, own: tuple[int, ...], *, append: bool) -> Tensor:
        views = [View(b, own, grid, batch=batch, append=append, coded_self=codec is not None) for b in branches]
        layout = TokenLayout.over_cache(own, grid=grid, context_tokens=views[0].prefix_tokens)
        view = PairedView(*views) if isinstance(model, Guided) else views[0]
        return model.velocity(x, torch.full((batch, 1), t, dtype=torch.float64), cond, layout, cache=view)

    chunks = []
    for block in range(blocks):
        plan = recipe.plan(block)
        cond = cond if conds is None else conds(block)
        frames = slice(plan.start, plan.stop)
        own = rule.before(branches, plan)
        x = noise.start(frames) * plan.times[0]
        steps = list(itertools.pairwise(plan.times))
        for i, (t, t_next) in enumerate(steps):
            append = i == len(steps) - 1 and plan.commit == "last_input"
            v = run(x, t, own, append=append)
            if recipe.kind == "ode":
                x = x - (t - t_next) * v
            else:
                x = (1 - t_next) * (x - t * v) + (t_next * noise.step(i, frames) if t_next else 0)
        chunks.append(x)
        if plan.commit == "clean":
            run(x, 0.0, own, append=True)
        rule.after(branches, plan)
    assert all(math.isfinite(float(c.abs().max())) for c in chunks)
    return torch.cat(chunks, dim=2)
