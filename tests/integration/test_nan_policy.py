"""trainer.nan_policy=skip_sample: every term of every stage leaves a sample that is not finite out,
and the others as they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.configs import registry_distill
from rcm.configs.build_data import build_loader, negative_condition
from rcm.configs.build_method import build_method
from rcm.configs.build_nets import NetBuilder
from rcm.configs.compose import compose_run
from rcm.core.rng import StepRng
from rcm.parallel.mesh import ParallelDims
from tests.integration.entry import small

TEACHERS = {"causal": "net_causal_teacher", "whole": "net_bidirectional_teacher", "rcm": "net_teacher", "critic": "net_fake_score"}
STAGES = {
    "toy_bidirectional": "",
    "toy_tf_c3-3": "",
    "toy_df_c3-3": "",
    "toy_tf_kd_c3-3": "",
    "toy_df_kd_c3-3": "",
    "toy_tf_dscm_c3-3": "causal",
    "toy_tf_meanflow_c3-3": "causal",
    "toy_sf_dmd_2step_c3-3": "whole critic",
    "toy_sf_dmd_gan_c3-3_replayed": "whole critic",
    "toy_rCM": "rcm critic",
}
"""Experiment -> the networks that it has beside its student."""


@pytest.mark.parametrize("name", STAGES)
def test_a_sample_that_is_not_finite_is_left_out(name: str, tmp_path: Path) -> None:
    registry_distill.register()
    roles = ("net", *(TEACHERS[word] for word in STAGES[name].split()))
    words = [f"experiment={name}", *small(tmp_path / "job", roles=roles), "dataloader_train.batch_size=2", "trainer.nan_policy=skip_sample"]
    config = compose_run([*words, "model.config.allow_random_init=True"], environ={}).config
    nets = NetBuilder(config.model.config, dims=ParallelDims(), device=torch.device("cpu"), seed=0)
    method = build_method(config, nets, negative=lambda: negative_condition(config, device="cpu"))
    batch = next(iter(build_loader(config, dims=ParallelDims())))

    def spoil(_module: object, _inputs: object, output: object) -> object:
        return torch.cat([output[:1] * torch.inf, output[1:]]) if type(output) is torch.Tensor else None

    for role in ("student", "fake_score"):
        if role in method.trainable:
            method.trainable[role].register_forward_hook(spoil)
    for phase in {method.phase(iteration).role: method.phase(iteration) for iteration in range(6)}.values():
        skipped: dict[str, float] = {}
        for thunk in method.terms(phase, batch, StepRng(seed=0, step=phase.iteration, dp_rank=0)):
            term = thunk()
            assert term.value.isfinite(), (phase, term)
            for key in (key for key in term.logs if key.endswith("/nonfinite_samples")):
                skipped[key] = skipped.get(key, 0) + float(term.logs[key])
        assert skipped and all(count == pytest.approx(1) for count in skipped.values()), (phase, skipped)
