"""Rollouts longer than what is judged, against every chunk of the video in one masked float64 pass
per step.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time_sampling import UniformShift
from rcm.losses.dmd import dmd_loss
from rcm.methods.base import Phase
from rcm.methods.schedule import Alternation
from rcm.methods.sf_dmd import SelfForcedDMD
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.denoiser import Denoiser
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from rcm.parallel.checkpointing import checkpoint_blocks
from rcm.pipelines.streaming import stream_latents
from rcm.rollout.noise import VideoNoise
from rcm.rollout.plan import ContextRule, StepSchedule
from rcm.rollout.recipe import SamplingRecipe
from tests.support.tiny_nets import GRID, condition, latents, tiny_config, tiny_net

MIDS = ((15 / 16, 5 / 6), (5 / 8,))
FP64 = Precision.preset("fp64")
LONG = {"c1-1": (3, 9), "c3-3": (6, 18), "c1-4": (5, 17)}
"""Pattern -> judged frames, frames of the longest rollout."""
CASES = [(name, step) for name in LONG for step in (1, 2, 3)]


class Watched(Denoiser):
    """A denoiser that remembers its caches and the most chunks that any of them held at a pass."""

    def new_cache(self, **options):
        self.cache, self.most = super().new_cache(**options), 0
        return self.cache

    def velocity(self, *inputs, **options):
        self.most = max(self.most, getattr(self, "cache", KVCache(1, capacity_tokens=1)).num_chunks)
        return super().velocity(*inputs, **options)


def method(name: str, *, window: int | None = 2, sinks: int = 1, **options) -> SelfForcedDMD:
    student, teacher, fake = (kind(tiny_net(seed=s), FP64) for s, kind in ((1, Watched), (2, Denoiser), (3, Denoiser)))
    forcing = TeacherForcing(BlockPattern.parse(name), window, sinks)
    law = {"law": UniformShift(5.0), "alternation": Alternation(6)}
    return SelfForcedDMD(student, teacher.eval_params(), fake, forcing=forcing, schedule=StepSchedule(MIDS), **law, **options)


def batch(name: str) -> LatentBatch:
    return LatentBatch(latents(LONG[name][0]), condition(tiny_config()).text, ["a", "b"], ["0", "1"])


def trained(m: SelfForcedDMD, phase: Phase, name: str, rng: StepRng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the terms and gradients of the role."""
    values = []
    for thunk in m.terms(phase, batch(name), rng):
        values.append(thunk().value)
        values[-1].backward()
    grads = {key: p.grad for key, p in m.trainable[phase.role].named_parameters() if p.grad is not None}
    return torch.stack(values).detach().sum(), grads


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_a_whole_window_over_a_rollout_of_the_judged_length_is_sf_dmd_bit_for_bit(role):
    phase, rng = Phase(role, 1, 7), StepRng(0, 7, 0)
    plain = trained(method("c3-3", window=None, sinks=0), phase, "c3-3", rng)
    long = trained(method("c3-3", window=9, sinks=0, rollout_frames=6), phase, "c3-3", rng)
    assert torch.equal(plain[0], long[0]) and plain[1].keys() == long[1].keys()
    assert all(torch.equal(plain[1][key], long[1][key]) for key in plain[1])


def masked_rollout(m: SelfForcedDMD, student: Denoiser, name: str, plans, noise: VideoNoise, first: int) -> torch.Tensor:
    """The frames from `first` on, each step of each chunk as one pass over the whole video under an
    explicit mask: no cache policy, no dropped chunk, only the last step of a judged chunk with
    gradient.
    """
    total, cond, forcing = plans[-1].stop, condition(tiny_config()), m.rollout.forcing
    structure = {"grid": GRID, "pattern": BlockPattern.parse(name), "window": forcing.window, "sinks": forcing.sinks}
    clean, at = torch.zeros(2, 4, total, 4, 6, dtype=torch.float64), torch.zeros(2, total, dtype=torch.float64)
    made = []
    for plan in plans:
        frames = slice(plan.start, plan.stop)
        cache = student.new_cache(num_frames=total, grid=GRID)
        with torch.no_grad():
            student.enter_context(clean, at, cond, TokenLayout.context(total, **structure), cache=cache.append())
        x = noise.start(frames)
        for step, (t, t_next) in enumerate(zip(plan.times[:-1], plan.times[1:], strict=True)):
            noisy, times = torch.zeros_like(clean), torch.zeros(2, total, dtype=torch.float64)
            noisy[:, :, frames], times[:, frames] = x, t
            with torch.set_grad_enabled(t_next == 0 and plan.stop > first):
                v = student.velocity(noisy, times, cond, TokenLayout.noisy_over_context(total, **structure), cache=cache.readonly())
                x0 = x - t * v[:, :, frames]
            x = x0 if t_next == 0 else (1 - t_next) * x0 + t_next * noise.step(step, frames)
        made.append(x)
        clean[:, :, frames] = x.detach()
    return torch.cat(made, dim=2)[:, :, first:]


@pytest.mark.parametrize("replayed", [False, True], ids=["plain", "replayed"])
@pytest.mark.parametrize(("name", "step"), CASES)
def test_gradients_of_the_judged_window_are_those_of_masked_passes(name, step, replayed):
    judged, frames = LONG[name]
    m, phase, rng = method(name, rollout_frames=frames, replayed=replayed), Phase("student", step, 0), StepRng(0, step, 0)
    plans, first = m.rollout._plans(judged, rng, index=step)
    value, got = trained(m, phase, name, rng)
    shape = (2, 4, plans[-1].stop, 4, 6)
    noise = VideoNoise.for_plans(plans, shape, generator=rng.generator("rollout"), dtype=torch.float64, device="cpu")
    oracle = Denoiser(tiny_net(seed=1, attention="reference"), FP64)
    video = masked_rollout(m, oracle, name, plans, noise, first)
    assert video.shape[2] == judged
    loss = dmd_loss(video, m._judge(video, condition(tiny_config()), rng)[0]).value
    loss.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-9, atol=0)
    expected = {key: p.grad for key, p in oracle.net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got.keys() >= expected.keys() and len(expected) > 20
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-8, atol=1e-9 * float(grad.abs().max()), msg=key)


def test_places_are_drawn_among_all_blocks_and_are_those_of_every_rank():
    m = method("c3-3", rollout_frames=18)
    places = [m.rollout._plans(6, StepRng(0, step, 0), index=0)[1] for step in range(60)]
    assert set(places) == {0, 3, 6, 9, 12}
    assert places == [m.rollout._plans(6, StepRng(0, step, 3), index=0)[1] for step in range(60)]
    inside = method("c1-4", rollout_frames=17).rollout
    # a window may begin inside a block
    assert {inside._plans(6, StepRng(0, step, 0), index=0)[1] for step in range(60)} == {3, 7, 11}


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_the_cache_holds_the_window_the_sinks_and_the_judged_chunks(role):
    """Whatever the length of the rollout: what a streamed chunk sees, then no more than the judged
    chunks beside it.
    """
    most, rooms = [], []
    for frames in (18, 60):
        m = method("c3-3", rollout_frames=frames)
        far = next(s for s in range(200) if m.rollout._plans(6, StepRng(0, s, 0), index=0)[1] == frames - 6)
        trained(m, Phase(role, 0, 0), "c3-3", StepRng(0, far, 0))
        most.append(m.student.most)
        rooms.append(m.student.cache.capacity_tokens // (GRID[0] * GRID[1]))
    # 1 of the window beside the own, 1 sink, and the first of the two judged chunks
    assert most == [3, 3]
    assert rooms == [(2 + 1) * 3 + 6] * 2


@pytest.mark.parametrize("name", LONG)
def test_a_checkpoint_streams_what_was_rolled_out(name):
    """The chunks of a recipe with window and sinks, over a cache that drops, are those of the
    training rollout at full length.
    """
    judged, frames = LONG[name]
    m = method(name, rollout_frames=frames)
    step = next(s for s in range(200) if m.rollout._plans(judged, StepRng(0, s, 0), index=2)[1] == frames - judged)
    rng = StepRng(0, step, 0)
    own = m.rollout(condition(tiny_config()), latents(judged), rng, index=2, grad=False)
    recipe = SamplingRecipe("few_step", name, mids=MIDS, sigma_max=1e12, window=2, sinks=1)
    options = {"shape": (2, 4, frames, 4, 6), "generator": rng.generator("rollout")}
    made = torch.cat([x for _, x in stream_latents(m.student, condition(tiny_config()), recipe, **options)], dim=2)
    torch.testing.assert_close(made[:, :, -judged:], own.video.float(), rtol=1e-5, atol=1e-5)
    everything = replace(recipe, window=None, sinks=0)
    options["generator"] = rng.generator("rollout")
    other = torch.cat([x for _, x in stream_latents(m.student, condition(tiny_config()), everything, **options)], dim=2)
    assert (made - other)[:, :, -judged:].abs().max() > 1e-3


def test_recomputation_reads_what_was_read():
    """A first block longer than the others leaves a gap as it is dropped; chunks that close it
    later would move under recomputation.
    """
    grads = []
    for mode in ("none", "block_wise"):
        m = method("c4-1", window=3, sinks=0, rollout_frames=14)
        checkpoint_blocks(m.student.net, mode=mode)
        step = next(s for s in range(200) if m.rollout._plans(5, StepRng(0, s, 0), index=2)[1] == 6)
        data = LatentBatch(latents(5), condition(tiny_config()).text, ["a", "b"], ["0", "1"])
        (thunk,) = m.terms(Phase("student", 2, 0), data, StepRng(0, step, 0))
        thunk().value.backward()
        grads.append({key: p.grad for key, p in m.student.net.named_parameters() if p.grad is not None})
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_noisy_context_and_replay_agree_over_a_window():
    grads = []
    for replayed in (False, True):
        m = method("c3-3", rollout_frames=18, replayed=replayed, context=ContextRule(True, 1))
        grads.append(trained(m, Phase("student", 2, 0), "c3-3", StepRng(0, 4, 0))[1])
    for key in grads[0]:
        torch.testing.assert_close(grads[1][key], grads[0][key], rtol=1e-9, atol=1e-9)
