"""Files that a run reads: those that it lacks are named by key, and those that it is given for
nothing; typed keys that nothing reads.
"""

from __future__ import annotations

import pytest
import torch

from rcm.configs.memory import require_here
from rcm.core.errors import ConfigError

SMALL = "experiment=causal_wan2pt1_1pt3B_res480p_t2v_"
M = "model.config."


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tf_c3-3", "student_ckpt"),
        ("tf_dcm_c3-3", "student_ckpt causal_teacher_ckpt neg_embed_path"),
        ("sf_dmd_c1-1", "student_ckpt bidirectional_teacher_ckpt neg_embed_path"),
        ("tf_scm_sf_dmd_c1-1", "student_ckpt causal_teacher_ckpt bidirectional_teacher_ckpt neg_embed_path"),
        ("sf_dmd_c1-1_debug", "neg_embed_path"),
    ],
)
def test_missing_inputs_are_listed_by_key(composed, name: str, keys: str) -> None:
    needed = {"dataloader_train.tar_path_pattern", *(M + key for key in keys.split())}
    assert {sentence.split()[0] for sentence in composed(SMALL + name).missing} == needed
    with pytest.raises(ConfigError, match="cannot start") as caught:
        composed(SMALL + name, require_inputs=True)
    assert all(key in str(caught.value) for key in needed)


def test_bidirectional_rcm_asks_for_its_teacher_and_the_negative_prompt(composed, tmp_path) -> None:
    row, data = "experiment=wan2pt1_1pt3B_res480p_t2v_rCM", "dataloader_train.tar_path_pattern=shards"
    assert [s.split()[0] for s in composed(row, data).missing] == [M + "teacher_ckpt", M + "neg_embed_path"]
    assert [s.split()[0] for s in composed(row, data, M + "teacher_guidance=1").missing] == [M + "teacher_ckpt"]


def test_paths_that_do_not_exist_are_named(composed, tmp_path) -> None:
    there = tmp_path / "weights.pt"
    there.touch()
    inputs = [f"{M}student_ckpt={there}", "dataloader_train.tar_path_pattern=shards", f"{M}fake_score_ckpt={tmp_path / 'nowhere'}"]
    run = composed(SMALL + "tf_c3-3", *inputs)
    assert [s.split("=")[0] for s in run.missing] == [M + "fake_score_ckpt"]
    assert "does not exist" in run.missing[0]


def test_guidance_asks_for_the_negative_prompt(composed, tmp_path) -> None:
    there = tmp_path / "weights.pt"
    there.touch()
    inputs = [f"{M}student_ckpt={there}", f"{M}causal_teacher_ckpt={there}", "dataloader_train.tar_path_pattern=shards"]
    assert "neg_embed_path is empty" in composed(SMALL + "tf_dcm_c3-3", *inputs).missing[0]
    assert not composed(SMALL + "tf_dcm_c3-3", *inputs, M + "causal_guidance=1").missing
    assert not composed(SMALL + "tf_dcm_c3-3", *inputs, f"{M}neg_embed_path={there}").missing


def test_files_that_a_run_reads_nowhere_are_named(composed, tmp_path) -> None:
    there = tmp_path / "weights.pt"
    there.touch()
    keys = ("causal_teacher_ckpt", "bidirectional_teacher_ckpt", "fake_score_ckpt", "neg_embed_path")
    given = [f"{M}{key}={there}" for key in keys]
    told = [f"{M}{key}={there} is not read by the stage and networks of this run" for key in keys]
    assert list(composed("experiment=toy_tf_c3-3", *given).unread) == told
    assert list(composed("experiment=toy_sf_dmd_c3-3", *given, M + "bidirectional_guidance=3").unread) == told[:1]
    assert not composed("experiment=toy_tf_c3-3").unread


TF, DMD, RCM, CUT = "toy_tf_c3-3", "toy_sf_dmd_2step_c3-3", "toy_rCM", "causal_wan2pt1_1pt3B_res480p_t2v_tf_c3-3"
SWITCHED_OFF = {
    "clipping": (TF, ["model.config.grad_clip_norm=0.5"], "model.config.grad_clip=True"),
    "average": (TF, ["model.config.ema={enabled: False, rate: 0.2}"], "model.config.ema={enabled: True, rate: 0.2}"),
    "skipped samples": (TF, ["trainer.nan_sample_limit=0.5"], "trainer.nan_policy=skip_sample"),
    "end of a cycle": (CUT, ["scheduler.f_min=0.1"], "scheduler.cycle_length=5000"),
    "start of a warm-up": (TF, ["scheduler.f_start=0.1", "scheduler.warm_up_steps=0"], "scheduler.warm_up_steps=3"),
    "shards of a procedural set": (TF, ["dataloader_train.tar_path_pattern=*.tar"], "data=toy_shards"),
    "size beside a size": (CUT, ["model.config.resolution=720p", "model.config.latent_hw=[8,8]"], "model.config.latent_hw=null"),
    "numbers of the other codec": (
        TF,
        ["model.config.tokenizer.gain=2.0", "model.config.tokenizer.name=wan"],
        "model.config.tokenizer.name=toy",
    ),
    "steps beside steps": (DMD, ["model.config.max_simulation_steps_fake=3"], "model.config.sf_simulation_steps_per_chunk=[]"),
    "times beside times": (DMD, ["model.config.backward_timesteps=[0.7,0.5,0.2]"], "model.config.sf_backward_timestep_schedules=[]"),
    "a difference's step": (RCM, ["model.config.fd_size=0.01"], "model.config.fd_type=1"),
    "end of the head's cycle": (
        "toy_sf_dmd_gan_c3-3",
        ["model.config.gan.scheduler.f_min=0.1"],
        "model.config.gan.scheduler.cycle_length=500",
    ),
    "angles": (RCM, ["model.config.backward_timesteps=[1.5,1.3,1.1]"], "model.config.dmd_fix_timesteps=True"),
}
"""Experiment, words of which the first has no effect, and the word with which it has."""


@pytest.mark.parametrize("case", SWITCHED_OFF)
def test_a_typed_key_that_another_one_turns_off_is_refused(composed, case: str) -> None:
    name, words, switch = SWITCHED_OFF[case]
    with pytest.raises(ConfigError, match=" has no effect while ") as refused:
        composed(f"experiment={name}", *words)
    assert str(refused.value).startswith(words[0].partition("={")[0].partition("=")[0])
    key = switch.partition("=")[0]
    more = ["model.config.sf_backward_timestep_schedules=[]"] if case == "steps beside steps" else []
    composed(f"experiment={name}", *(word for word in words if not word.startswith(f"{key}=")), switch, *more)


def test_what_is_so_anyway_may_be_typed(composed) -> None:
    composed(f"experiment={TF}", "model.config.grad_clip_norm=1.0", "model.config.resolution=480p")


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        (TF, ["model.config.student_update_freq=3", "optimizer.lr=1e-4"], ["model.config.student_update_freq=3 is not read by stage tf"]),
        (TF, ["model.config.optimizer_fake_score={lr: 0.1}"], 2 * ["model.config.optimizer_fake_score"]),
        (TF, ["model.config.df_timestep_strategy=fopp"], ["model.config.df_timestep_strategy=fopp is not read by stage tf"]),
        (
            DMD,
            ["model.config.tangent_warmup=5", "model.config.student_update_freq=3"],
            ["model.config.tangent_warmup=5 is not read by stage sf_dmd"],
        ),
        (
            DMD,
            ["model.config.net_bidirectional_teacher.sac_config.mode=block_wise", "model.config.net.sac_config.mode=block_wise"],
            ["model.config.net_bidirectional_teacher.sac_config.mode=block_wise is not read by a frozen network"],
        ),
        (DMD, ["model.config.causal_guidance=2"], ["model.config.causal_guidance=2.0 is not read by stage sf_dmd"]),
        (RCM, ["model.config.dcm_total_steps=9"], ["model.config.dcm_total_steps=9 is not read by stage rCM with cm_type=scm"]),
        (RCM, ["model.config.dcm_total_steps=9", "model.config.cm_type=dcm"], []),
        (DMD, ["model.config.sample_timestep_shift=7"], ["model.config.sample_timestep_shift=7.0 is not read by stage sf_dmd"]),
        (
            TF,
            ["trainer.keep_gathered_gib=1", "model.config.jvp_implementation=reference", "model.config.sample_timestep_shift=7"],
            ["trainer.keep_gathered_gib=1.0 is not read by stage tf, which", "model.config.jvp_implementation=reference is not"],
        ),
        (
            "toy_tf_c3-3",
            ["model.config.tokenizer.vae_pth=v.pth"],
            ["model.config.tokenizer.vae_pth=v.pth is not read by the toy codec"],
        ),
        (TF, ["trainer.sampling.num_samples=3"], ["trainer.sampling.num_samples=3 is not read by a run with sampling.every_n=0"]),
        (TF, ["trainer.sampling.num_samples=3", "trainer.sampling.ema_every_n=2"], []),
        (
            TF,
            ["dataloader_train.prefetch_factor=4", "dataloader_train.num_workers=0"],
            ["dataloader_train.prefetch_factor=4 is not read by a loader with num_workers=0"],
        ),
        (
            RCM,
            ["model.config.p_D.shift=3", "net_fake_score=null"],
            ["model.config.p_D.shift=3.0 is not read by stage rCM without fake score"],
        ),
        (
            RCM,
            ["model.config.p_D.shift=3", "model.config.loss_scale_dmd=0"],
            ["model.config.p_D.shift=3.0 is not read by stage rCM with model.config.loss_scale_dmd=0"],
        ),
        (
            RCM,
            ["model.config.fd_type=2", "model.config.loss_scale=0"],
            ["model.config.fd_type=2 is not read by stage rCM with model.config.loss_scale=0"],
        ),
        (
            DMD,
            ["model.config.context_from_last_step_start_chunk=1"],
            ["model.config.context_from_last_step_start_chunk=1 is not read by a run with context_from_last_step=False"],
        ),
        (TF, ["model.config.shift3_backward=True"], ["model.config.shift3_backward=True is not read by stage tf"]),
        (TF, ["model.config.shift3_backward=True", "model.config.context_from_last_step=True"], []),
        ("toy_bidirectional", ["pattern=c3-3"], [f"model.config.{key}=3 is not read" for key in ("first_chunk_t", "chunk_t")]),
        ("toy_bidirectional", ["model.config.chunk_t=3"], ["model.config.chunk_t=3 is not read by stage bidirectional"]),
        (TF, ["model.config.text_cache=x"], ["model.config.text_cache=x is not read by the toy text encoder"]),
        (TF, ["job.wandb_project=x"], ["job.wandb_project=x is not read by a run with job.wandb_mode=disabled"]),
        (
            TF,
            ["dataloader_train.tar_path_pattern=x", "dataloader_train.kind=fake"],
            ["dataloader_train.tar_path_pattern=x is not read by data=fake"],
        ),
    ],
)
def test_keys_that_the_stage_does_not_read_are_told(composed, name: str, words: list[str], told: list[str]) -> None:
    found = composed(f"experiment={name}", *words).unread
    assert len(found) == len(told) and all(mine.startswith(start) for mine, start in zip(found, told, strict=True)), found


@pytest.mark.parametrize(
    ("device", "words", "needed"),
    [
        ("cpu", [], "a CUDA device, this run is on cpu"),
        ("cuda", ["precision=fp64"], "model.config.precision other than float64"),
        ("cuda", ["model.config.net.num_heads=20"], "heads of 16 to 256, model.config.net has 8"),
        ("cuda", [], None),
    ],
)
def test_a_kernel_of_tangents_that_cannot_run_is_refused(
    composed, monkeypatch: pytest.MonkeyPatch, device: str, words: list[str], needed: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    config = composed("experiment=toy_tf_scm_c3-3", "model.config.jvp_implementation=triton", *words).config
    if needed is None:
        require_here(config, device=torch.device(device))
        return
    with pytest.raises(ConfigError) as refused:
        require_here(config, device=torch.device(device))
    assert str(refused.value) == f"model.config.jvp_implementation=triton needs {needed}; set it to auto or reference"
