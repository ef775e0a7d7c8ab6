"""Captured passes of sessions, with the step itself run again in place of a graph: equal to the
eager loop bit by bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.pipelines import engine
from rcm.pipelines.session import Session
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.pipelines.test_session import NOISY, latents, opened, spec
from tests.support.rerun_loop import RerunLoop
from tests.support.tiny_nets import condition, tiny_config, tiny_net

POLICIES = {
    "window": SlidingWindow(3, 1),
    "everything": None,
    "relative": InfinityRope(blocks=3, sinks=1, horizon=9),
}


@pytest.mark.parametrize(("kind", "guided"), [("few_step", True), ("flow_map", False), ("ode", True)])
@pytest.mark.parametrize("policy", POLICIES)
def test_captured_passes_read_nothing_but_device_data(denoiser, monkeypatch, policy, kind, guided):
    """A step that was made once serves every later pass of its length: latents, times, slots,
    tables and prompts are its inputs. Equal to the eager loop bit by bit through fill-up, wrap and
    a change of prompt.
    """
    if kind == "flow_map":
        denoiser = Denoiser(tiny_net(two_times=True), Precision.preset("fp64")).eval_params()
    model = Guided(denoiser, condition(tiny_config(), batch=1, seed=9), 2.0) if guided else denoiser
    recipe = SamplingRecipe("ode", "c3-3", ode_steps=3) if kind == "ode" else replace(NOISY, pattern="c1-3", kind=kind)
    chosen = POLICIES[policy]
    wanted = spec(recipe, num_frames=recipe.blocks.frames_before(8)) if chosen is None else spec(recipe, policy=chosen)

    def run() -> tuple[torch.Tensor, Session]:
        session = opened(model, wanted)
        first = latents(session, 4)
        session.set_condition(condition(tiny_config(), seed=5))
        return torch.cat([first, latents(session, 4)], dim=2), session

    expected, _ = run()
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    found, session = run()
    counts = session.loop.counts
    assert counts["replayed"] > counts["captured"] > 0 and counts["eager"] <= 2, counts
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loop", ["eager", "captured"])
def test_a_condition_that_passes_cannot_take_is_refused_and_the_stream_goes_on(denoiser, monkeypatch, loop):
    if loop == "captured":
        monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    session, alone = (opened(denoiser, spec(NOISY, policy=SlidingWindow(3))) for _ in range(2))
    first, whole = latents(session, 3), latents(alone, 6)
    text = condition(tiny_config()).text
    wrong = {"longer": Condition(text.repeat(1, 3, 1)), "wider": Condition(text.repeat(1, 1, 2)), "elsewhere": Condition(text.to("meta"))}
    told = {"longer": "up to 8, 24", "wider": "up to 8, 24", "elsewhere": "lies on meta, the network on cpu"}
    if loop == "captured":
        wrong |= {"shorter": Condition(text[:, :3]), "prepared": denoiser.prepare(Condition(text))}
        told |= {"shorter": r"text \[2, 5, 24\].*got text \[2, 3, 24\]", "prepared": "prepare.. it like the first"}
    for name, cond in wrong.items():
        for use in (session.set_condition, session.restart, lambda cond: opened(denoiser, spec(policy=SlidingWindow(3)), cond=cond)):
            if name not in ("shorter", "prepared") or use in (session.set_condition, session.restart):
                with pytest.raises(ConfigError, match=told[name]):
                    use(cond)
    assert torch.equal(torch.cat([first, latents(session, 3)], dim=2), whole)


def test_passes_that_a_policy_watches_run_one_by_one(denoiser, monkeypatch):
    """It chooses tokens by what it was shown: a captured pass would show it nothing."""
    wanted = spec(replace(NOISY, pattern="c1-1"), policy=DeepForcing(1, 4, 1, 0))
    expected = latents(opened(denoiser, wanted), 8)
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    session = opened(denoiser, wanted)
    assert torch.equal(latents(session, 8), expected) and session.loop.counts["replayed"] > 0


def test_captured_passes_make_the_rows_of_a_time_once(denoiser, monkeypatch):
    """One embedding per time of the schedule, whatever number of passes; weights that changed are
    seen from the next video on.
    """
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    session, made = opened(denoiser, spec(NOISY, policy=SlidingWindow(3))), []
    hook = denoiser.net.time_projection.register_forward_pre_hook(lambda *_: made.append(1))
    first = latents(session, 8)
    assert len(made) == session.loop.counts["eager"] + 3, "three times: 1 less a little, 0.8 and 0.5"
    session.restart()
    with torch.no_grad():
        denoiser.net.blocks[0].modulation.add_(0.1)
    changed, eager = latents(session, 8), latents(opened(denoiser, spec(NOISY, policy=SlidingWindow(3))), 8)
    with torch.no_grad():
        denoiser.net.blocks[0].modulation.sub_(0.1)
    hook.remove()
    assert not torch.equal(changed, first) and torch.equal(changed, eager)
