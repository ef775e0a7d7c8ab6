"""TF-KD and DF-KD: what the student sees, and what it is regressed onto."""

from __future__ import annotations

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.methods.base import Phase
from rcm.methods.ode_pairs import ODEPairs
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from tests.support.tiny_nets import GRID, HEIGHT, WIDTH, tiny_net

TIMES = (0.0, 1.0, 0.5)


def batch() -> LatentBatch:
    g = torch.Generator().manual_seed(0)
    trajectory = torch.randn(2, 3, 4, 6, HEIGHT, WIDTH, generator=g)
    return LatentBatch(
        torch.randn(2, 4, 6, HEIGHT, WIDTH, generator=g), torch.randn(2, 5, 24, generator=g), ["a", "b"], ["0", "1"], trajectory
    )


def method(*, per_block: bool, times=TIMES) -> ODEPairs:
    student = Denoiser(tiny_net(), Precision.preset("fp64"))
    return ODEPairs(student, forcing=TeacherForcing(BlockPattern.parse("c3-3")), times=times, per_block=per_block)


def loss(kd: ODEPairs, data: LatentBatch, step: int) -> float:
    (term,) = [thunk() for thunk in kd.terms(Phase("student", 0, 0), data, StepRng(0, step, 0))]
    return float(term.value.detach())


def test_tf_kd_sees_the_data_and_learns_the_trajectorys_end():
    """By hand: the packed pass has the data as its clean half; both states occur over a few
    steps.
    """
    kd, data = method(per_block=False), batch()
    layout = TokenLayout.teacher_forcing(6, grid=GRID, pattern=kd.forcing.pattern)

    def told(index: list[int]) -> float:
        t = torch.tensor([[TIMES[i]] for i in index], dtype=torch.float64)
        x_t = torch.stack([row[i] for row, i in zip(data.trajectory, index, strict=True)])
        times = torch.cat([torch.zeros(2, 6, dtype=torch.float64), t.expand(-1, 6)], dim=1)
        with torch.no_grad():
            v = kd.student.velocity(torch.cat([data.latents, x_t], dim=2), times, Condition(data.text), layout)
        return float(((x_t - t.view(2, 1, 1, 1, 1) * v - data.trajectory[:, 0]) ** 2).mean())

    choices = {(a, b): told([a, b]) for a in (1, 2) for b in (1, 2)}
    assert len({round(value, 3) for value in choices.values()}) == 4
    found = [loss(kd, data, step) for step in range(12)]
    nearest = [min(choices, key=lambda pair: abs(choices[pair] - value)) for value in found]
    assert found == pytest.approx([choices[pair] for pair in nearest], rel=1e-5)
    assert len(set(nearest)) > 1


def test_df_kd_has_no_context():
    kd, data = method(per_block=True), batch()
    other = LatentBatch(data.latents + 1, data.text, data.prompts, data.keys, data.trajectory)
    assert loss(kd, data, 0) == loss(kd, other, 0) > 0
    assert loss(method(per_block=False), data, 0) != loss(method(per_block=False), other, 0)


@pytest.mark.parametrize("per_block", [False, True])
def test_another_number_of_states_names_both(per_block):
    kd, data = method(per_block=per_block, times=(0.0, 1.0, 0.75, 0.5)), batch()
    with pytest.raises(ConfigError, match=r"4 states.*kd_timesteps=\[1\.0, 0\.75, 0\.5\], got 3 states.*--times"):
        loss(kd, data, 0)
    with pytest.raises(ConfigError, match="got none"):
        loss(kd, LatentBatch(data.latents, data.text, data.prompts, data.keys), 0)
