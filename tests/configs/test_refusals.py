"""Bad input is refused before anything is built, and the message names the knob."""

from __future__ import annotations

import pytest

from rcm.core.errors import ConfigError

TOY_SF = "experiment=toy_sf_dmd_c3-3"
M = "model.config."

REFUSED = {
    "typo": (["trainer.max_itr=3"], r"unknown key 'trainer.max_itr'; did you mean trainer.max_iter"),
    "typo below a net": ([M + "net.sac_config.mod=none"], r"did you mean model.config.net.sac_config.mode"),
    "group of another spelling": (["optimiser.lr=1"], r"did you mean optimizer.lr"),
    "leaf alone": (["lr=1e-5"], r"did you mean optimizer.lr"),
    "law that is a list": ([M + "p_G._target_=[1]"], r"p_G._target_=\[1\] is not imported; the time laws known by name"),
    "number for the model's keys": (["model.config=1"], r"model.config must be a group of keys, got 1"),
    "null for the model's keys": (["model.config=null"], r"model.config must be a group of keys, got None"),
    "plus before a key": (["+trainer.max_iter=3"], r"write trainer.max_iter=... without \+: no key"),
    "added key": (["+x=1"], r"unknown key 'x'"),
    "forced key": (["++x.y=1"], r"unknown key 'x.y'"),
    "forced typo": (["++trainer.max_itr=1"], r"did you mean trainer.max_iter"),
    "key inside a dict": ([M + "p_G={low:1}"], r"unknown key 'model.config.p_G.low'.*law"),
    "key of the other family": ([M + "cm_type=scm"], r"'model.config.cm_type' does not exist in this run: .*other model family"),
    "unknown net": (["net=tny"], r"unknown net='tny'; choose from .*tiny"),
    "unknown pattern": (["pattern=c2-2"], r"unknown pattern='c2-2'; choose from .*c3-3"),
    "key of a null network": ([M + "net_fake_score.dim=8"], r"net_fake_score.dim' does not exist in this run: .*null"),
    "deletion": (["~optimizer.lr"], r"deletes a key"),
    "sweep": (["optimizer.lr=1,2"], r"several runs"),
    "no value": (["optimizer.lr"], r"write key=value"),
    "text for a number": (["trainer.max_iter=many"], r"trainer.max_iter='many' must be an integer"),
    "fraction of an iteration": (["trainer.max_iter=1.5"], r"trainer.max_iter=1.5 must be an integer"),
    "bool for a number": (["optimizer.lr=true"], r"optimizer.lr=True must be a number"),
    "number for a bool": ([M + "grad_clip=1"], r"grad_clip=1 must be true or false"),
    "number of 400 digits": (["optimizer.lr=1" + 400 * "0"], r"optimizer.lr=10*.* must be finite"),
    "whole number of 400 digits": (["trainer.profile_iter=1" + 400 * "0"], r"trainer.profile_iter=10*.* must be at most"),
    "times that are all one": ([M + "p_D={law: lognormal, p_mean: 1e30}"], r"p_D.p_mean=1e\+30 must be at most 100"),
    "no step of a weight": (["optimizer.eps=1e9"], r"optimizer.eps=1000000000.0 must be at most 1"),
    "infinite": (["optimizer.lr=inf"], r"optimizer.lr=inf must be finite"),
    "not a list": (["optimizer.betas=0.9"], r"optimizer.betas=0.9 must be a list"),
    "list of wrong length": (["optimizer.betas=[0.9]"], r"optimizer.betas.* must have 2 entries, got 1"),
    "null": (["optimizer=null"], r"unknown optimizer=None; choose from fusedadamw"),
    "enumeration": ([M + "training_type=tf_csm"], r"training_type='tf_csm' must be one of .*'tf_dcm'.*did you mean tf_"),
    "law": ([M + "p_G.law=uniform"], r"p_G.law='uniform' must be one of 'lognormal', 'uniform_shift'"),
    "recomputation inside compiled code": ([M + "compile=true", M + "net.sac_config.mode=mm_only"], r"net.sac_config.mode=mm_only keeps"),
    "kept products inside compiled code": (
        [M + "compile=true", M + "net.sac_config.mode=block_wise_keep_attention_mlp"],
        r"net.sac_config.mode=block_wise_keep_attention_mlp keeps",
    ),
    "recomputing every zeroth block": ([M + "net.sac_config.every_n_blocks=0"], r"net.sac_config.every_n_blocks=0 must be in 1 to 1024"),
    "which blocks of none": (
        [M + "net.sac_config.every_n_blocks=2"],
        r"model.config.net.sac_config.every_n_blocks=2 has no effect while mode=none recomputes no block",
    ),
    "fused layers inside compiled code": ([M + "compile=true", M + "fused_layers=on"], r"fused_layers=on refuses .*compile=True"),
    "number the law ignores": ([M + "p_G.p_mean=1"], r"p_G.p_mean has no effect while model.config.p_G.law=uniform_shift"),
    "rank of adapters": ([M + "lora.rank=-1"], r"lora.rank=-1 must be at least 0"),
    "rank beyond a layer": ([M + "lora.rank=161", "net=toy"], r"lora.rank=161 must be at most 160, the smallest layer that .*net adapts"),
    "alpha of adapters": ([M + "lora.rank=4", M + "lora.alpha=0"], r"lora.alpha=0.0 must be positive; null is the rank"),
    "alpha of no adapters": ([M + "lora.alpha=8"], r"lora.alpha=8.0 has no effect while model.config.lora.rank=0 trains all weights"),
    "targets of no adapters": ([M + "lora.targets=[q]"], r"lora.targets=\('q',\) has no effect while"),
    "unknown target": ([M + "lora.rank=4", M + "lora.targets=[q,to_kv]"], r"lora.targets names 'to_kv', which is no linear layer"),
    "no target": ([M + "lora.rank=4", M + "lora.targets=[]"], r"lora.targets is empty"),
    "adapters recomputed in two ways": (
        ["experiment=toy_rCM", M + "lora.rank=4", M + "net.sac_config.mode=mm_only"],
        r"net.sac_config \(mm_only, every 1\) and .*net_fake_score.sac_config \(none, every 1\) differ.*one network",
    ),
    "rank as PEFT calls it": ([M + "lora.r=4"], r"unknown key 'model.config.lora.r'; did you mean model.config.lora.rank"),
    "alpha as PEFT calls it": ([M + "lora.lora_alpha=4"], r"did you mean model.config.lora.alpha"),
    "targets as PEFT calls them": ([M + "lora.target_modules=[q]"], r"did you mean model.config.lora.targets"),
    "batch": (["dataloader_train.batch_size=0"], r"dataloader_train.batch_size=0 must be at least 1"),
    "accumulation": (["trainer.grad_accum_iter=0"], r"trainer.grad_accum_iter=0 must be at least 1"),
    "learning rate": (["optimizer.lr=0"], r"optimizer.lr=0.0 must be positive"),
    "critic's learning rate": ([M + "optimizer_fake_score.lr=-1"], r"optimizer_fake_score.lr=-1.0 must be positive"),
    "beta": (["optimizer.betas=[0.9,1.0]"], r"optimizer.betas\[1\]=1.0 must be in"),
    "ema": ([M + "ema.rate=0.3"], r"ema.rate=0.3 must be in \(0, 0.289\)"),
    "average of nothing": ([M + "ema.rate=1e-320"], r"ema.rate=1e-320 must be at least 1e-06"),
    "odd sines": ([M + "net.freq_dim=3"], r"net: net.freq_dim=3 must be even"),
    "shift": ([M + "p_G.shift=0"], r"p_G.shift=0.0 must be positive"),
    "timestep scale": ([M + "rectified_flow_t_scaling_factor=1"], r"must be 1000"),
    "frames": ([M + "state_t=10"], r"num_frames=10 does not split .*state_t"),
    "heads": (
        ["model_parallel.context_parallel_size=3"],
        r"context_parallel_size=3 does not divide model.config.net num_heads=4; choose .* 1, 2, 4",
    ),
    "tokens": (
        ["model_parallel.context_parallel_size=4", M + "latent_hw=[2,2]"],
        r"does not divide tokens per frame of model.config.net=1",
    ),
    "patch": ([M + "latent_hw=[7,8]"], r"net.patch\[1\]=2 does not divide latent height=7"),
    "resolution": ([M + "latent_hw=null", M + "resolution=481p"], r"resolution='481p'.*not one of 480p 1:1"),
    "channels": (["net=tiny"], r"net.in_dim=16 does not fit latents of model.config.state_ch=24"),
    "head size": ([M + "net.num_heads=3"], r"model.config.net: .*num_heads"),
    "rotary table": ([M + "net.max_frames=8"], r"state_t=9 is beyond the rotary table"),
    "preset": ([M + "net.preset=2B"], r"net.preset='2B' must be one of tiny, 1.3B"),
    "second time of another stage": ([M + "net.two_times=True"], r"net.two_times=True is for the student of training_type=tf_meanflow"),
    "student of one time": (
        ["experiment=toy_tf_meanflow_c3-3", M + "net.two_times=False"],
        r"net.two_times=False, but the student of training_type=tf_meanflow has two times",
    ),
    "teacher of two times": (
        ["experiment=toy_tf_meanflow_c3-3", M + "net_causal_teacher.two_times=True"],
        r"net_causal_teacher.two_times=True is for the student of training_type=tf_meanflow alone",
    ),
    "adapters beside a second time": (
        ["experiment=toy_tf_meanflow_c3-3", M + "lora.rank=2"],
        r"lora.rank=2 would freeze the embedding of the second time.*set model.config.lora.rank=0",
    ),
    "share of equal times": ([M + "meanflow_equal_share=1"], r"model.config.meanflow_equal_share=1.0 must be at most 0.99"),
    "replay without a rollout": ([M + "replayed_training=True"], r"replayed_training=True.*training_type=tf"),
    "schedule without a rollout": (
        [M + "sf_simulation_steps_per_chunk=[4,2]"],
        r"sf_simulation_steps_per_chunk is read by self-forced training only",
    ),
    "useless teacher": (["net_causal_teacher=toy"], r"net_causal_teacher is set, but training_type=tf has no use"),
    "missing teacher": (
        [M + "training_type=tf_scm"],
        r"net_causal_teacher is null, but training_type=tf_scm uses it; choose one with net_causal_teacher=",
    ),
    "prompts only": (["data=prompts"], r"data=prompts has no latents, which tf trains on"),
    "toy data, real text": ([M + "text_encoder_class=umT5"], r"data=toy needs model.config.text_encoder_class=toy"),
    "trajectory times": (["method=ode_kd", M + "kd_timesteps=[1.5]"], r"kd_timesteps=\[1.5\] must be times in \(0, 1\]"),
    "noise for context": (
        [M + "context_from_last_step=True", M + "backward_timesteps=[]"],
        r"backward_timesteps is empty, which leaves pure noise \(t = 1\) as the context",
    ),
    "noisy context of diffusion forcing": (
        [M + "training_type=df", M + "context_from_last_step=True"],
        r"context_from_last_step has no context to make noisy in training_type=df",
    ),
    "text width": (
        ["data=latents", M + "state_ch=24", M + "state_t=9", M + "latent_hw=[8,8]"],
        r"net.text_dim=64 does not fit text_encoder_class=umT5 of width 4096",
    ),
    "part that is not a name": (["net={dim:8}"], r"net is chosen by name: net="),
    "interpolation": (["job.name=${nowhere}"], r"does not compose: job.name has no value: .*nowhere.*; give it a plain one$"),
    "home that no shell expands": (["job.output_root=~/runs"], r"would be a folder called ~; write job.output_root=/.*/runs$"),
    "mandatory value": (["trainer.seed=???"], r"trainer.seed has no value: Missing mandatory value: seed; give it a plain one$"),
    "part in another place": (["net@model.config.net_causal_teacher=toy"], r"write net=... without @model.config.net_causal_teacher"),
    "list without brackets": (["optimizer.betas=0.9,0.99"], r"do you mean a list: 'optimizer.betas=\[0.9,0.99\]'"),
    "two experiments in one word": (["experiment=toy_tf_c3-3,toy_df_c3-3"], r"several runs; launch one at a time$"),
    "method of the other family": (["method=rcm"], r"model=fsdp_t2v_distill_rcm has no key .*of one family"),
    "family": (["model.name=wan"], r"model.name='wan' must be one of 'fsdp_t2v_causal'"),
    "division by zero": ([M + "causal_guidance=1/0"], r"causal_guidance='1/0' must be a number"),
    "dcm skip": ([M + "dcm_skipping_interval_steps=48"], r"dcm_skipping_interval_steps=48 must be in 1"),
    "nan share": (["trainer.nan_sample_limit=2"], r"nan_sample_limit=2.0 must be a share"),
    "shift3 twice": (
        [M + "shift3_backward=True", M + "backward_timesteps=[0.5]"],
        r"shift3_backward=True contradicts model.config.backward_timesteps",
    ),
    "shift3 twice in one word": (
        ["model.config={shift3_backward: true, backward_timesteps: [0.5]}"],
        r"shift3_backward=True contradicts model.config.backward_timesteps",
    ),
}

REFUSED_ROLLOUTS = {
    "increasing": ([M + "sf_simulation_steps_per_chunk=[2,4]"], r"sf_simulation_steps_per_chunk=\[2, 4\] increases"),
    "too few times": (
        [M + "sf_simulation_steps_per_chunk=[5,2]"],
        r"Need 4 mid_t values for 5 steps, got 3.*sf_simulation_steps_per_chunk.*; times stand in model.config.backward_timesteps or",
    ),
    "schedule without counts": ([M + "sf_backward_timestep_schedules=[[0.5]]"], r"sf_simulation_steps_per_chunk"),
    "fewer schedules": (
        [M + "sf_simulation_steps_per_chunk=[4,2]", M + "sf_backward_timestep_schedules=[[0.9,0.8,0.7]]"],
        r"1 mid-time schedules for 2 entries of model.config.sf_simulation_steps_per_chunk",
    ),
    "schedule too short": (
        [M + "sf_simulation_steps_per_chunk=[4,2]", M + "sf_backward_timestep_schedules=[[0.9,0.8],[0.5]]"],
        r"sf_backward_timestep_schedules\[0\] has 2 times, expected 3",
    ),
    "schedule too long": (
        [M + "sf_simulation_steps_per_chunk=[4,1]", M + "sf_backward_timestep_schedules=[[0.9,0.8,0.7],[0.5]]"],
        r"sf_backward_timestep_schedules\[1\] has 1 times, expected 0",
    ),
    "times increase": (
        [M + "sf_simulation_steps_per_chunk=[3]", M + "sf_backward_timestep_schedules=[[0.5,0.9]]"],
        r"sf_backward_timestep_schedules\[0\]=.*must decrease strictly: entry 1 is 0.9 after 0.5",
    ),
    "equal times": ([M + "backward_timesteps=[0.5,0.5,0.4]"], r"backward_timesteps.*must decrease strictly"),
    "time 1": ([M + "backward_timesteps=[1.0,0.5,0.4]"], r"backward_timesteps\[0\]=1 must lie strictly between 0 and 1"),
    "time 0": ([M + "backward_timesteps=[0.6,0.5,0]"], r"backward_timesteps\[2\]=0 must lie strictly between 0 and 1"),
    "longest rollout": ([M + "max_simulation_steps_fake=5"], r"Need 4 mid_t values for 5 steps, got 3.*max_simulation_steps_fake"),
    "more entries than blocks": ([M + "sf_simulation_steps_per_chunk=[4,3,2,1]"], r"has 4 entries, the video has 3 blocks"),
    "zero steps": ([M + "sf_simulation_steps_per_chunk=[4,0]"], r"sf_simulation_steps_per_chunk\[1\]=0 must be at least 1"),
    "noisy context of pure noise": (
        ["experiment=toy_sf_dmd_1step_c3-3", M + "context_from_last_step=True", M + "context_from_last_step_start_chunk=1"],
        r"context_from_last_step with a one-step schedule leaves pure noise .* block 1",
    ),
    "noisy context too late": (
        [M + "context_from_last_step=True", M + "context_from_last_step_start_chunk=3"],
        r"start_chunk=3 is beyond the last of 3 blocks",
    ),
    "noisy context before the start": ([M + "context_from_last_step_start_chunk=-1"], r"start_chunk=-1 must be at least 0"),
    "critic never trained": ([M + "student_update_freq=1"], r"student_update_freq=1 never trains the fake score"),
    "window without long rollouts": ([M + "long_tuning.window_blocks=2"], r"long_tuning.window_blocks=2 has no effect while .*frames=0"),
    "sinks without long rollouts": ([M + "long_tuning.sink_blocks=1"], r"long_tuning.sink_blocks=1 has no effect while .*frames=0"),
    "negative rollout": ([M + "long_tuning.frames=-3"], r"model.config.long_tuning.frames=-3 must be at least 0"),
    "short long rollout": ([M + "long_tuning.frames=6"], r"long_tuning.frames=6 must be at least the judged model.config.state_t=9"),
    "long rollout without a window": ([M + "long_tuning.frames=21"], r"long_tuning.window_blocks=0 must be at least 1"),
    "long rollout in broken blocks": (
        [M + "long_tuning={frames:22,window_blocks:2}"],
        r"long_tuning.frames=22 does not split into blocks of c3-3; nearest that fit: 21 or 24",
    ),
    "long rollout of another stage": (
        ["experiment=toy_tf_c3-3", M + "long_tuning={frames:21,window_blocks:2}"],
        r"long_tuning.frames=21 makes rollouts of sf_dmd longer; training_type=tf",
    ),
    "long rollout beside a consistency term": (
        ["experiment=toy_tf_scm_sf_dmd_c3-3", M + "long_tuning={frames:21,window_blocks:2}"],
        r"long_tuning.frames=21 makes rollouts of sf_dmd longer; training_type=tf_scm_sf_dmd",
    ),
    "no critic": ([M + "net_fake_score=null"], r"net_fake_score is null, but training_type=sf_dmd uses it"),
    "other text": ([M + "net_fake_score.text_len=16"], r"net_fake_score.text_len=16 differs from the student's 8"),
}

REFUSED_RCM = {
    "no teacher": ([M + "net_teacher=null"], r"net_teacher is null, but rCM distils a teacher"),
    "critic never trained": ([M + "student_update_freq=1"], r"student_update_freq=1 never trains the fake score; .*net_fake_score=null"),
    "sigma data": ([M + "sigma_data=0.5"], r"sigma_data=0.5 must be 1"),
    "difference that float32 does not see": (
        [M + "fd_type=1", M + "fd_size=1e-9", M + "time_precision=float32"],
        r"fd_size=1e-09, which model.config.time_precision=float32 cannot resolve; set model.config.fd_size=1e-06 or more",
    ),
    "difference size": ([M + "fd_size=0"], r"fd_size=0.0 must be in"),
    "difference type": ([M + "fd_type=3"], r"fd_type=3 must be one of 0, 1, 2"),
    "scm option for dcm": ([M + "cm_type=dcm", M + "fd_type=1"], r"fd_type belong to cm_type=scm"),
    "nothing to train": ([M + "net_fake_score=null", M + "loss_scale=0"], r"nothing to train"),
    "angle beyond pi/2": ([M + "backward_timesteps=[1.6,1.4]"], r"backward_timesteps\[0\]=1.6 must lie strictly between 0 and 1.5708"),
    "fixed times": ([M + "dmd_fix_timesteps=True", M + "backward_timesteps=[1.5]"], r"max_simulation_steps_fake=4 needs 3 entries"),
    "causal key": ([M + "chunk_t=3"], r"'model.config.chunk_t' does not exist in this run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(composed, case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        composed("experiment=toy_tf_c3-3", *overrides)


@pytest.mark.parametrize("case", REFUSED_ROLLOUTS)
def test_refused_rollouts(composed, case: str) -> None:
    overrides, message = REFUSED_ROLLOUTS[case]
    base = () if overrides[0].startswith("experiment=") else (TOY_SF,)
    with pytest.raises(ConfigError, match=message):
        composed(*base, *overrides)


ACCEPTED_ROLLOUTS = {
    "equal counts": [M + "sf_simulation_steps_per_chunk=[3,3]"],
    "one entry per block": [M + "sf_simulation_steps_per_chunk=[4,2,1]"],
    "shorter rollouts": [M + "max_simulation_steps_fake=2"],
    "noisy context in the last block": [M + "context_from_last_step=True", M + "context_from_last_step_start_chunk=2"],
    "one step, noisy context where it never applies": [
        M + "sf_simulation_steps_per_chunk=[4,1]",
        M + "context_from_last_step_start_chunk=1",
    ],
    "critic every other iteration": [M + "student_update_freq=2"],
}


@pytest.mark.parametrize("case", ACCEPTED_ROLLOUTS)
def test_accepted_rollouts(composed, case: str) -> None:
    """The neighbours of what is refused."""
    assert composed(TOY_SF, *ACCEPTED_ROLLOUTS[case]).config.model.config.training_type == "sf_dmd"


def test_number_of_the_other_law_is_refused_both_ways(composed) -> None:
    with pytest.raises(ConfigError, match=r"p_G.shift has no effect while model.config.p_G.law=lognormal"):
        composed("experiment=toy_tf_scm_c3-3", M + "p_G.shift=3")
    assert composed("experiment=toy_tf_scm_c3-3", M + "p_G.law=uniform_shift", M + "p_G.shift=3").config.model.config.p_G.shift == 3


@pytest.mark.parametrize("case", REFUSED_RCM)
def test_refused_rcm(composed, case: str) -> None:
    overrides, message = REFUSED_RCM[case]
    with pytest.raises(ConfigError, match=message):
        composed("experiment=toy_rCM", *overrides)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy_tff_c3-3", r"unknown experiment 'toy_tff_c3-3'; did you mean toy_tf_c3-3"),
        ("toy_tf_c3-3_replayed", r"_replayed exists for self-forced experiments \(sf_dmd\) only"),
        ("toy_tf_c3-3_replayed_debug", r"_replayed exists for self-forced experiments"),
        ("causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3_debug_replayed", r"did you mean .*sf_dmd_c3-3_replayed"),
        ("zebra", r"unknown experiment 'zebra'; .rcm experiments. shows all"),
    ],
)
def test_unknown_experiments(composed, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(f"experiment={name}")


def test_experiment_with_a_plus_is_refused(composed) -> None:
    with pytest.raises(ConfigError, match=r"write experiment=NAME without \+"):
        composed("+experiment=toy_tf_c3-3")


@pytest.mark.parametrize(
    ("world_size", "overrides", "mesh"),
    [
        (1, (), (1, 1, 1)),
        (8, (M + "fsdp_shard_size=4",), (2, 4, 1)),
        (8, ("mesh=node8",), (1, 8, 1)),
        (8, ("mesh=node8_cp2",), (1, 4, 2)),
        (4, ("model_parallel.context_parallel_size=2",), (2, 1, 2)),
        (4, ("model_parallel.context_parallel_size=4", M + "fsdp_shard_size=2"), (1, 1, 4)),
    ],
)
def test_mesh(composed, world_size: int, overrides: tuple[str, ...], mesh: tuple[int, int, int]) -> None:
    assert composed("experiment=toy_tf_c3-3", *overrides, world_size=world_size).mesh == mesh


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, ("model_parallel.context_parallel_size=2",), r"context_parallel_size=2 does not divide world size=3; .* from 1, 3"),
        (8, (M + "fsdp_shard_size=3",), r"fsdp_shard_size=3 does not divide world size=8"),
        (12, ("model_parallel.context_parallel_size=4", M + "fsdp_shard_size=6"), r"one must divide the other"),
    ],
)
def test_refused_mesh(composed, world_size: int, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("experiment=toy_tf_c3-3", *overrides, world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.keys_not_to_resume=[ema]"], r"keys_not_to_resume has 'ema', which is no part of a checkpoint; its parts are model,"),
        (["checkpoint.keys_not_to_resume=[model,optim,scheduler,trainer]"], r"leaves nothing to resume"),
        (["checkpoint.keys_not_to_resume=model"], r"keys_not_to_resume='model' must be a list"),
        (["checkpoint.load_ema_to_reg=True"], r"load_ema_to_reg=True has no effect without checkpoint.load_path"),
        (["checkpoint.load_training_state=False"], r"load_training_state=False has no effect without checkpoint.load_path"),
        (
            ["checkpoint.only_load_scheduler_state=True", "checkpoint.load_path=x"],
            r"only_load_scheduler_state=True has no effect while checkpoint.load_training_state=True",
        ),
        (
            ["checkpoint.load_training_state=False", "checkpoint.load_path=x", "checkpoint.keys_not_to_resume=[model]"],
            r"load_training_state=False takes weights alone, which checkpoint.keys_not_to_resume leaves out",
        ),
        (
            ["checkpoint.load_ema_to_reg=True", "checkpoint.load_path=x", "checkpoint.keys_not_to_resume=[model]"],
            r"load_ema_to_reg=True starts from weights that checkpoint.keys_not_to_resume leaves out",
        ),
    ],
)
def test_parts_to_resume(composed, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("experiment=toy_sf_dmd_c3-3", *overrides)


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.strict_resume=False",
        "optimizer.type=adamw",
        "model.config.optimizer_fake_score.type=adamw",
        "model.config.input_latent_key=x",
        "model.config.loss_scale_fake_score=2.0",
    ],
)
def test_keys_without_effect_are_refused(composed, override) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].split(".")[-1] + ".*no effect"):
        composed("experiment=toy_sf_dmd_c3-3", override)


def test_differences_need_a_timestep_that_resolves_them(composed) -> None:
    with pytest.raises(ConfigError, match="fd_type=2.*time_precision=bfloat16"):
        composed("experiment=toy_rCM", "model.config.fd_type=2", "model.config.time_precision=bfloat16")
