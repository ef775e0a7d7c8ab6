"""Policies in numbers: what is kept and where it stands against tables written by hand; refusals,
snapshots, prompts, sharded heads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from rcm.pipelines.session import Session, StreamSpec
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.eviction.relax_forcing_paper import RelaxForcingPaper
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.pipelines.test_session import latents
from tests.support.tiny_nets import GRID, HEIGHT, WIDTH, condition, tiny_config

S = GRID[0] * GRID[1]
RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.5,),))
LATENT = (4, HEIGHT, WIDTH)


@dataclass(frozen=True)
class Span:
    block: int
    start: int
    stop: int


def keys_of(chunk: Span) -> torch.Tensor:
    """Keys that name their frame: [2, S * frames, 1, 6], all channels the frame's number."""
    return torch.arange(chunk.start, chunk.stop).double().repeat_interleave(S)[None, :, None, None].expand(2, -1, 1, 6).contiguous()


def values_of(cache: KVCache) -> torch.Tensor:
    """All cached values of the first layer, chunks in order."""
    return cache.store.read(0, [piece for chunk in cache.chunks for piece in chunk.pieces])[1]


def placed(policy: CachePolicy, pattern: str, blocks: int) -> Iterator[tuple[list[tuple[int, ...]], tuple[int, ...]]]:
    """Per block what it sees, as (frame, position) ... of every visible chunk, and its own
    positions; no network.
    """
    shape, policy = BlockPattern.parse(pattern), policy.fresh()
    cache = KVCache(1, capacity_tokens=policy.capacity_frames(shape) * S, keys=policy.keys)
    for block in range(blocks):
        chunk = Span(block, shape.frames_before(block), shape.frames_before(block + 1))
        found = policy.before((cache,), chunk)
        seen = []
        for held in cache.chunks:
            if held.id in found.visible:
                frames = values_of(cache)
                at = sum(c.num_tokens for c in cache.chunks[: cache.chunks.index(held)])
                names = frames[0, at : at + held.num_tokens : S, 0, 0].tolist()
                seen.append(tuple(zip(names, held.positions.frames, strict=True)))
        view = cache.append(found.visible)
        layout = TokenLayout.over_cache(found.frame_index, grid=GRID, context_tokens=view.prefix_tokens)
        view.begin(layout)
        view.layer(0).assemble(torch.ones_like(keys_of(chunk)), keys_of(chunk))
        view.commit(layout)
        policy.after((cache,), chunk)
        yield seen, found.frame_index


def flat(seen) -> list[tuple[int, int]]:
    return sorted(((t, int(f)) for chunk in seen for f, t in chunk))


HAND = [
    # policy, pattern, {block: ([(position, frame) in order of position], own positions)}
    (SlidingWindow(3, 1), "c1-1", {0: ([], (0,)), 4: ([(0, 0), (2, 2), (3, 3)], (4,)), 7: ([(0, 0), (5, 5), (6, 6)], (7,))}),
    (
        RollingSink(3, 2, 1),
        "c1-1",
        {
            2: ([(0, 0), (1, 1)], (2,)),
            3: ([(0, 0), (1, 1), (2, 2)], (3,)),
            4: ([(1, 1), (2, 2), (3, 3)], (4,)),
            5: ([(2, 2), (3, 0), (4, 4)], (5,)),
            6: ([(3, 2), (4, 1), (5, 5)], (6,)),  # phase 3: backwards from block 2
            7: ([(4, 1), (5, 0), (6, 6)], (7,)),
            8: ([(5, 0), (6, 2), (7, 7)], (8,)),
            9: ([(6, 0), (7, 1), (8, 8)], (9,)),  # phase 6: forwards again
        },
    ),
    (
        RollingSink(2, 1, 1),
        "c2-2",
        {
            3: ([(2, 2), (3, 3), (4, 4), (5, 5)], (6, 7)),
            4: ([(4, 3), (5, 2), (6, 6), (7, 7)], (8, 9)),
            5: ([(6, 1), (7, 0), (8, 8), (9, 9)], (10, 11)),
        },
    ),
    (
        InfinityRope(3, 1, 9, cut_delta=10, cuts=frozenset({4})),
        "c3-3",
        {
            0: ([], (6, 7, 8)),
            2: ([(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5)], (6, 7, 8)),
            3: ([(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8)], (6, 7, 8)),
            4: ([(0, 0), (0, 1), (0, 2), (0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11)], (16, 17, 18)),
            5: ([(0, 0), (1, 1), (2, 2), (3, 12), (4, 13), (5, 14)], (6, 7, 8)),
        },
    ),
    (
        InfinityRope(4, 1, 5, flush_interval=3, cut_delta=7, cut_single_frames=False, cuts=frozenset({7})),
        "c1-1",
        {
            3: ([(2, 0), (3, 2)], (4,)),
            5: ([(0, 0), (1, 2), (2, 3), (3, 4)], (4,)),
            6: ([(2, 0), (3, 5)], (4,)),
            7: ([(1, 0), (2, 5), (3, 6)], (4,)),
            8: ([(2, 0), (3, 7)], (4,)),
        },
    ),
    (
        MemRope(1, 2, 0.5, 0.5),
        "c1-1",
        {
            4: ([(0, 0), (1, 1), (2, 2), (3, 3)], (4,)),
            5: ([(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)], (5,)),
            6: ([(0, 0), (1, 2), (2, 2), (3, 4), (4, 5)], (5,)),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "pattern", "table"), HAND, ids=lambda x: type(x).__name__)
def test_positions_and_kept_frames_by_hand(policy, pattern, table):
    rows = list(placed(policy, pattern, max(table) + 1))
    for block, (seen, own) in table.items():
        assert (flat(rows[block][0]), rows[block][1]) == (sorted(seen), own), f"block {block}"


def test_the_running_means_by_hand():
    """Values name their frame: the first time three frames leave at once, then one per block, never
    a memory itself.
    """
    policy = MemRope(1, 1, 0.25, 0.5)
    rows = list(placed(policy, "c1-1", 9))
    long = short = 2.0  # frames 1, 2 and 3 leave together
    for block in range(5, 9):
        values = [chunk[0][0] for chunk in rows[block][0]]
        assert values == pytest.approx([0.0, long, short, block - 1.0]), block
        long, short = 0.75 * long + 0.25 * (block - 1), 0.5 * short + 0.5 * (block - 1)


BAD = [
    (lambda: SlidingWindow(0), "window=0"),
    (lambda: SlidingWindow(2, -1), "sinks=-1"),
    (lambda: RollingSink(6, 5, 0), "at least 1"),
    (lambda: RollingSink(6, 0, 6), "at least 1"),
    (lambda: RollingSink(6, 5, 2), "add up to total_blocks=6; set total_blocks to 7"),
    (lambda: RollingSink(6, 2, 2), "set total_blocks to 4"),
    (lambda: InfinityRope(3, 3), "below cache_blocks=3"),
    (lambda: InfinityRope(3, -1), "at least 0"),
    (lambda: InfinityRope(horizon=1), "f_limit=1"),
    (lambda: InfinityRope(flush_interval=-1), "flush_interval_blocks=-1"),
    (lambda: InfinityRope(cut_delta=-1), "rope_cut_delta=-1"),
    (lambda: DeepForcing(10, 13, 4), "df_budget_frames=13; set it to 14"),
    (lambda: DeepForcing(-1, 13, 4), "df_sink_frames=-1"),
    (lambda: DeepForcing(1, 13, 0), "df_recent_frames=0"),
    (lambda: DeepForcing(observation_layers=-1), "df_observation_layers=-1"),
    (lambda: RelaxForcing(4, 7, 4), "rx_budget_frames=7"),
    (lambda: RelaxForcing(alignment_weight=1.1), "alignment_weight=1.1"),
    (lambda: RelaxForcing(alignment_weight=float("nan")), "alignment_weight=nan"),
    (lambda: MemRope(-1), "mr_sink_frames=-1"),
    (lambda: MemRope(local=0), "mr_local_frames=0"),
    (lambda: MemRope(alpha_long=0), "mr_alpha_long=0"),
    (lambda: MemRope(alpha_short=float("nan")), "mr_alpha_short=nan"),
    (lambda: RelaxForcingPaper(sinks=0), "rx_sink_blocks=0"),
    (lambda: RelaxForcingPaper(history=5), "rx_pool_blocks=8 leaves 4"),
    (lambda: RelaxForcingPaper(redundancy=-0.1), "rx_redundancy=-0.1"),
    (lambda: RelaxForcingPaper(horizon=14).capacity_frames(BlockPattern.parse("c3-3")), "f_limit=14 frames are fewer than the 15"),
    (lambda: StreamSpec(RECIPE, LATENT, policy=InfinityRope(), keys="post_rope"), "needs keys='pre_rope'"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_impossible_settings_are_one_sentence(make, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")) as error:
        make()
    assert isinstance(error.value, ValueError)


DEFAULTS = {
    RollingSink: (6, 5, 1),
    InfinityRope: (6, 1, 21, 0, 21),
    DeepForcing: (10, 16, 4, 0),
    MemRope: (3, 4, 0.01, 0.1),
    RelaxForcing: (4, 16, 4, 0.5),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_the_release(kind):
    assert tuple(vars(kind()).values())[: len(DEFAULTS[kind])] == DEFAULTS[kind]


SMALL = {
    "sliding": SlidingWindow(3, 1),
    "rolling": RollingSink(3, 2, 1),
    "infinity": InfinityRope(3, 1, 8, flush_interval=4),
    "mem": MemRope(1, 2, 0.3, 0.6),
    "deep": DeepForcing(1, 4, 2),
    "relax": RelaxForcing(1, 4, 2),
    "paper": RelaxForcingPaper(1, 1, 1, 4, 0.5, 12),
}


def opened(denoiser, policy, *, cond=None, **options) -> Session:
    spec = StreamSpec(RECIPE, LATENT, batch=2, policy=policy, **options)
    return Session(denoiser, None, condition(tiny_config()) if cond is None else cond, spec)


QVG = KVCodecSpec(SideSpec("int2", smoothing="qvg", group_size=16), SideSpec("int4"), qvg_clusters=3)


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("name", SMALL)
def test_memory_does_not_grow(denoiser, name, coded):
    session = opened(denoiser, SMALL[name], kv_codec=KVCodec(QVG) if coded else None, hot_chunks=1 if coded else 0)
    latents(session, 13)
    sizes = {(session.step(), session.num_bytes())[1] for _ in range(12)}
    if not coded:
        assert len(sizes) == 1
    else:
        assert max(sizes) <= 1.1 * min(sizes)
        cache = session.loop.cache
        assert all(list(hot) == [cache.chunks[-1].id] for hot in cache.store._hot), "what a policy rewrites is coded at once"


def test_requested_cuts_and_flushes_apply_to_the_next_block(denoiser):
    asked = opened(denoiser, replace(SMALL["infinity"], flush_interval=0, cut_delta=5))
    planned = opened(denoiser, replace(SMALL["infinity"], flush_interval=0, cut_delta=5, cuts=frozenset({4})))
    latents(asked, 4)
    asked.loop.canvas.policy.cut()
    assert torch.equal(latents(planned, 8)[:, :, 4:], latents(asked, 4))
    flushed = opened(denoiser, replace(SMALL["infinity"], flush_interval=0))
    latents(flushed, 6)
    flushed.loop.canvas.policy.flush()
    latents(flushed, 2)
    assert [c.id for c in flushed.loop.cache.chunks] == [0, 5, 6], "sinks and the block that was finished, then the next one"


@pytest.mark.parametrize("kind", [DeepForcing, RelaxForcing])
def test_samples_choose_for_themselves(denoiser, kind):
    """The two samples of a batch keep different tokens (that each is right: test_eviction.py)."""
    chosen = []

    class Watching(kind):
        def choose(self, *args, **options):
            found = super().choose(*args, **options)
            chosen.append(found)
            return found

    recipe = replace(RECIPE, pattern="c1-3")
    spec = StreamSpec(recipe, LATENT, batch=2, policy=Watching(1, 9, 2))
    latents(Session(denoiser, None, condition(tiny_config()), spec), 12)
    assert any(index.shape[0] == 2 and not torch.equal(index[0], index[1]) for found in chosen for index in found)


@pytest.mark.parametrize(
    "policy", [DeepForcing(1, 5, 2), RelaxForcing(1, 5, 2), RelaxForcingPaper(1, 1, 1, 4, 0.5, 12)], ids=lambda p: type(p).__name__
)
def test_ranks_with_other_heads_choose_alike(policy):
    """Two caches with half of the heads each and a sum over both choose what one cache with all of
    them chooses.
    """
    torch.manual_seed(0)
    keys = torch.randn(9, 2, S, 4, 6, dtype=torch.float64)
    queries = torch.randn(9, 2, S, 4, 6, dtype=torch.float64)

    def run(heads: slice, reduce) -> Iterator[torch.Tensor]:
        mine = replace(policy, reduce=reduce)
        cache = KVCache(1, capacity_tokens=mine.capacity_frames(BlockPattern.parse("c1-1")) * S, keys=mine.keys)
        for block in range(9):
            span = Span(block, block, block + 1)
            found = mine.before((cache,), span)
            view = cache.append(found.visible, observers=mine.observers((cache,)))
            layout = TokenLayout.over_cache(found.frame_index, grid=GRID, context_tokens=view.prefix_tokens)
            view.begin(layout)
            k, _ = view.layer(0).assemble(keys[block][:, :, heads].contiguous(), keys[block][:, :, heads].contiguous())
            view.layer(0).observe(queries[block][:, :, heads], k)
            view.commit(layout)
            mine.after((cache,), span)
            yield values_of(cache).clone(), found.visible

    class Gathering:
        """The sum of what both ranks give at the same time: run in lockstep by threads."""

        def __init__(self) -> None:
            self.barrier, self.given = threading.Barrier(2, timeout=120), {}

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            me = threading.get_ident()
            self.given[me] = x
            self.barrier.wait()
            total = sum(self.given.values())
            self.barrier.wait()
            return total

    meeting = Gathering()
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda heads: list(run(heads, meeting)), (slice(0, 2), slice(2, 4))))
    for one, left, right in zip(run(slice(0, 4), None), *parts, strict=True):
        assert torch.equal(one[0], torch.cat([left[0], right[0]], dim=2)) and one[1] == left[1] == right[1]


@pytest.mark.parametrize("pattern", ["c1-1", "c3-2"])
@pytest.mark.parametrize("name", SMALL)
def test_what_a_chunk_sees_lies_in_one_run(denoiser, name, pattern):
    """Once the cache is full, every pass reads its keys as one view of the buffers, which captured
    passes need.
    """
    policy = replace(SMALL[name], horizon=24) if name == "paper" else SMALL[name]
    session = Session(
        denoiser, None, condition(tiny_config()), StreamSpec(replace(RECIPE, pattern=pattern), LATENT, batch=2, policy=policy)
    )
    views = []
    cache = session.loop.cache
    make = cache.readonly
    cache.readonly = lambda *args, **options: views.append(make(*args, **options)) or views[-1]
    latents(session, 8)
    views.clear()
    latents(session, 8)
    assert len(views) == 16 and all(view.is_one_run for view in views)
