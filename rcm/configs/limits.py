"""What each key alone may be: smallest and largest numbers, sizes a machine can hold, names of folders. Every message names the key."""

from __future__ import annotations

from dataclasses import fields

from rcm.configs.convert import get_key
from rcm.configs.network import networks
from rcm.configs.schema import JobConfig, TrainConfig
from rcm.configs.schema_model import PIXELS, CommonModelConfig, NetConfig
from rcm.core.errors import ConfigError

M = "model.config"
_OPTIMIZERS = ("optimizer", f"{M}.optimizer_fake_score")
_SCHEDULERS = ("scheduler", f"{M}.scheduler_fake_score")


def check_limits(config: TrainConfig) -> None:
    """Raise `ConfigError` at the first value that cannot be meant."""
    _job(config.job)
    _ranges(config)
    _shapes(config.model.config)


def _job(job: JobConfig) -> None:
    """The run's folder is below the output root, and its name one that every file system takes."""
    for key in ("project", "group", "name", "output_root"):
        text = getattr(job, key)
        inside = key == "output_root" or not (text.startswith(("/", "~")) or ".." in text.split("/"))
        if not inside:
            raise ConfigError(f"job.{key}={text!r} leaves job.output_root; give a relative name without '..', or set job.output_root")
        if any(not c.isprintable() for c in text) or any(len(part.encode()) > 255 for part in text.split("/")):
            raise ConfigError(f"job.{key}={text[:80]!r} is no name of a folder: printable characters, at most 255 bytes between two '/'")


_AT_LEAST = {
    1: (
        "trainer.max_iter",
        "trainer.grad_accum_iter",
        "trainer.logging_iter",
        "trainer.sampling.num_samples",
        "checkpoint.save_iter",
        "dataloader_train.batch_size",
        "dataloader_train.prefetch_factor",
        "dataloader_train.num_videos",
        "model_parallel.context_parallel_size",
        f"{M}.fsdp_shard_size",
        f"{M}.state_ch",
        f"{M}.state_t",
        f"{M}.student_update_freq",
        f"{M}.max_simulation_steps_fake",
    ),
    0: (
        "trainer.seed",
        "trainer.profile_iter",
        "trainer.sampling.every_n",
        "trainer.sampling.ema_every_n",
        "checkpoint.keep_last",
        "dataloader_train.num_workers",
        "dataloader_train.shuffle_seed",
        f"{M}.loss_scale",
        f"{M}.loss_scale_dmd",
        f"{M}.tangent_warmup",
        f"{M}.ema.iteration_shift",
        *(f"{root}.weight_decay" for root in _OPTIMIZERS),
        *(f"{root}.{name}" for root in _SCHEDULERS for name in ("warm_up_steps", "cycle_length", "f_start", "f_max", "f_min")),
    ),
}
_AT_MOST = {
    2**32 - 1: ("trainer.seed", "dataloader_train.shuffle_seed"),
    10**12: ("trainer.max_iter", "trainer.logging_iter", "checkpoint.save_iter", f"{M}.tangent_warmup", f"{M}.ema.iteration_shift"),
    10**7: ("dataloader_train.num_videos",),
    2**16: ("dataloader_train.batch_size", "trainer.grad_accum_iter", f"{M}.state_ch", f"{M}.state_t", f"{M}.dcm_total_steps"),
    1024: (
        "trainer.sampling.num_samples",
        "dataloader_train.prefetch_factor",
        "dataloader_train.num_workers",
        f"{M}.max_simulation_steps_fake",
    ),
    1: tuple(f"{root}.lr" for root in _OPTIMIZERS),
}
"""Largest values. A CPU generator tells 32 bits of a seed apart; AdamW moves a weight by about lr per update; the others are mistyped."""
_SIZES_AT_MOST = {"num_layers": 1024, "max_frames": 2**16, "text_len": 2**16, "num_heads": 2**12}
_SIZE_AT_MOST = 2**17
_LATENT_AT_MOST = 4096
_POSITIVE = (f"{M}.grad_clip_norm", f"{M}.sigma_max", *(f"{root}.{name}" for root in _OPTIMIZERS for name in ("lr", "eps")))


def _ranges(config: TrainConfig) -> None:
    for least, keys in _AT_LEAST.items():
        for key in keys:
            if get_key(config, key) < least:
                raise ConfigError(f"{key}={get_key(config, key)} must be at least {least}")
    for most, keys in _AT_MOST.items():
        for key in keys:
            if get_key(config, key) > most:
                raise ConfigError(f"{key}={get_key(config, key)} must be at most {most}")
    for key in _POSITIVE:
        if not get_key(config, key) > 0:
            raise ConfigError(f"{key}={get_key(config, key)} must be positive")
    for root, schedule in zip(_OPTIMIZERS, _SCHEDULERS, strict=True):
        _rate(config, root, schedule)
        for i, beta in enumerate(get_key(config, f"{root}.betas")):
            if not 0 <= beta < 1:
                raise ConfigError(f"{root}.betas[{i}]={beta} must be in [0, 1)")
    model, limit = config.model.config, config.trainer.nan_sample_limit
    if not 0 <= limit <= 1:
        raise ConfigError(f"trainer.nan_sample_limit={limit} must be a share in [0, 1]")
    if model.ema.enabled and not 0 < model.ema.rate < 12**-0.5:
        raise ConfigError(f"{M}.ema.rate={model.ema.rate} must be in (0, {12**-0.5:.3f}), the widths a power-function average can have")
    scale = model.rectified_flow_t_scaling_factor
    if scale != 1000:
        raise ConfigError(f"{M}.rectified_flow_t_scaling_factor={scale} must be 1000, Wan's timestep of t = 1")


def _rate(config: TrainConfig, root: str, schedule: str) -> None:
    """The largest rate of a schedule, and the decay it multiplies, leave weights between updates what they are."""
    optimizer, plan = get_key(config, root), get_key(config, schedule)
    peak = optimizer.lr * max(plan.f_start, plan.f_max, plan.f_min)
    if peak > 1:
        raise ConfigError(f"{root}.lr={optimizer.lr:g} times the largest factor of {schedule} is {peak:g}; it must be at most 1")
    if peak * optimizer.weight_decay >= 1:
        raise ConfigError(
            f"{root}.weight_decay={optimizer.weight_decay:g} times the largest rate {peak:g} must be below 1: it would turn weights around"
        )


def _shapes(model: CommonModelConfig) -> None:
    """Latents and networks that a machine can hold."""
    known = model.latent_hw is not None or (model.resolution, model.aspect_ratio) in PIXELS
    if known and any(not 1 <= size <= _LATENT_AT_MOST for size in model.latent_size()):
        raise ConfigError(f"{M}.latent_hw={list(model.latent_size())} must be two sizes from 1 to {_LATENT_AT_MOST}")
    for role, net in networks(model).items():
        _sizes(f"{M}.{role}", net)


def _sizes(knob: str, net: NetConfig) -> None:
    """Every given size of a network is one that a machine can hold."""
    every = net.sac_config.every_n_blocks
    if not 1 <= every <= _SIZES_AT_MOST["num_layers"]:
        raise ConfigError(f"{knob}.sac_config.every_n_blocks={every} must be in 1 to {_SIZES_AT_MOST['num_layers']}; 1 is every block")
    for field in fields(net):
        value, most = getattr(net, field.name), _SIZES_AT_MOST.get(field.name, _SIZE_AT_MOST)
        if isinstance(value, int) and not 1 <= value <= most:
            raise ConfigError(f"{knob}.{field.name}={value} must be in 1 to {most}")
