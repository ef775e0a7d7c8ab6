"""Rules across records: what each allows but together cannot work. Every message names the knob.
Nothing is built here.

What one record may say stands beside it (`__post_init__`, or `check` for keys that a run may leave
open until it starts); keys of the release with one value in `rcm.configs.release_words`.
"""

from __future__ import annotations

from functools import partial

from rcm.configs.bases import TRAINED, check_lora
from rcm.configs.convert import get_key
from rcm.configs.memory import check_memory
from rcm.configs.network import networks, wan_config
from rcm.configs.release_words import check_fixed
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import PIXELS, CommonModelConfig, M
from rcm.core.errors import ConfigError, require_divisible
from rcm.kernels.fused.quantise import ALIGNMENT
from rcm.nets.frozen_fp8 import fits

UMT5_WIDTH = 4096
SHARD, CONTEXT = f"{M}.fsdp_shard_size", "model_parallel.context_parallel_size"


def check(config: TrainConfig) -> None:
    """Raise `ConfigError` at the first contradiction."""
    model = config.model.config
    check_fixed(config)
    _rates(config)
    model.check()
    _data(config)
    _networks(config)
    _discriminator(config)
    _two_times(model)
    _products(model)
    check_lora(model)
    check_memory(config)


def _rates(config: TrainConfig) -> None:
    """The largest rate and the decay it multiplies must not turn weights around."""
    pairs = [
        ("optimizer", "scheduler"),
        (f"{M}.optimizer_fake_score", f"{M}.scheduler_fake_score"),
    ]
    if isinstance(config.model.config, CausalConfig):
        pairs.append((f"{M}.gan.optimizer", f"{M}.gan.scheduler"))
    for optimizer, scheduler in pairs:
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


def check_mesh(config: TrainConfig, *, world_size: int) -> tuple[int, int, int]:
    """(dp_replicate, dp_shard, cp) for `world_size` ranks; `ConfigError` if they do not multiply to
    it.

    fsdp_shard_size counts all ranks that share one copy of the parameters, context-parallel ranks
    among them, so dp_shard = shard / cp; a shard size below cp shards over the context-parallel
    group alone.
    """
    model, cp = config.model.config, config.model_parallel.context_parallel_size
    shard = model.fsdp_shard_size
    if world_size > 1 and isinstance(model, CausalConfig) and model.gan.r1 == "exact":
        raise ConfigError(
            f"{M}.gan.r1=exact differentiates gradients of the fake score again, which FSDP2 of"
            f" {world_size} ranks cannot; set {M}.gan.r1=approximate, or start one rank"
        )
    dp_shard, span = max(1, shard // cp), "max(fsdp_shard_size, context_parallel_size)"
    divides = partial(require_divisible, "world size", value=world_size)
    divides(by=cp, by_name="context_parallel_size", knob=CONTEXT)
    divides(by=shard, by_name="fsdp_shard_size", knob=SHARD)
    if shard % cp and cp % shard:
        raise ConfigError(f"{SHARD}={shard} and {CONTEXT}={cp}: one must divide the other")
    divides(by=dp_shard * cp, by_name=span, knob=f"{SHARD} or {CONTEXT}")
    return world_size // (dp_shard * cp), dp_shard, cp


def _two_times(model: CommonModelConfig) -> None:
    """The student of tf_meanflow has two times, every other network one."""
    kind = model.stage
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


def _products(model: CommonModelConfig) -> None:
    """FP8 products are for weights that are trained, once differentiated, in eager code."""
    for role, net in networks(model).items():
        if net.linear_precision == "compute":
            continue
        told = f"{M}.{role}.linear_precision={net.linear_precision}"
        if role not in TRAINED:
            raise ConfigError(
                f"{told} is for networks that are trained, and this one is frozen; set"
                f" {M}.frozen_weights=fp8"
            )
        if model.lora.rank:
            raise ConfigError(
                f"{told} rounds trained weights, and {M}.lora.rank={model.lora.rank} trains"
                " adapters on frozen ones; choose one of them"
            )
        if model.compile:
            raise ConfigError(
                f"{told} cannot take {M}.compile=True, with which it was never tried; choose one of"
                " them"
            )
        gan = model.gan if isinstance(model, CausalConfig) and model.gan.loss_scale else None
        if gan is not None and gan.r1 == "exact" and role == "net_fake_score":
            raise ConfigError(
                f"{told} cannot be differentiated twice, as {M}.gan.r1=exact does; set"
                f" {M}.gan.r1=approximate, or leave it at compute"
            )
        wan = wan_config(net, knob=f"{M}.{role}")
        if not fits((wan.dim,)):
            raise ConfigError(
                f"{told} has no effect on a network of width {wan.dim}, FP8 products take multiples"
                f" of {ALIGNMENT}; leave it at compute"
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
        sac = net.sac_config
        if sac.keep_last_blocks >= wan.num_layers:
            raise ConfigError(
                f"{knob}.sac_config.keep_last_blocks={sac.keep_last_blocks} keeps all"
                f" {wan.num_layers} blocks, and mode={sac.mode} has no effect; choose fewer, or set"
                " mode=none"
            )
        if wan.max_frames < model.state_t:
            raise ConfigError(
                f"{M}.state_t={model.state_t} is beyond the rotary table of"
                f" {knob}.max_frames={wan.max_frames}"
            )
        rows, columns = wan.token_grid(*model.latent_size())
        spread = {f"{knob} num_heads": wan.num_heads, f"tokens per frame of {knob}": rows * columns}
        for name, value in spread.items():
            by_name = "context_parallel_size"
            require_divisible(name, value=value, by=cp, by_name=by_name, knob=CONTEXT)


def _discriminator(config: TrainConfig) -> None:
    """It has real videos, and blocks to read."""
    model = config.model.config
    if not isinstance(model, CausalConfig) or not model.gan.loss_scale:
        return
    if config.dataloader_train.kind == "prompts":
        raise ConfigError(
            f"data=prompts has no latents, which {M}.gan.loss_scale={model.gan.loss_scale:g} shows"
            f" a discriminator as real videos; use data=latents, or set {M}.gan.loss_scale=0"
        )
    knob = f"{M}.net_fake_score"
    model.gan.read_blocks(wan_config(networks(model)["net_fake_score"], knob=knob).num_layers)


def _data(config: TrainConfig) -> None:
    model, kind = config.model.config, config.dataloader_train.kind
    if kind == "prompts" and model.stage != "sf_dmd":
        raise ConfigError(
            f"data=prompts has no latents, which {model.stage} trains on (only sf_dmd is purely"
            " on-policy); use data=latents"
        )
    if kind == "toy" and model.text_encoder_class != "toy":
        raise ConfigError(
            f"data=toy needs {M}.text_encoder_class=toy, got {model.text_encoder_class!r}"
        )
