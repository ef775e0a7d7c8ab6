"""The policies once more, naively, over the lists of `stream_oracle`: loops instead of tensor
arithmetic, tokens instead of chunks.
"""

from __future__ import annotations

import itertools
import math

import torch

from tests.support.stream_oracle import Branch, Piece, Rule, joined

S = 6
"""Tokens of a frame."""


def everywhere(branches: list[Branch]):
    for branch in branches:
        yield from branch.layers


def in_a_row(branches, sizes_first, *, low=None):
    """Place the pieces of every layer one behind the other from `sizes_first`."""
    for pieces in everywhere(branches):
        at = sizes_first
        for piece in pieces:
            frames = piece.t.shape[1] // S
            row = [at + f if low is None else max(low, at + f) for f in range(frames)]
            piece.t = torch.tensor(row, dtype=torch.float64).repeat_interleave(S).expand_as(piece.t)
            at += frames


def frames_of(pieces) -> int:
    return sum(p.t.shape[1] for p in pieces) // S


class Window(Rule):
    """Sliding window of the release: `window` cached blocks, `sinks` of them the first. What falls
    out of it is there until the next block is made.
    """

    def __init__(self, window: int, sinks: int = 0):
        self.window, self.sinks = window, sinks

    def before(self, branches, plan):
        for pieces in everywhere(branches):
            while len(pieces) > self.window:
                del pieces[self.sinks]
        return super().before(branches, plan)

    def kept(self, pieces):
        return min(self.sinks, len(pieces))


class Rolling(Rule):
    def __init__(self, total, sinks, recent):
        self.total, self.sinks, self.recent, self.phase = total, sinks, recent, 0
        self.order = None

    def before(self, branches, plan):
        i = plan.block
        if i <= self.total:
            return tuple(range(plan.start, plan.stop))
        phase, k = i - self.total, self.total
        if (phase // k) % 2 == 0:
            order, back = [(phase + j) % k for j in range(self.sinks)], False
        else:
            order, back = [(k - 1 - phase % k - j) % k for j in range(self.sinks)], True
        for pieces in everywhere(branches):
            for piece in pieces:
                piece.seen = False
            recent = pieces[-self.recent :]
            at = plan.start - frames_of(recent) - frames_of([pieces[j] for j in order])
            for piece in [pieces[j] for j in order] + recent:
                n = frames_of([piece])
                row = list(range(at, at + n))
                if back and piece not in recent:
                    row.reverse()
                piece.t = torch.tensor(row, dtype=torch.float64).repeat_interleave(S).expand_as(piece.t)
                piece.seen = True
                at += n
        return tuple(range(plan.start, plan.stop))

    def after(self, branches, plan):
        for pieces in everywhere(branches):
            while len(pieces) > self.total + self.recent:
                del pieces[self.total]

    def kept(self, pieces):
        return self.total if len(pieces) > self.total else min(self.sinks, len(pieces))


class Infinity(Rule):
    def __init__(self, blocks, sinks, horizon, *, interval=0, delta=0, cuts=()):
        self.blocks, self.sinks, self.horizon, self.interval, self.delta, self.cuts = blocks, sinks, horizon, interval, delta, cuts

    def before(self, branches, plan):
        n = plan.stop - plan.start
        for pieces in everywhere(branches):
            total = frames_of(pieces)
            in_a_row([Branchlike(pieces)], self.horizon - n - total, low=0)
        own = [max(0, t) for t in range(self.horizon - n, self.horizon)]
        return tuple(t + (self.delta if plan.block in self.cuts else 0) for t in own)

    def after(self, branches, plan):
        flush = plan.block in self.cuts or (self.interval and (plan.block + 1) % self.interval == 0)
        for pieces in everywhere(branches):
            while len(pieces) > (self.sinks + 1 if flush else self.blocks):
                del pieces[self.sinks]

    def kept(self, pieces):
        return min(self.sinks, len(pieces))


class Branchlike:
    def __init__(self, pieces):
        self.layers = [pieces]


def within(pieces, frames):
    """How many of the first pieces lie within so many frames."""
    return sum(frames_of(pieces[: i + 1]) <= frames for i in range(len(pieces)))


class Memory(Rule):
    def __init__(self, sinks, local, long, short, *, per_position=False):
        self.sinks, self.local, self.rates, self.per_position, self.known = sinks, local, (long, short), per_position, {}

    def before(self, branches, plan):
        in_a_row(branches, 0)
        first = frames_of(branches[0].layers[0])
        return tuple(range(first, first + plan.stop - plan.start))

    def after(self, branches, plan):
        total = frames_of(branches[0].layers[0])
        if total <= self.sinks + 2 + self.local:
            return
        for b, branch in enumerate(branches):
            branch.cut(self.sinks * S)
            branch.cut((total - self.local) * S)
            for layer, pieces in enumerate(branch.layers):
                at, old, low = 0, [], None
                for i, piece in enumerate(pieces):
                    if self.sinks <= at < total - self.local:
                        old.append(piece)
                        low = i if low is None else low
                    at += frames_of([piece])
                fresh = joined(old)
                key = (b, layer)
                if key in self.known:
                    fresh = fresh.part(2 * S, fresh.t.shape[1])
                mean = []
                for x in (fresh.k.double(), fresh.v.double()):
                    if self.per_position:
                        slots = [x[:, s::S].mean(1) for s in range(S)]
                    else:
                        slots = [x.mean(1)] * S
                    mean.append(torch.stack(slots, dim=1))
                if key not in self.known:
                    self.known[key] = [list(mean), list(mean)]
                else:
                    for memory, rate in zip(self.known[key], self.rates, strict=True):
                        for j in range(2):
                            memory[j] = memory[j] + rate * (mean[j] - memory[j])
                new = []
                for j, memory in enumerate(self.known[key]):
                    one = old[0].part(0, S) if old[0].t.shape[1] >= S else fresh.part(0, S)
                    piece = Piece(
                        memory[0].to(one.k.dtype), memory[1].to(one.v.dtype), torch.full_like(one.t, self.sinks + j), one.row, one.col
                    )
                    new.append(branch.stored(piece, layer))
                pieces[low : low + len(old)] = new

    def kept(self, pieces):
        return within(pieces, self.sinks)


class Compressed(Rule):
    turned = True

    def __init__(self, sinks, budget, recent):
        self.sinks, self.budget, self.recent, self.sink_at, self.base = sinks, budget, recent, 0, sinks

    def after(self, branches, plan):
        total = frames_of(branches[0].layers[0])
        if total <= self.budget:
            return
        kept, tail = self.budget - self.sinks - self.recent, plan.stop - self.recent
        start = tail - kept
        for branch in branches:
            picks = self.picks(branch, total, kept) if kept else None
            branch.cut(self.sinks * S)
            branch.cut((total - self.recent) * S)
            for layer, pieces in enumerate(branch.layers):
                at, split = 0, []
                for piece in pieces:
                    split.append(0 if at < self.sinks else 1 if at < total - self.recent else 2)
                    at += frames_of([piece])
                groups = [[p for p, g in zip(pieces, split, strict=True) if g == which] for which in range(3)]
                new = []
                if groups[0]:
                    new.append(branch.moved(joined(groups[0]), (start - self.sinks) - self.sink_at))
                if kept:
                    chosen = joined(groups[1]).take(picks[layer])
                    new.append(branch.moved(chosen, self.delta(picks[layer], start)))
                pieces[:] = [branch.stored(p, layer) for p in new] + groups[2]
        self.sink_at, self.base = start - self.sinks, start

    def kept(self, pieces):
        return within(pieces, self.sinks)


class Deep(Compressed):
    """Scores by explicit loops over queries, heads and keys' dot products."""

    def __init__(self, sinks, budget, recent, *, layers=0):
        super().__init__(sinks, budget, recent)
        self.layers, self.queries = layers, {}

    def picks(self, branch, total, kept):
        count, found = total - self.sinks - self.recent, []
        for layer in range(branch.num_layers):
            batch = branch.layers[0][0].t.shape[0]
            if layer not in branch.seen_by or (self.layers and layer < branch.num_layers - self.layers):
                found.append(torch.arange((count - kept) * S, count * S).expand(batch, -1))
                continue
            q, k = self.window[id(branch), layer]
            score = torch.zeros(batch, count * S, dtype=torch.float64)
            for b in range(batch):
                for j in range(count * S):
                    at = self.sinks * S + j
                    if at < k.shape[1]:
                        score[b, j] = sum((q[b, :, h] @ k[b, at, h]).sum() for h in range(q.shape[2])) / math.sqrt(q.shape[3])
            order = [sorted(range(count * S), key=lambda j, b=b: (-float(score[b, j]), j))[: kept * S] for b in range(batch)]
            found.append(torch.tensor([sorted(row) for row in order]))
        return found

    def forget(self, branches, frames):
        self.queries = {key: q[:, : max(0, q.shape[1] - frames * S)] for key, q in self.queries.items()}

    def again(self, branches):
        self.window = {}
        for branch in branches:
            for layer, (q, k) in branch.seen_by.items():
                past = k[:, : k.shape[1] - q.shape[1]]
                if past.shape[1] == 0:
                    continue
                before = self.queries.get((id(branch), layer))
                whole = q if before is None else torch.cat([before, q], dim=1)
                self.queries[id(branch), layer] = whole[:, -self.recent * S :]
                self.window[id(branch), layer] = (self.queries[id(branch), layer], past)

    def after(self, branches, plan):
        self.again(branches)
        super().after(branches, plan)

    def delta(self, pick, start):
        return float(start - self.base)


class Relax(Compressed):
    def __init__(self, sinks, budget, recent, weight):
        super().__init__(sinks, budget, recent)
        self.weight = weight

    def picks(self, branch, total, kept):
        whole = joined(branch.layers[0])
        keys = branch.rotated(whole)
        batch, rows = keys.shape[0], []
        for b in range(batch):
            vec = [keys[b, f * S : (f + 1) * S].mean(0).flatten() for f in range(total)]
            cand = [v / v.norm() for v in vec[self.sinks : total - self.recent]]
            tail = torch.stack(vec[total - self.recent :]).mean(0)
            tail = tail / tail.norm()
            score = []
            for c in cand:
                other = (sum(float(c @ d) for d in cand) - 1) / max(len(cand) - 1, 1)
                score.append(self.weight * float(c @ tail) + (1 - self.weight) * (1 - other))
            best = sorted(sorted(range(len(cand)), key=lambda j, s=score: (-s[j], j))[:kept])
            rows.append([f * S + s for f in best for s in range(S)])
        return [torch.tensor(rows)] * branch.num_layers

    def delta(self, pick, start):
        place = torch.arange(pick.shape[1]) // S
        return ((start + place) - (self.base + pick // S)).double()


class Roles(Rule):
    """The paper's Relax Forcing: blocks in the roles sink, history, tail."""

    def __init__(self, sinks, history, tail, pool, redundancy, horizon):
        self.sinks, self.history, self.tail, self.pool, self.redundancy, self.horizon = sinks, history, tail, pool, redundancy, horizon

    def before(self, branches, plan):
        n, pieces = plan.stop - plan.start, branches[0].layers[0]
        count, now = len(pieces), min(self.horizon, plan.stop) - (plan.stop - plan.start)
        sinks = list(range(min(self.sinks, count)))
        tail = [i for i in range(count) if i >= count - self.tail and i not in sinks]
        between = [i for i in range(count) if i not in sinks and i not in tail]
        pool = between[len(between) // 2 :]
        chosen = pool
        if len(pool) > self.history:

            def unit(group, b):
                v = torch.stack([pieces[i].k[b].double().mean(0).flatten() for i in group]).mean(0)
                return v / v.norm()

            batch = pieces[0].t.shape[0]
            score = dict.fromkeys(pool, 0.0)
            for i, b in itertools.product(pool, range(batch)):
                score[i] += float(unit([i], b) @ unit(sinks, b) - self.redundancy * unit([i], b) @ unit(tail, b)) / batch
            chosen = sorted(sorted(pool, key=lambda i: (-score[i], i))[: self.history])
        size = [frames_of([p]) for p in pieces]
        start, at = {}, plan.start
        for i in reversed(range(len(sinks), count)):
            at -= size[i]
            start[i] = at
        place, at = {}, 0
        for i in sinks:
            place[i] = at
            at += size[i]
        limit, later = now, [*chosen, *tail]
        for i in reversed(later):
            least = at + sum(size[j] for j in later if j < i)
            wanted = now - (plan.start - start[i])
            place[i] = max(least, min(limit - size[i], wanted))
            limit = place[i]
        for layer in everywhere(branches):
            for i, piece in enumerate(layer):
                piece.seen = i in place
                if piece.seen:
                    row = torch.arange(place[i], place[i] + size[i], dtype=torch.float64)
                    piece.t = row.repeat_interleave(S).expand_as(piece.t)
        return tuple(range(now, now + n))

    def after(self, branches, plan):
        for pieces in everywhere(branches):
            while len(pieces) > self.sinks + self.pool + self.tail:
                del pieces[self.sinks]

    def kept(self, pieces):
        return min(self.sinks, len(pieces))


class Thinned(Rule):
    """Every `every`-th block, and the newest."""

    def __init__(self, every):
        self.every, self.blocks = every, []

    def after(self, branches, plan):
        self.blocks.append(plan.block)
        kept = [block == plan.block or block % self.every == 0 for block in self.blocks]
        self.blocks = list(itertools.compress(self.blocks, kept))
        for pieces in everywhere(branches):
            pieces[:] = itertools.compress(list(pieces), kept)
