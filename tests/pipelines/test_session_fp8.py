"""Streams whose attention runs in FP8: near the exact ones, captured like eager, snapshots,
restarts, refusals.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.kv_fp8 import Fp8Store
from rcm.pipelines import engine
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.pipelines.test_session import latents
from tests.support.rerun_loop import RerunLoop
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.8, 0.5), (0.5,)))
POLICIES = {
    "window": SlidingWindow(3, 1),
    "relative": InfinityRope(blocks=3, sinks=1, horizon=9),
    "rolling sink": RollingSink(4, 3, 1),
    "chosen": DeepForcing(1, 4, 1, 0),
    "merged": MemRope(1, 1),
}


def opened(denoiser, policy: CachePolicy, *, attention: str = "fp8", recipe: SamplingRecipe = RECIPE, cond=None) -> Session:
    spec = StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, policy=policy, attention=attention)
    return Session(denoiser, None, condition(tiny_config()) if cond is None else cond, spec)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_in_fp8_is_near_the_exact_one(denoiser, policy):
    """Through fill-up and wrap, whether keys are stored turned or are turned, merged or chosen at
    every read.
    """
    exact, found = (latents(opened(denoiser, POLICIES[policy], attention=a), 7) for a in ("net", "fp8"))
    off, whole = ((x * x).sum(dim=(0, 1, 3, 4)).sqrt() for x in (found - exact, exact))
    error = off / whole
    assert error.min() > 1e-4 and error.max() < 0.03


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("policy", ["window", "relative"])
def test_captured_passes_give_the_eager_latents(denoiser, policy, guided):
    """The captured steps are run again on what their inputs hold, without a graph; a restart must
    set the scales anew.
    """
    model = Guided(denoiser, condition(tiny_config(), batch=1, seed=9), 2.0) if guided else denoiser

    def run() -> tuple[torch.Tensor, Session]:
        session = opened(model, POLICIES[policy], recipe=replace(RECIPE, pattern="c1-3"))
        found = [latents(session, 5)]
        session.set_condition(condition(tiny_config(), seed=5))
        found.append(latents(session, 2))
        session.restart(condition(tiny_config(), seed=2))
        return torch.cat([*found, latents(session, 3)], dim=2), session

    expected, _ = run()
    original = Fp8Store.settle
    with patch.object(engine, "ChunkLoop", RerunLoop), patch.object(Fp8Store, "settle", autospec=True, side_effect=original) as settled:
        found, session = run()
    # a replayed graph sets scales on the device alone, so who replays it says so, once per restart
    assert settled.call_count == 1 + guided
    counts = session.loop.counts
    assert counts["replayed"] > counts["captured"] > 0 and counts["eager"] <= 2, counts
    assert torch.equal(found, expected)


def test_snapshots_and_restarts_go_on_bit_by_bit(denoiser):
    session = opened(denoiser, POLICIES["window"])
    latents(session, 3)
    state = session.snapshot()
    following = latents(session, 3)
    other = opened(denoiser, POLICIES["window"])
    for target in (session, other):
        target.restore(state)
        assert torch.equal(latents(target, 3), following)
    session.restart()
    assert torch.equal(latents(session, 4), latents(opened(denoiser, POLICIES["window"]), 4))


def test_what_cannot_be_is_refused_by_name(denoiser):
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), num_frames=4)
    with pytest.raises(ConfigError, match="attention='fp4' is not one of 'net', 'fp8'"):
        replace(spec, attention="fp4")
    codec = KVCodec(KVCodecSpec.from_flags({"kv_dtype_k": "int4", "kv_dtype_v": "int4"}))
    with pytest.raises(ConfigError, match="attention='fp8' keeps FP8 codes of its own beside a plain cache; leave out kv_codec"):
        replace(spec, attention="fp8", kv_codec=codec)
    with (
        patch("rcm.nets.denoiser.obstacle", lambda *_, **__: "this card is a toaster"),
        pytest.raises(ConfigError, match="not possible here: this card is a toaster; use attention='net'"),
    ):
        opened(denoiser, POLICIES["window"])


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["window", "relative"])
def test_on_a_card_captured_and_eager_streams_are_as_near_to_each_other_as_rounding_lets_them(policy):
    """The kernels, inside graphs, with the codes written where they are read; a restart in the same
    memory.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a card of compute capability 9.0")
    net = tiny_net(dtype=torch.bfloat16, dim=256, num_heads=2)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(0.3 if weight.dim() > 1 else 1)
    model = Denoiser(net.cuda(), Precision.preset("bf16")).eval_params()

    def run(attention: str, graphs: str) -> torch.Tensor:
        spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=POLICIES[policy], attention=attention, graphs=graphs)
        with Session(model, None, model.prepare(condition(tiny_config())), spec, device="cuda") as session:
            first = latents(session, 7)
            session.restart()
            assert torch.equal(latents(session, 7), first) or graphs == "on"
            return first.double()

    exact, eager, captured = run("net", "off"), run("fp8", "off"), run("fp8", "on")

    def off(x: torch.Tensor) -> float:
        return float((x - exact).norm() / exact.norm())

    assert 1e-4 < off(eager) < 0.03 and off(captured) < 1.5 * off(eager)
