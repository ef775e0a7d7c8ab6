"""Words of the release's command line, as its users type them: what they say here, or why they say
nothing.

Four kinds. A group's choice (`optimizer=fusedadamw`, `data_train=webdataset`) stands for overrides
of this package where it is typed, so that later words win. A key under another name
(`trainer.callbacks.every_n_sample_reg.every_n`) is that key here. A key without a meaning
(`checkpoint.jit`) is refused with its reason: REFUSED is the whole list. A key with one value
(`checkpoint.strict_resume`) may be given that value: FIXED is the whole list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rcm.configs.convert import get_key
from rcm.configs.network import NETS
from rcm.configs.schema_common import M
from rcm.core.errors import ConfigError

_WAN_NETS = {
    f"wan2pt1_{size}_t2v{kind}": f"wan2pt1_{size.lower()}"
    for size in ("1pt3B", "14B")
    for kind in ("", "_jvp")
}

CHOICES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "optimizer": {"fusedadamw": ("optimizer.type=fusedadamw",)},
    "optimizer_fake_score": {"fusedadamw": (f"{M}.optimizer_fake_score.type=fusedadamw",)},
    "scheduler": {"lambdalinear": ()},
    "ema": {"power": (f"{M}.ema.enabled=true",)},
    "checkpoint": {"local": ()},
    "ckpt_type": {"dcp_distill": ()},
    "trainer": {"distill": ()},
    "conditioner": {"text_nodrop": ()},
    "tokenizer": {
        "wan2pt1_tokenizer": (f"{M}.tokenizer.name=wan",),
        "toy": (f"{M}.tokenizer.name=toy",),
    },
    "data_train": {
        "webdataset": ("data=latents",),
        **{name: (f"data={name}",) for name in ("latents", "prompts", "toy", "toy_shards", "fake")},
    },
}
"""Group -> choice -> overrides. An empty tuple: the one thing that there is."""

CALLBACKS: Mapping[str, Mapping[str, object]] = {
    "basic": {
        "trainer": {
            "callbacks": {
                "heart_beat": {"every_n": 10},
                "device_monitor": {"every_n": "${trainer.logging_iter}"},
            }
        }
    },
    "dataloading_speed": {},  # time/seconds_waiting_for_data is always logged
    "wandb": {"job": {"wandb_mode": "${oc.env:WANDB_MODE,online}"}},
    "viz_online_sampling_distill": {
        "trainer": {"sampling": {"every_n": 5000, "ema_every_n": 5000}}
    },
}
"""Choices of the group `callbacks`, a list; below what an experiment says, as in the release."""

_REG, _EMA = "trainer.callbacks.every_n_sample_reg", "trainer.callbacks.every_n_sample_ema"
RENAMED = {
    f"{_REG}.every_n": "trainer.sampling.every_n",
    f"{_EMA}.every_n": "trainer.sampling.ema_every_n",
    **{
        f"{root}.{name}": f"trainer.sampling.{name}"
        for root in (_REG, _EMA)
        for name in ("num_samples", "run_at_start")
    },
}
"""Key of the release -> the key here."""

_ALWAYS = "it is part of every training step here"
_STORE = "files go to the job's folder, there is no object store"
_LOGGED = "is always logged, every trainer.logging_iter"
_WANDB = "set job.wandb_mode; all numbers are logged every trainer.logging_iter"
_ONE_BY_ONE = "iterations are counted one by one"
_NO_VALIDATION = "there is no validation loop; scripts.compare_checkpoints scores checkpoints"
REFUSED = {
    "trainer.callbacks.grad_clip": (
        f"{_ALWAYS}: {M}.grad_clip, {M}.grad_clip_norm, and trainer.nan_policy for what is not"
        " finite"
    ),
    "trainer.callbacks.low_prec": f"{_ALWAYS}: {M}.precision computes, float32 keeps the weights",
    "trainer.callbacks.iter_speed": f"time/seconds_per_iteration {_LOGGED}",
    "trainer.callbacks.dataloader_speed": f"time/seconds_waiting_for_data {_LOGGED}",
    "trainer.callbacks.manual_gc": (
        "a step leaves no cycles behind that a collector would have to find"
    ),
    "trainer.callbacks.compile_tokenizer": "training reads latents and decodes previews alone",
    "trainer.callbacks.wandb": _WANDB,
    "trainer.callbacks.wandb_10x": _WANDB,
    _REG: "previews are trainer.sampling.every_n, num_samples and run_at_start",
    _EMA: (
        "previews of averaged weights are trainer.sampling.ema_every_n, num_samples and"
        " run_at_start"
    ),
    "trainer.callbacks.heart_beat.save_s3": _STORE,
    "trainer.callbacks.device_monitor.save_s3": _STORE,
    "trainer.callbacks.heart_beat.step_size": _ONE_BY_ONE,
    "trainer.callbacks.device_monitor.step_size": _ONE_BY_ONE,
    "trainer.callbacks.device_monitor.upload_every_n_mul": _STORE,
    "checkpoint.save_to_object_store": _STORE,
    "checkpoint.load_from_object_store": _STORE,
    "checkpoint.type": "there is one kind of checkpoint, DCP",
    "checkpoint.jit": "no traced copy is written; scripts.dcp_to_pth exports weights",
    "checkpoint.verbose": "what is saved and loaded is always logged",
    "checkpoint.broadcast_via_filesystem": "every rank reads its own part of a checkpoint",
    "checkpoint.dcp_allow_mismatched_size": (
        "loading is strict: a tensor of another shape is refused"
    ),
    "checkpoint.keys_to_skip_loading": (
        "loading is strict; parts are left out with checkpoint.keys_not_to_resume"
    ),
    "trainer.timestamp_seed": "a run can be repeated: set trainer.seed",
    "trainer.distributed_parallelism": f"it is FSDP2, with {M}.fsdp_shard_size",
    "trainer.run_validation": _NO_VALIDATION,
    "dataloader_val": _NO_VALIDATION,
    "data_val": _NO_VALIDATION,
}
"""Key, or group of keys, of the release -> why it has no meaning here."""

_RECORDS = "batches are records, not dictionaries"
_FUSED = "the fused kernel is taken wherever torch has it"
FIXED: Mapping[str, tuple[object, str]] = {
    "checkpoint.strict_resume": (True, "checkpoints are always loaded strictly"),
    "optimizer.type": ("fusedadamw", _FUSED),
    f"{M}.optimizer_fake_score.type": ("fusedadamw", _FUSED),
    f"{M}.input_data_key": ("videos", _RECORDS),
    f"{M}.input_latent_key": ("latents", _RECORDS),
    f"{M}.input_caption_key": ("prompts", _RECORDS),
    f"{M}.loss_scale_fake_score": (
        1.0,
        "the release defines it and uses it nowhere; scale the learning rate instead",
    ),
    f"{M}.rectified_flow_t_scaling_factor": (1000.0, "Wan's timestep of t = 1"),
    f"{M}.sigma_data": (1.0, "the TrigFlow wrapper is written for it"),
}
"""Every key that has one value here, and why."""


def said_here(key: str, value: object) -> Sequence[str] | None:
    """Overrides that `key=value` stands for; None if it is no group of the release. `ConfigError`
    lists the choices of a group.
    """
    if key in NETS and isinstance(value, str) and value in _WAN_NETS:
        return (f"{key}={_WAN_NETS[value]}",)
    if key not in CHOICES or isinstance(value, dict):
        return None
    choices = CHOICES[key]
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"unknown {key}={value!r}; choose from {', '.join(choices)}")
    return choices[value]


def check_fixed(config: object) -> None:
    """Raise `ConfigError` for another value of a key in FIXED."""
    for key, (value, why) in FIXED.items():
        group, _, name = key.rpartition(".")
        found = getattr(get_key(config, group), name, value)
        if found != value:
            told = f"{value:g}" if isinstance(value, float) else value
            raise ConfigError(
                f"{key}={found} must be {told}, another value has no effect in this version: {why}"
            )


def refusal(key: str) -> str | None:
    """Why the release's `key` is refused, None for a key that is not in the list."""
    for listed, why in REFUSED.items():
        if key == listed or key.startswith(f"{listed}."):
            return f"key {key!r} of the release has no meaning here: {why}"
    return None
