"""Every two options of streams together, once at least: each row of a covering array against a
recomputation in float64 with explicit positions, masks and codecs.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.encoders.taehv import TinyDecoderCodec
from rcm.encoders.taehv_net import Level, TinyConfig
from rcm.encoders.wan_vae import WanVAECodec
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.parallel.ulysses import shard_sequence
from rcm.pipelines import engine
from rcm.pipelines.scenes import Segment, Timeline, play
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec, SwitchRefused
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.eviction.relax_forcing_paper import RelaxForcingPaper
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support import policy_rules as rules
from tests.support.covering import Row, all_pairs, covering, pairs_of
from tests.support.dist import run_ranks
from tests.support.rerun_loop import RerunLoop
from tests.support.stream_oracle import Merged, Oracle, Rule
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

LATENT = (16, HEIGHT, WIDTH)
POLICIES = {
    "everything": (CachePolicy(), Rule()),
    "window": (SlidingWindow(3, 1), rules.Window(3, 1)),
    "rolling": (RollingSink(3, 2, 1), rules.Rolling(3, 2, 1)),
    "infinity": (InfinityRope(3, 1, 12, cut_delta=5, cuts=frozenset({4})), rules.Infinity(3, 1, 12, delta=5, cuts=(4,))),
    "mem": (MemRope(1, 1, 0.3, 0.6), rules.Memory(1, 1, 0.3, 0.6)),
    "deep": (DeepForcing(1, 5, 3), rules.Deep(1, 5, 3)),
    "relax": (RelaxForcing(1, 5, 2, 0.5), rules.Relax(1, 5, 2, 0.5)),
    "relax paper": (RelaxForcingPaper(1, 1, 1, 5, 0.5, 18), rules.Roles(1, 1, 1, 5, 0.5, 18)),
}
MERGING = ("mem", "deep", "relax")


def both(dtype: str, **options: Any) -> SideSpec:
    return SideSpec(dtype, group_size=16, **options)


def coded(key: SideSpec, value: SideSpec | None = None, **options: Any) -> KVCodecSpec:
    return KVCodecSpec(key, value or key, qvg_clusters=4, **options)


CODECS = {
    "plain": None,
    "fp8": coded(both("fp8", smoothing="clip"), both("fp8")),
    "fp4": coded(both("fp4", smoothing="balance"), both("fp4", granularity="head")),
    "int8": coded(both("int8", granularity="tensor"), both("int8", smoothing="hadamard")),
    "int4": coded(both("int4", scale_fit="search"), both("int4", asymmetric=True)),
    "int2": coded(both("int2", asymmetric=True)),
    "int2 qvg": coded(both("int2", smoothing="qvg")),
    "int2 qvg release": coded(both("int2", smoothing="qvg"), mode="release"),
    "int2 qvg official": coded(both("int2", smoothing="qvg"), mode="official"),
}
CONTEXTS = {
    "clean": {},
    "noisy": {"noisy_context": True},
    "noisy from 1": {"noisy_context": True, "noisy_context_start_chunk": 1},
}
FOUR = (15 / 16, 5 / 6, 5 / 8)
SCHEDULES = {
    "1": {"mids": ((),)},
    "4,1": {"mids": (FOUR, ())},
    "4,2": {"mids": (FOUR, (5 / 6,))},
    "list": {"mids": ((0.8, 0.5), (0.6,), (0.7, 0.3))},
    "ode": {"kind": "ode", "ode_steps": 3},
}
BLOCKS = {"c1-1": 7, "c3-3": 6, "c1-4": 6}
TINY = TinyConfig((Level(16, 1, 8), Level(8, 2, 8), Level(8, 2, 8)))
CODERS = {
    "none": None,
    "wan": lambda: WanVAECodec.random(dtype=torch.float32, base_dim=4),
    "tiny": lambda: TinyDecoderCodec.random(dtype=torch.float32, config=TINY),
}
FACTORS = {
    "policy": tuple(POLICIES),
    "codec": tuple(CODECS),
    "context": tuple(CONTEXTS),
    "prompts": ("one", "keep", "recache", "blend"),
    "start": ("noise", "given clean", "given re-noised"),
    "ranks": ("1", "2"),
    "schedule": tuple(SCHEDULES),
    "pattern": tuple(BLOCKS),
    "decoder": tuple(CODERS),
    "guidance": ("off", "on"),
    "state": ("goes on", "restored", "restored elsewhere"),
    "passes": ("eager", "captured"),
    "noise": ("chunk", "video"),
    "ahead": ("off", "on"),
    "settled": ("off", "on"),
}
EXCLUDED = {
    # what given latents are is what the context rule says
    (("context", "clean"), ("start", "given re-noised")),
    (("context", "noisy from 1"), ("start", "given re-noised")),
    (("context", "noisy"), ("start", "given clean")),
    # refused, see below
    *((("prompts", change), ("ahead", "on")) for change in ("keep", "recache", "blend")),
    (("ranks", "2"), ("passes", "captured")),
}


def allowed(pair) -> bool:
    return pair not in EXCLUDED


ROWS = covering(FACTORS, allowed=allowed, seed=4)
FIRST = {factor: values[0] for factor, values in FACTORS.items()}
WRAPPING = [
    # codes are entered anew in the chunk in which the window wraps
    {**FIRST, "policy": "window", "codec": "int4", "prompts": "recache", "passes": "captured"},
    {**FIRST, "policy": "rolling", "codec": "int2 qvg", "prompts": "recache", "state": "restored", "change": "5"},
    {**FIRST, "policy": "infinity", "codec": "int2 qvg release", "prompts": "recache", "pattern": "c3-3"},
    {**FIRST, "policy": "relax paper", "codec": "fp8", "prompts": "recache", "context": "noisy", "guidance": "on", "change": "6"},
]
MORE = [row for seed in (0, 1, 2) for row in covering(FACTORS, allowed=allowed, seed=seed, tries=3)]
"""The same pairs in other company."""
PROMPTS = {"first": 2, "second": 5}


def prompt(text: str) -> Condition:
    """The condition of a prompt of a timeline."""
    return condition(tiny_config(), seed=PROMPTS[text])


def change_block(row: Row) -> int:
    """Where the prompt changes: as the window wraps, or before a policy that merges does so."""
    early = row["policy"] in MERGING and row["prompts"] == "recache"
    return int(row.get("change", (3 if row["pattern"] == "c1-1" else 1) if early else 4))


def recipe_of(row: Row) -> SamplingRecipe:
    return SamplingRecipe(**{"kind": "few_step", "pattern": row["pattern"], **CONTEXTS[row["context"]], **SCHEDULES[row["schedule"]]})


def spec_of(row: Row) -> StreamSpec:
    recipe, (policy, _) = recipe_of(row), POLICIES[row["policy"]]
    codec = None if CODECS[row["codec"]] is None else KVCodec(CODECS[row["codec"]])
    if row["ranks"] == "2" and hasattr(policy, "reduce"):
        policy = replace(policy, reduce=summed)
    return StreamSpec(
        recipe, LATENT, batch=2, num_frames=recipe.blocks.frames_before(BLOCKS[row["pattern"]]), noise=row["noise"], policy=policy,
        keys="pre_rope" if codec is not None and policy.any_keys else None, kv_codec=codec, look_ahead=row["ahead"] == "on",
        settled=row["settled"] == "on",
    )  # fmt: skip


def summed(x: torch.Tensor) -> torch.Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


def model_of(row: Row, *, sharded: bool) -> Denoiser | Guided:
    net = tiny_net(in_dim=LATENT[0], out_dim=LATENT[0])
    if sharded:
        shard_sequence(net, group=dist.group.WORLD)
    model = Denoiser(net, Precision.preset("fp64")).eval_params()
    return Guided(model, condition(tiny_config(), batch=1, seed=9), 2.0) if row["guidance"] == "on" else model


def given(row: Row) -> torch.Tensor | None:
    frames = recipe_of(row).blocks.first
    draw = torch.Generator().manual_seed(3)
    return None if row["start"] == "noise" else torch.randn(2, LATENT[0], frames, *LATENT[1:], generator=draw, dtype=torch.float64)


def timeline(row: Row) -> Timeline:
    """A prompt, or two that change at `change_block`: four latent frames are a second."""
    at, end = (recipe_of(row).blocks.frames_before(b) / 4 for b in (change_block(row), BLOCKS[row["pattern"]]))
    return Timeline((Segment("first"),) if row["prompts"] == "one" else (Segment("first", at), Segment("second", end - at)))


def played(row: Row) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents and pixels of a row by a session, after the middle also from its snapshot."""
    model, spec, make = model_of(row, sharded=row["ranks"] == "2"), spec_of(row), CODERS[row["decoder"]]
    codec = None if make is None else make()

    def opened() -> Session:
        return Session(model, codec, prompt("first"), spec, prefix=given(row))

    def going(session: Session):
        mode = "recache" if row["prompts"] == "recache" else "keep"
        return play(session, timeline(row), prompt, mode=mode, blend=int(row["prompts"] == "blend"))

    session = opened()
    stream, middle = going(session), change_block(row)
    first = list(itertools.islice(stream, middle))
    state = None if row["state"] == "goes on" else session.snapshot()
    rest = list(stream)
    if state is not None:
        session = opened() if row["state"] == "restored elsewhere" else session
        session.restore(state)
        for a, b in zip(rest, going(session), strict=True):
            assert torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames)
    latents, frames = (torch.cat([getattr(chunk, name) for chunk in first + rest], dim=2) for name in ("latents", "frames"))
    session.close()
    return latents, None if codec is None else frames


def expected(row: Row) -> torch.Tensor:
    """Latents by the oracle."""
    spec, blending = spec_of(row), row["prompts"] == "blend"
    prefix, at, ranks = given(row), change_block(row), int(row["ranks"])
    old, new = prompt("first"), prompt("second")

    def cond(block: int) -> Condition:
        if row["prompts"] == "one" or block < at:
            return old
        return Condition((old.text + new.text) / 2) if blending and block == at else new

    oracle = Oracle(
        model_of(row, sharded=False), cond, spec.recipe, copy.deepcopy(POLICIES[row["policy"]][1]),
        spec.new_noise(0 if prefix is None else 1, device="cpu"), LATENT, 2, codec=spec.kv_codec, prefix=prefix,
        recached=frozenset({at} if row["prompts"] == "recache" else ()), ranks=ranks,
    )  # fmt: skip
    with torch.no_grad():
        return torch.cat([oracle.chunk(block) for block in range(BLOCKS[row["pattern"]])], dim=2)


def compare(row: Row, found: torch.Tensor, frames: torch.Tensor | None) -> None:
    wanted = expected(row)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-6 * (1 + float(wanted.abs().max())))
    if frames is not None:
        whole = CODERS[row["decoder"]]().decode(found)
        torch.testing.assert_close(frames, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def name_of(row: Row) -> str:
    return "-".join(value for factor, value in row.items() if value != FIRST.get(factor))


def test_the_table_holds_all_pairs():
    assert set().union(*map(pairs_of, ROWS)) == all_pairs(FACTORS, allowed=allowed) and len(ROWS) < 100


def on_ranks(count: str) -> list:
    slow = [pytest.param(row, marks=pytest.mark.slow) for row in MORE if row["ranks"] == count]
    return [row for row in ROWS + WRAPPING if row["ranks"] == count] + slow


@pytest.mark.parametrize("row", on_ranks("1"), ids=name_of)
def test_options_together(monkeypatch, row):
    if row["passes"] == "captured":
        monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    compare(row, *played(row))


@pytest.mark.parametrize("policy", MERGING)
def test_a_recache_after_a_policy_merged_is_refused_and_the_stream_goes_on(policy):
    row = {**FIRST, "policy": policy, "pattern": "c3-3"}
    session = Session(model_of(row, sharded=False), None, prompt("first"), spec_of(row))
    chunks = [session.step().latents for _ in range(4)]
    receipt = session.set_condition(prompt("second"), mode="recache")
    with pytest.raises(SwitchRefused, match="mode='recache' replays cached chunks.*use mode='keep', or a policy that keeps whole chunks"):
        session.step()
    assert receipt.refused and receipt.applied_at is None
    compare(row, torch.cat([*chunks, session.step().latents, session.step().latents], dim=2), None)
    with pytest.raises(Merged):
        expected({**row, "prompts": "recache", "change": "4"})


def test_a_timeline_with_a_stream_that_works_ahead_is_refused():
    row = {**ROWS[0], "ranks": "1", "prompts": "keep", "ahead": "on", "start": "noise"}
    with pytest.raises(ConfigError, match="a timeline needs look_ahead=False"):
        played(row)


def played_all(rows: list[Row]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [played(row) for row in rows]


@pytest.mark.parametrize("table", [ROWS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_options_together_on_two_ranks(tmp_path, table):
    rows = [row for row in table if row["ranks"] == "2"]
    first, second = run_ranks(2, played_all, rows, tmp_path=tmp_path)
    for row, (latents, frames), (same, _) in zip(rows, first, second, strict=True):
        assert torch.equal(latents, same)
        compare(row, latents, frames)
