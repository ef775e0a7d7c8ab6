"""A discriminator in the training command: exact resume, checkpoints that others read as before,
what does not continue, two ranks as one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.pipelines.wan_files import network_weights
from rcm.pipelines.weight_files import open_weights
from tests.integration.entry import SIZES, everything, launch, lines, same, stored, weights, write_network
from tests.integration.test_ranks import SHARD, alike_in_every_layout, dmd
from tests.integration.test_resume import M, self_forced

GAN = [
    M + "gan={loss_scale:0.01,loss_scale_critic:0.5,hidden:8}",
    M + "gan.optimizer.lr=1e-2",
    M + "gan.scheduler.warm_up_steps=0",
]
EXACT = [M + "gan.r1=exact", M + "attention_backend=reference", M + "fused_layers=off"]
LORA = [M + "lora.rank=2", M + "bidirectional_guidance=1"]
DEEP = [f"{M}{role}.num_layers=3" for role in ("net_bidirectional_teacher", "net_fake_score")]
"""So that the last block that is read is not the last one; three layers of teacher and critic."""


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return write_network(tmp_path / "start.safetensors", seed=3)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="plain"),
        pytest.param(EXACT, id="exact", marks=pytest.mark.slow),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
    ],
)
def test_three_and_three_iterations_are_six(tmp_path: Path, start: Path, more: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(*self_forced(whole, start, *GAN, *more)) == 0
    assert launch(*self_forced(parts, start, *GAN, *more, iterations=3)) == 0
    assert launch(*self_forced(parts, start, *GAN, *more)) == 0
    assert lines(parts) == lines(whole) and same(everything(parts), everything(whole))
    found = everything(whole)
    prefixes = {key.partition(".")[0] for key in found}
    assert {"model/net_gan_head", "optim_gan_head/exp_avg_sq", "scheduler/net_gan_head"} <= prefixes
    assert not any("gan_head" in key for key in found if key.startswith("model/net_ema"))
    assert found["scheduler/net_gan_head.updates"] == found["scheduler/net_fake_score.updates"] == 4
    last = lines(whole)[-1]
    assert {"loss/gan_d", "gan/logit_real", "gan/logit_fake", "gan/r1", "gan/right", "grad_norm/gan_head", "lr/gan_head"} <= last.keys()
    assert last["gan/r1"] > 0 and "loss/gan_g" in lines(whole)[3]


@pytest.mark.slow
def test_the_fake_scores_weights_are_where_they_were(tmp_path: Path, start: Path) -> None:
    """The head adds keys of its own and renames none; student, average and fake score are read from
    the checkpoint, with adapters too.
    """
    plain, job, adapted = tmp_path / "plain", tmp_path / "job", tmp_path / "adapted"
    assert launch(*self_forced(plain, start, iterations=2)) == 0
    assert launch(*self_forced(job, start, *GAN, iterations=2)) == 0
    assert launch(*self_forced(adapted, start, *GAN, *LORA, iterations=2)) == 0
    keys, more = set(everything(plain)), set(everything(job))
    assert keys < more and all("gan_head" in key for key in more - keys)
    for run in (job, adapted):
        for copy in ("ema", "live", "fake_score"):
            assert set(network_weights(open_weights(run), weights=copy)) == set(stored(start))
    again = [M + f"student_ckpt={job}", M + f"fake_score_ckpt={plain}"]
    assert launch(*self_forced(tmp_path / "again", start, *GAN, *again, iterations=1)) == 0


@pytest.mark.slow
def test_a_discriminator_of_weight_zero_changes_no_number(tmp_path: Path, start: Path) -> None:
    plain, off = tmp_path / "plain", tmp_path / "off"
    assert launch(*self_forced(plain, start, iterations=3)) == 0
    assert launch(*self_forced(off, start, M + "gan.loss_scale=0", iterations=3)) == 0
    assert lines(plain) == lines(off) and same(everything(plain), everything(off))


@pytest.mark.slow
def test_what_does_not_continue_is_refused(tmp_path: Path, start: Path, capfd: pytest.CaptureFixture) -> None:
    job, plain = tmp_path / "job", tmp_path / "plain"
    assert launch(*self_forced(job, start, *GAN, iterations=2)) == 0
    assert launch(*self_forced(plain, start, iterations=2)) == 0
    before = everything(job)
    for run, words, told in (
        (job, [*GAN, M + "gan.loss_scale=0.02"], "model.config.gan.loss_scale: 0.01 there, 0.02 here"),
        (job, [*GAN, M + "gan.blocks=[0]", M + "gan.hidden=4"], "net_gan_head.readers.0.proj.bias"),
        (job, [], "holds a discriminator's head, this run has none; set model.config.gan.loss_scale as there, or start"),
        (plain, GAN, "holds no discriminator's head, this run trains one; set model.config.gan.loss_scale as there, or start"),
    ):
        capfd.readouterr()
        assert launch(*self_forced(run, start, *words)) != 0, words
        error = capfd.readouterr().err
        assert told in error and "Traceback" not in error, (words, error)
    assert same(everything(job), before)
    rate = M + "gan.optimizer.lr=1e-3"
    assert launch(*self_forced(job, start, *GAN, rate, iterations=3)) == 0, "rates may change on the way"


def test_a_nan_in_the_head_stops_before_the_update(tmp_path: Path, start: Path, capfd: pytest.CaptureFixture) -> None:
    """An update that blows up: the next look at a video is not finite, and the module is named."""
    job = tmp_path / "job"
    blow = [M + "gan.loss_scale_critic=1e30", M + "gan.r1_sigma=1e-18", M + "gan.optimizer.lr=1"]
    assert launch(*self_forced(job, start, *GAN, *blow)) != 0
    error = capfd.readouterr().err
    assert "is not finite" in error and "weights were left as they were" in error and "Traceback" not in error


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_narrow_and_wide(tmp_path: Path, start: Path, precision: str) -> None:
    """bfloat16 is FSDP2 on one rank: master weights of the head stay float32."""
    job = tmp_path / "job"
    assert launch(*self_forced(job, start, *GAN, f"precision={precision}", iterations=4)) == 0
    found = everything(job)
    dtypes = {found[key].dtype for key in found if key.startswith("model/net_gan_head")}
    assert dtypes == {torch.float32 if precision == "bf16" else torch.float64}
    assert found["model/net_gan_head.logit.weight"].abs().max() > 0


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_equal_one_and_resume_exactly(tmp_path: Path) -> None:
    """Sequences over two ranks, and parameters: with a discriminator that stops before the last
    block.
    """
    start, deep = (write_network(tmp_path / f"{n}.safetensors", seed=3, num_layers=n) for n in (1, 3))

    def words(job: Path, *more: str, iterations: int = 3) -> list[str]:
        teacher = M + f"bidirectional_teacher_ckpt={deep}"
        return dmd(job, start, *GAN, M + "gan.blocks=[0,1]", *DEEP, teacher, *more, iterations=iterations)

    assert SIZES["num_layers"] == 1
    parts = tmp_path / "parts"
    alike_in_every_layout(tmp_path, words, words(parts, SHARD, iterations=2), words(parts, SHARD))
    assert lines(tmp_path / "parts") == lines(tmp_path / "shard")
    assert same(everything(tmp_path / "parts"), everything(tmp_path / "shard"))
    one, two = (weights(tmp_path / name, "fake_score") for name in ("one", "context"))
    assert all(torch.allclose(one[k], two[k], rtol=1e-6, atol=1e-8) for k in one)
