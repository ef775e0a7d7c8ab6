"""What docs/extending.md promises: a condition and a backbone of one's own reach every method; the
toy policy is a row of test_eviction.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.rng import StepRng
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time_sampling import ConsistencyGrid, LogNormal
from rcm.methods.causal_diffusion import BidirectionalDiffusion, DiffusionForcing, TeacherForcedDiffusion
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.methods.tf_dcm import TFDiscreteConsistency
from rcm.methods.tf_scm import TFContinuousConsistency
from rcm.nets.denoiser import Denoiser, Guided
from tests.support.tiny_nets import condition, latents, tiny_config, tiny_net
from tests.support.toy_extensions import Mixer, Steered, SteeredBatch, SteeredDiT

PATTERN = BlockPattern(1, 1)
LAW = LogNormal(0.0, 1.0)


def batch(*, frames: int = 3, actions: float = 1.0) -> SteeredBatch:
    text = condition(tiny_config()).text
    return SteeredBatch(latents(frames), text, ["a", "b"], ["0", "1"], actions=actions * torch.ones(2, frames, 2, dtype=torch.float64))


def steered() -> Denoiser:
    net = SteeredDiT(tiny_config(), attention="sdpa").double()
    net.load_state_dict(tiny_net().state_dict())
    torch.manual_seed(0)
    return Denoiser(net.steer_by(2), Precision.preset("fp64"))


METHODS = {
    "tf": lambda m: TeacherForcedDiffusion(m, forcing=TeacherForcing(PATTERN), law=LAW, weight=None, loss_scale=1.0),
    "df": lambda m: DiffusionForcing(m, pattern=PATTERN, strategy="random", law=LAW, weight=None, loss_scale=1.0),
    "tf_dcm": lambda m: TFDiscreteConsistency(m, m, forcing=TeacherForcing(PATTERN), grid=ConsistencyGrid(4, 1, 3.0)),
    "tf_scm": lambda m: TFContinuousConsistency(m, m, forcing=TeacherForcing(PATTERN), law=LAW, tangent_warmup=0),
}


def loss(method, given) -> torch.Tensor:
    (term,) = method.terms(method.phase(0), given, StepRng(seed=0, step=0, dp_rank=0))
    return term().value


@pytest.mark.parametrize("name", METHODS)
def test_a_new_condition_reaches_the_network_through_every_method(name):
    model = steered()
    method = METHODS[name](model)
    value = loss(method, batch())
    value.backward()
    assert model.net.steer.weight.grad.abs().max() > 0
    assert value.detach() != loss(method, batch(actions=2.0)).detach(), "other actions, same loss"


def test_a_new_condition_passes_guidance_and_moves():
    cond = batch().condition().to(dtype=torch.float32)
    assert isinstance(cond, Steered) and cond.actions.dtype == torch.float32 and len(cond.tensors()) == 2
    model = Guided(steered(), batch(actions=0.0).condition(), 2.0)
    assert torch.isfinite(loss(METHODS["df"](model), batch()))


def test_a_new_backbone_trains_by_the_methods_as_they_are():
    model = Mixer(4)
    method = BidirectionalDiffusion(model, law=LAW, weight=None, loss_scale=1.0)
    optimizer = torch.optim.Adam(method.trainable["student"].parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        losses.append(loss(method, batch()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(loss(METHODS["df"](model), batch()))
