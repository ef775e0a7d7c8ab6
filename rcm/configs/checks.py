"""Rules across records: what each key alone allows but together cannot work. Every message names
the knob. Nothing is built here.

`check` looks at the config alone, `check_mesh` at the number of ranks, `missing_inputs` at files a
run needs.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from rcm.configs.bases import check_lora
from rcm.configs.convert import get_key
from rcm.configs.network import networks, wan_config
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_model import PIXELS, CausalConfig, CommonModelConfig, RCMConfig
from rcm.core.errors import ConfigError, require_divisible
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.attention import attention_name
from rcm.parallel.checkpointing import KEEP_PRODUCTS
from rcm.rollout.plan import ContextRule, StepSchedule
from rcm.train.resume import Taken

M = "model.config"
SELF_FORCED = ("sf_dmd", "tf_scm_sf_dmd")
UMT5_WIDTH = 4096
CONSISTENCY = ("tf_dcm", "tf_scm", "tf_dscm", "tf_meanflow", "tf_scm_sf_dmd")


def check(config: TrainConfig) -> None:
    """Raise `ConfigError` at the first contradiction."""
    model = config.model.config
    _fixed(config)
    _rates(config)
    if isinstance(model, CausalConfig):
        _pattern(model)
        _stage(model)
        _rollout(model)
        _long_tuning(model)
    else:
        _rcm(model)
    _data(config)
    _networks(config)
    _two_times(model)
    check_lora(model)
    _without_effect(config)


FIXED = {
    "checkpoint.strict_resume": (True, "checkpoints are always loaded strictly"),
    "optimizer.type": ("fusedadamw", "the fused kernel is taken wherever torch has it"),
    f"{M}.optimizer_fake_score.type": (
        "fusedadamw",
        "the fused kernel is taken wherever torch has it",
    ),
    f"{M}.input_data_key": ("videos", "batches are records, not dictionaries"),
    f"{M}.input_latent_key": ("latents", "batches are records, not dictionaries"),
    f"{M}.input_caption_key": ("prompts", "batches are records, not dictionaries"),
    f"{M}.loss_scale_fake_score": (
        1.0,
        "the release defines it and uses it nowhere; scale the learning rate instead",
    ),
    f"{M}.rectified_flow_t_scaling_factor": (1000.0, "Wan's timestep of t = 1"),
    f"{M}.sigma_data": (1.0, "the TrigFlow wrapper is written for it"),
}
"""Every key of the release that has one value here, and why. Those of one model family are looked
at in that family.
"""


def _fixed(config: TrainConfig) -> None:
    for key, (value, why) in FIXED.items():
        group, _, name = key.rpartition(".")
        found = getattr(get_key(config, group), name, value)
        if found != value:
            told = f"{value:g}" if isinstance(value, float) else value
            raise ConfigError(
                f"{key}={found} must be {told}, another value has no effect in this version: {why}"
            )


def _rates(config: TrainConfig) -> None:
    """The largest rate of a schedule, and the decay it multiplies, leave weights between updates
    what they are.
    """
    for optimizer, scheduler in (
        ("optimizer", "scheduler"),
        (f"{M}.optimizer_fake_score", f"{M}.scheduler_fake_score"),
    ):
        adam, plan = get_key(config, optimizer), get_key(config, scheduler)
        peak = adam.lr * max(plan.f_start, plan.f_max, plan.f_min)
        if peak > 1:
            raise ConfigError(
                f"{optimizer}.lr={adam.lr:g} times the largest factor of {scheduler} is {peak:g};"
                " it must be at most 1"
            )
        if peak * adam.weight_decay >= 1:
            decay = f"{optimizer}.weight_decay={adam.weight_decay:g}"
            raise ConfigError(
                f"{decay} times the largest rate {peak:g} must be below 1: it would turn weights"
                " around"
            )


def _without_effect(config: TrainConfig) -> None:
    """No key is accepted and ignored."""
    model = config.model.config
    Taken.all_but(config.checkpoint.keys_not_to_resume)
    attention = attention_name(model.attention_backend, flex_backend=model.flex_backend)
    if model.compile and attention.startswith("flex"):
        raise ConfigError(
            f"{M}.attention_backend={attention} compiles a kernel of its own, which"
            f" {M}.compile=True leaves uncompiled with the rest of the attention, at the memory of"
            f" a whole score matrix; choose {M}.attention_backend=auto, or leave {M}.compile at"
            " False"
        )
    if model.compile and model.fused_layers == "on":
        raise ConfigError(
            f"{M}.fused_layers=on refuses the plain formulas, which {M}.compile=True hands to the"
            f" compiler; choose {M}.fused_layers=auto"
        )
    for knob, net in (("net", model.net), ("net_fake_score", model.net_fake_score)):
        if model.compile and net is not None and net.sac_config.mode in KEEP_PRODUCTS:
            raise ConfigError(
                f"{M}.{knob}.sac_config.mode={net.sac_config.mode} keeps single operators, which"
                f" {M}.compile=True hides inside compiled code; choose block_wise,"
                " block_wise_keep_attention or none"
            )
    if not isinstance(model, CausalConfig) and model.fd_type and model.time_precision == "bfloat16":
        raise ConfigError(
            f"{M}.fd_type={model.fd_type} steps time by fd_size={model.fd_size}, which"
            f" {M}.time_precision=bfloat16 cannot resolve; set {M}.time_precision=float32"
        )


def check_mesh(config: TrainConfig, *, world_size: int) -> tuple[int, int, int]:
    """(dp_replicate, dp_shard, cp) for `world_size` ranks; `ConfigError` if they do not multiply to
    it.

    fsdp_shard_size counts all ranks that share one copy of the parameters, context-parallel ranks
    among them, so dp_shard = shard / cp; a shard size below cp shards over the context-parallel
    group alone.
    """
    shard, cp = config.model.config.fsdp_shard_size, config.model_parallel.context_parallel_size
    require_divisible(
        "world size",
        value=world_size,
        by=cp,
        by_name="context_parallel_size",
        knob="model_parallel.context_parallel_size",
    )
    require_divisible(
        "world size",
        value=world_size,
        by=shard,
        by_name="fsdp_shard_size",
        knob=f"{M}.fsdp_shard_size",
    )
    if shard % cp and cp % shard:
        raise ConfigError(
            f"{M}.fsdp_shard_size={shard} and model_parallel.context_parallel_size={cp}: one must"
            " divide the other"
        )
    dp_shard = max(1, shard // cp)
    span, knob = (
        "max(fsdp_shard_size, context_parallel_size)",
        f"{M}.fsdp_shard_size or model_parallel.context_parallel_size",
    )
    require_divisible("world size", value=world_size, by=dp_shard * cp, by_name=span, knob=knob)
    return world_size // (dp_shard * cp), dp_shard, cp


def missing_inputs(config: TrainConfig) -> list[str]:
    """What the run needs from outside and does not have yet: one sentence per key, empty when it
    can start.
    """
    model, data = config.model.config, config.dataloader_train
    missing = []
    for key, why in _checkpoints(model).items():
        path = getattr(model, key)
        if not path and not model.allow_random_init:
            missing.append(
                f"{M}.{key} is empty: {why} (or {M}.allow_random_init=True to start from random"
                " weights)"
            )
        elif path and not Path(path).exists():
            missing.append(f"{M}.{key}={path!r} does not exist")
    if data.kind in ("latents", "prompts"):
        if not data.tar_path_pattern:
            missing.append(
                f"dataloader_train.tar_path_pattern is empty: data={data.kind} reads its shards"
                " there (data=fake needs none)"
            )
        elif (
            _guided(model)
            and not model.neg_embed_path
            and not model.text_encoder_path
            and model.text_encoder_class != "toy"
        ):
            missing.append(
                f"{M}.neg_embed_path is empty: guidance needs the negative prompt's embedding (or"
                f" {M}.text_encoder_path)"
            )
    if (
        data.kind == "prompts"
        and model.text_encoder_class == "umT5"
        and not model.text_encoder_path
    ):
        missing.append(
            f"{M}.text_encoder_path is empty: data=prompts has text alone, which umT5 must encode"
            " (data=latents has embeddings)"
        )
    if (
        data.kind == "toy"
        and isinstance(model, CausalConfig)
        and model.training_type in ("tf_kd", "df_kd")
    ):
        missing.append(
            "dataloader_train.kind=toy has no ODE trajectories, which"
            f" training_type={model.training_type} learns from: data=toy_shards with shards of"
            " scripts.build_ode_pairs (data=fake for a dry run)"
        )
    if config.checkpoint.load_path and not Path(config.checkpoint.load_path).exists():
        missing.append(f"checkpoint.load_path={config.checkpoint.load_path!r} does not exist")
    for key in ("neg_embed_path", "text_encoder_path"):
        if getattr(model, key) and not Path(getattr(model, key)).exists():
            missing.append(f"{M}.{key}={getattr(model, key)!r} does not exist")
    return missing


def unread_files(config: TrainConfig) -> list[str]:
    """Keys that name a file or folder which nothing in this run reads."""
    model = config.model.config
    used = _checkpoints(model).keys() | (
        {"fake_score_ckpt"} if model.net_fake_score is not None else set()
    )
    keys = [
        key
        for key in (
            "teacher_ckpt",
            "causal_teacher_ckpt",
            "bidirectional_teacher_ckpt",
            "fake_score_ckpt",
        )
        if key not in used
    ]
    if not _guided(model):
        keys.append("neg_embed_path")
    return [f"{M}.{key}" for key in keys if getattr(model, key, "")]


def _checkpoints(model: CommonModelConfig) -> dict[str, str]:
    """Checkpoint keys this stage reads -> what for; keys that must be set or may be."""
    if isinstance(model, RCMConfig):
        needed = {"teacher_ckpt": "the teacher's weights (the student starts from them)"}
    else:
        assert isinstance(model, CausalConfig)
        kind = model.training_type
        needed = {"student_ckpt": f"the weights that training_type={kind} starts from"}
        if kind in CONSISTENCY:
            needed["causal_teacher_ckpt"] = f"training_type={kind} distils a causal teacher"
        if kind in SELF_FORCED:
            needed["bidirectional_teacher_ckpt"] = (
                f"training_type={kind} scores with a bidirectional teacher"
            )
    optional = {
        key: ""
        for key in ("student_ckpt", "fake_score_ckpt")
        if getattr(model, key) and key not in needed
    }
    return needed | optional


def _guided(model: CommonModelConfig) -> bool:
    if isinstance(model, RCMConfig):
        return model.teacher_guidance > 1
    assert isinstance(model, CausalConfig)
    causal = model.training_type in CONSISTENCY and model.causal_guidance > 1
    return causal or (model.training_type in SELF_FORCED and model.bidirectional_guidance > 1)


def _pattern(model: CausalConfig) -> None:
    if model.training_type == "bidirectional":
        return
    if model.first_chunk_t == 0 or model.chunk_t == 0:
        raise ConfigError(
            "this experiment is a template: its block pattern is unset"
            f" (first_chunk_t={model.first_chunk_t}, chunk_t={model.chunk_t}). Add _c1-1, _c3-3 or"
            f" _c1-4 to its name, or pattern=c3-3, or set {M}.first_chunk_t and {M}.chunk_t"
        )
    BlockPattern(model.first_chunk_t, model.chunk_t).num_blocks(model.state_t)


def _stage(model: CausalConfig) -> None:
    kind = model.training_type
    scored = kind in SELF_FORCED
    needs = {
        "net_causal_teacher": kind in CONSISTENCY,
        "net_bidirectional_teacher": scored,
        "net_fake_score": scored,
    }
    for key, needed in needs.items():
        if needed and getattr(model, key) is None:
            raise ConfigError(
                f"{M}.{key} is null, but training_type={kind} uses it; choose one with {key}=NAME"
            )
        if not needed and getattr(model, key) is not None:
            raise ConfigError(
                f"{M}.{key} is set, but training_type={kind} has no use for it; leave it out or set"
                f" {key}=null"
            )
    term = "loss_scale_dmd" if scored else "loss_scale"
    if getattr(model, term) == 0:
        raise ConfigError(
            f"{M}.{term}=0 leaves training_type={kind} nothing to train; give it a positive value"
        )
    if kind in SELF_FORCED and model.student_update_freq < 2:
        raise ConfigError(
            f"{M}.student_update_freq=1 never trains the fake score; training_type={kind} needs at"
            " least 2"
        )
    if model.replayed_training and kind not in SELF_FORCED:
        raise ConfigError(
            f"{M}.replayed_training=True replays a self-forced rollout; training_type={kind} has"
            " none, use it with sf_dmd"
        )
    if kind in ("tf_kd", "df_kd") and not (
        model.kd_timesteps and all(0 < t <= 1 for t in model.kd_timesteps)
    ):
        raise ConfigError(
            f"{M}.kd_timesteps={list(model.kd_timesteps)} must be times in (0, 1], one per noisy"
            " trajectory entry"
        )


def _rollout(model: CausalConfig) -> None:
    """Times and step counts of the few-step rollout (Causal_rCM.md section 6, decision A13)."""
    _times(f"{M}.backward_timesteps", model.backward_timesteps, last=1.0)
    counts, schedules = model.sf_simulation_steps_per_chunk, model.sf_backward_timestep_schedules
    knob, key = f"{M}.sf_simulation_steps_per_chunk", f"{M}.sf_backward_timestep_schedules"
    if (counts or schedules) and model.training_type not in SELF_FORCED:
        raise ConfigError(
            f"{knob if counts else key} is read by self-forced training only, not by"
            f" training_type={model.training_type}"
        )
    if not counts and not schedules and model.training_type in SELF_FORCED:
        knob, counts = f"{M}.max_simulation_steps_fake", (model.max_simulation_steps_fake,)
    if any(later > before for before, later in pairwise(counts)):
        raise ConfigError(
            f"{knob}={list(counts)} increases; step counts must be non-increasing along the video"
            " (chunk 0 sets the cycle)"
        )
    for i, times in enumerate(schedules):
        if i < len(counts) and len(times) != counts[i] - 1:
            raise ConfigError(
                f"{key}[{i}] has {len(times)} times, expected {counts[i] - 1}:"
                f" {knob}[{i}]={counts[i]} steps start at t = 1"
            )
        _times(f"{key}[{i}]", times, last=1.0)
    if model.training_type in SELF_FORCED:
        blocks = BlockPattern(model.first_chunk_t, model.chunk_t).num_blocks(model.state_t)
        if len(counts) > blocks:
            raise ConfigError(
                f"{knob} has {len(counts)} entries, the video has {blocks} blocks; leave the"
                " surplus out"
            )
        schedule = StepSchedule.from_lists(
            steps=counts, schedules=schedules, default_mids=model.backward_timesteps, knob=knob
        )
        rule = ContextRule(model.context_from_last_step, model.context_from_last_step_start_chunk)
        empty = [i for i in range(blocks) if rule.applies(i) and not schedule.entry(i)]
        if empty:
            raise ConfigError(
                f"{M}.context_from_last_step with a one-step schedule leaves pure noise (t = 1) as"
                f" the context of block {empty[0]}; give it two steps or more in {knob}, or turn"
                " context_from_last_step off"
            )
    start = model.context_from_last_step_start_chunk
    if model.context_from_last_step and model.training_type not in (
        *SELF_FORCED,
        "tf",
        "tf_dcm",
        "tf_scm",
        "tf_dscm",
        "tf_meanflow",
    ):
        raise ConfigError(
            f"{M}.context_from_last_step has no context to make noisy in"
            f" training_type={model.training_type}"
        )
    if model.context_from_last_step:
        blocks = BlockPattern(model.first_chunk_t, model.chunk_t).num_blocks(model.state_t)
        if start >= blocks:
            raise ConfigError(
                f"{M}.context_from_last_step_start_chunk={start} is beyond the last of {blocks}"
                f" blocks (0 to {blocks - 1})"
            )


def _long_tuning(model: CausalConfig) -> None:
    """Rollouts longer than what is judged fit the pattern, and have a window to be streamed
    with.
    """
    long, knob = model.long_tuning, f"{M}.long_tuning"
    if not long.frames:
        if long.window_blocks or long.sink_blocks:
            key = "window_blocks" if long.window_blocks else "sink_blocks"
            raise ConfigError(
                f"{knob}.{key}={getattr(long, key)} has no effect while {knob}.frames=0 turns long"
                " tuning off"
            )
        return
    if model.training_type != "sf_dmd":
        raise ConfigError(
            f"{knob}.frames={long.frames} makes rollouts of sf_dmd longer;"
            f" training_type={model.training_type} is another"
        )
    if long.frames < model.state_t:
        raise ConfigError(
            f"{knob}.frames={long.frames} must be at least the judged {M}.state_t={model.state_t},"
            " or 0: no long tuning"
        )
    if long.window_blocks < 1:
        raise ConfigError(
            f"{knob}.window_blocks={long.window_blocks} must be at least 1, the chunk itself: it"
            " bounds the cache"
        )
    rest = (long.frames - model.first_chunk_t) % model.chunk_t
    if rest:
        fits = f"{long.frames - rest} or {long.frames - rest + model.chunk_t}"
        pattern = BlockPattern(model.first_chunk_t, model.chunk_t).name
        raise ConfigError(
            f"{knob}.frames={long.frames} does not split into blocks of {pattern}; nearest that"
            f" fit: {fits}"
        )


def _two_times(model: CommonModelConfig) -> None:
    """The student of tf_meanflow has two times, every other network one."""
    kind = model.training_type if isinstance(model, CausalConfig) else "rCM"
    for role, net in networks(model).items():
        student = kind == "tf_meanflow" and role == "net"
        if student and not net.two_times:
            raise ConfigError(
                f"{M}.net.two_times=False, but the student of training_type={kind} has two times;"
                " set it to True"
            )
        if net.two_times and not student:
            raise ConfigError(
                f"{M}.{role}.two_times=True is for the student of training_type=tf_meanflow alone,"
                f" this is {kind}; set it to False"
            )
    if kind == "tf_meanflow" and model.lora.rank:
        raise ConfigError(
            f"{M}.lora.rank={model.lora.rank} would freeze the embedding of the second time, which"
            f" training_type={kind} must train; set {M}.lora.rank=0"
        )


def _times(key: str, times: tuple[float, ...], *, last: float) -> None:
    """Times must lie strictly inside (0, last) and decrease strictly."""
    for i, t in enumerate(times):
        if not 0 < t < last:
            raise ConfigError(f"{key}[{i}]={t:g} must lie strictly between 0 and {last:g}")
        if i and t >= times[i - 1]:
            raise ConfigError(
                f"{key}={[round(x, 6) for x in times]} must decrease strictly: entry {i} is {t:g}"
                f" after {times[i - 1]:g}"
            )


def _rcm(model: RCMConfig) -> None:
    if model.net_teacher is None:
        raise ConfigError(
            f"{M}.net_teacher is null, but rCM distils a teacher; choose one with net_teacher=NAME"
        )
    if not 0 < model.fd_size < 0.1:
        raise ConfigError(f"{M}.fd_size={model.fd_size} must be in (0, 0.1)")
    if model.cm_type == "dcm" and (model.use_rf_scm or model.fd_type):
        raise ConfigError(
            f"{M}.use_rf_scm and {M}.fd_type belong to cm_type=scm, but {M}.cm_type=dcm"
        )
    if model.loss_scale == 0 and (model.net_fake_score is None or model.loss_scale_dmd == 0):
        off = (
            f"{M}.net_fake_score=null" if model.net_fake_score is None else f"{M}.loss_scale_dmd=0"
        )
        raise ConfigError(
            f"nothing to train: {M}.loss_scale=0 turns consistency off and {off} turns DMD off"
        )
    if model.tangent_form != "paper" and (model.cm_type == "dcm" or model.use_rf_scm):
        raise ConfigError(
            f"{M}.tangent_form={model.tangent_form} is a TrigFlow tangent's; it needs cm_type=scm"
            " and use_rf_scm=False"
        )
    if model.net_fake_score is not None and model.student_update_freq < 2:
        raise ConfigError(
            f"{M}.student_update_freq=1 never trains the fake score; use at least 2, or"
            f" {M}.net_fake_score=null"
        )
    _times(f"{M}.backward_timesteps", model.backward_timesteps, last=math.pi / 2)
    if (
        model.dmd_fix_timesteps
        and model.max_simulation_steps_fake > len(model.backward_timesteps) + 1
    ):
        raise ConfigError(
            f"{M}.max_simulation_steps_fake={model.max_simulation_steps_fake} needs"
            f" {model.max_simulation_steps_fake - 1} entries in {M}.backward_timesteps, got"
            f" {len(model.backward_timesteps)}"
        )


def _networks(config: TrainConfig) -> None:
    model, cp = config.model.config, config.model_parallel.context_parallel_size
    if model.latent_hw is None and (model.resolution, model.aspect_ratio) not in PIXELS:
        known = ", ".join(f"{r} {a}" for r, a in PIXELS)
        asked = f"{M}.resolution={model.resolution!r} with aspect_ratio={model.aspect_ratio!r}"
        raise ConfigError(f"{asked} is not one of {known}; or give {M}.latent_hw")
    student = wan_config(model.net)
    stored_text = config.dataloader_train.kind in ("latents", "prompts")
    if stored_text and model.text_encoder_class == "umT5" and student.text_dim != UMT5_WIDTH:
        raise ConfigError(
            f"{M}.net.text_dim={student.text_dim} does not fit text_encoder_class=umT5 of width"
            f" {UMT5_WIDTH}; choose another net or text_encoder_class"
        )
    for role, net in networks(model).items():
        knob = f"{M}.{role}"
        wan = wan_config(net, knob=knob)
        for name in ("text_dim", "text_len"):
            mine, students = getattr(wan, name), getattr(student, name)
            if mine != students:
                raise ConfigError(
                    f"{knob}.{name}={mine} differs from the student's {students}; all networks read"
                    " the same text"
                )
        for name, channels in (("in_dim", wan.in_dim), ("out_dim", wan.out_dim)):
            if channels != model.state_ch:
                raise ConfigError(
                    f"{knob}.{name}={channels} does not fit latents of"
                    f" {M}.state_ch={model.state_ch}; set one of them"
                )
        if wan.max_frames < model.state_t:
            raise ConfigError(
                f"{M}.state_t={model.state_t} is beyond the rotary table of"
                f" {knob}.max_frames={wan.max_frames}"
            )
        grid = wan.token_grid(*model.latent_size())
        context = "model_parallel.context_parallel_size"
        require_divisible(
            f"{knob} num_heads",
            value=wan.num_heads,
            by=cp,
            by_name="context_parallel_size",
            knob=context,
        )
        require_divisible(
            f"tokens per frame of {knob}",
            value=grid[0] * grid[1],
            by=cp,
            by_name="context_parallel_size",
            knob=context,
        )


def _data(config: TrainConfig) -> None:
    model, kind = config.model.config, config.dataloader_train.kind
    if kind == "prompts" and not (
        isinstance(model, CausalConfig) and model.training_type == "sf_dmd"
    ):
        what = model.training_type if isinstance(model, CausalConfig) else "rCM"
        raise ConfigError(
            f"data=prompts has no latents, which {what} trains on (only sf_dmd is purely"
            " on-policy); use data=latents"
        )
    if kind == "toy" and model.text_encoder_class != "toy":
        raise ConfigError(
            f"data=toy needs {M}.text_encoder_class=toy, got {model.text_encoder_class!r}"
        )
