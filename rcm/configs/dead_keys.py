"""Keys that somebody typed and that the run does not read: refused where a switch beside them turns
them off, told where the stage has no use for them.

An experiment may set what another choice then leaves unread; only what was typed counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from hydra.core.override_parser.types import Override

from rcm.configs.bases import TRAINED
from rcm.configs.network import networks
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig, M
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import ConfigError

_ENCODER = ("text_encoder_path", "text_cache")
_CHOSEN = {"pattern": (f"{M}.first_chunk_t", f"{M}.chunk_t")}
_TOY_CODEC = ("temporal_stride", "spatial_stride", "gain", "boost", "centre")


def typed_keys(parsed: Sequence[Override]) -> dict[str, None]:
    """Every key that overrides give a value, those inside {a: 1, b: {c: 2}} and those of a chosen
    pattern among them, in order.
    """
    told = (
        path
        for o in parsed
        for path in (*paths_of(o.key_or_group, o.value()), *_CHOSEN.get(o.key_or_group, ()))
    )
    return dict.fromkeys(told)


def paths_of(key: str, value: Any) -> list[str]:
    """The key itself, and every key inside a value written as {a: 1, b: {c: 2}}."""
    inner = value.items() if isinstance(value, dict) else ()
    return [key, *(path for name, v in inner for path in paths_of(f"{key}.{name}", v))]


def refuse_switched_off(
    config: TrainConfig, typed: Collection[str], *, known: Mapping[str, Any]
) -> None:
    """`ConfigError` for a typed key that another one turns off, unless it says what is so anyway.
    `known`: keys with their defaults.
    """
    for key, why, instead in _of_other_laws(config.model.config):
        if key in typed and key.rpartition(".")[0] not in typed:  # a law of the release has all
            raise ConfigError(f"{key} has no effect while {why}; {instead}")
    for key, why, instead in _switched_off(config):
        if key in typed and attrgetter(key)(config) != known[key]:
            raise ConfigError(
                f"{key}={attrgetter(key)(config)} has no effect while {why}; {instead}"
            )


def unread_keys(config: TrainConfig, typed: Collection[str]) -> list[str]:
    """Typed keys that the stage does not read, each with its value and the reason."""
    dead = dict(_unread(config))
    groups = {key: [group for group in dead if f"{key}.".startswith(f"{group}.")] for key in typed}
    return [
        f"{key}={attrgetter(key)(config)} is not read by {dead[found[0]]}"
        for key, found in groups.items()
        if found
    ]


def _of_other_laws(model: CommonModelConfig) -> Iterator[tuple[str, str, str]]:
    """As `_switched_off`: numbers that a time law does not read."""
    for law_key in ("p_G", "p_D"):
        law = getattr(model, law_key).law
        for name in ("shift",) if law == "lognormal" else ("p_mean", "p_std"):
            yield f"{M}.{law_key}.{name}", f"{M}.{law_key}.law={law}", "set the law too"


def _switched_off(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """Key, what turns it off, what to do."""
    model, trainer = config.model.config, config.trainer
    plans = ["scheduler", f"{M}.scheduler_fake_score"]
    if isinstance(model, CausalConfig) and model.gan.loss_scale:
        plans.append(f"{M}.gan.scheduler")
    for plan in plans:
        if not attrgetter(plan)(config).cycle_length:
            yield f"{plan}.f_min", f"{plan}.cycle_length=0 keeps f_max", "set that too"
        if not attrgetter(plan)(config).warm_up_steps:
            yield f"{plan}.f_start", f"{plan}.warm_up_steps=0", "set that too"
    if not model.grad_clip:
        yield f"{M}.grad_clip_norm", f"{M}.grad_clip=False", "set that to True"
    if not model.ema.enabled:
        for name in ("rate", "iteration_shift"):
            yield f"{M}.ema.{name}", f"{M}.ema.enabled=False", "set that to True"
    if trainer.nan_policy == "stop":
        told = "set that to skip_sample"
        yield "trainer.nan_sample_limit", "trainer.nan_policy=stop", told
    if config.dataloader_train.kind == "toy":
        told = "set data=latents or data=toy_shards"
        yield "dataloader_train.tar_path_pattern", "dataloader_train.kind=toy", told
    if model.latent_hw is not None:
        size = f"{M}.latent_hw={list(model.latent_hw)} gives the size"
        for name in ("resolution", "aspect_ratio"):
            yield f"{M}.{name}", size, f"set {M}.latent_hw=null, or leave it out"
    yield from _codec(model)
    if isinstance(model, CausalConfig) and model.sf_simulation_steps_per_chunk:
        counts = f"{M}.sf_simulation_steps_per_chunk"
        stands = f"{counts}={list(model.sf_simulation_steps_per_chunk)} gives the steps"
        yield f"{M}.max_simulation_steps_fake", stands, f"change {counts}"
    if isinstance(model, CausalConfig) and model.sf_backward_timestep_schedules:
        times = f"{M}.sf_backward_timestep_schedules"
        for name in ("backward_timesteps", "shift3_backward"):
            yield f"{M}.{name}", f"{times} gives the times of every entry", f"change {times}"
    if isinstance(model, RCMConfig) and not model.fd_type:
        yield f"{M}.fd_size", f"{M}.fd_type=0 takes exact derivatives", "set that too"
    if isinstance(model, RCMConfig) and not model.dmd_fix_timesteps:
        told = f"{M}.dmd_fix_timesteps=False draws the times"
        yield f"{M}.backward_timesteps", told, "set that to True"


def _codec(model: CommonModelConfig) -> Iterator[tuple[str, str, str]]:
    name = model.tokenizer.name
    for key in _TOY_CODEC if name != "toy" else ():
        yield f"{M}.tokenizer.{key}", f"{M}.tokenizer.name={name}", "set the name too"


def _unread(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Key of a value or of a record, and what has no use for it."""
    model, sampling, data = config.model.config, config.trainer.sampling, config.dataloader_train
    if model.tokenizer.name == "toy":
        yield f"{M}.tokenizer.vae_pth", "the toy codec"
    if model.text_encoder_class == "toy":
        yield from ((f"{M}.{key}", "the toy text encoder") for key in _ENCODER)
    if config.job.wandb_mode == "disabled":
        told = "a run with job.wandb_mode=disabled"
        yield from ((f"job.wandb_{name}", told) for name in ("project", "entity"))
    unread = "tar_path_pattern" if data.kind == "fake" else "num_videos"
    if data.kind != "toy":
        yield f"dataloader_train.{unread}", f"data={data.kind}"
    if not data.num_workers:
        yield "dataloader_train.prefetch_factor", "a loader with num_workers=0"
    if not (sampling.every_n or sampling.ema_every_n):
        for name in ("num_samples", "run_at_start"):
            yield f"trainer.sampling.{name}", "a run with sampling.every_n=0 and ema_every_n=0"
    kind, stage = model.stage, f"stage {model.stage}"
    critic = "net_fake_score" in networks(model)
    reads = {
        "loss_scale_dmd": model.net_fake_score is not None,
        "optimizer_fake_score": critic,
        "scheduler_fake_score": critic,
        "student_update_freq": critic,
        "max_simulation_steps_fake": critic,
        "p_D": critic,
    }
    if not (isinstance(model, CausalConfig) and model.has.self_forced):
        yield "trainer.keep_gathered_gib", f"{stage}, which makes no rollouts"
    if isinstance(model, CausalConfig):
        if not model.context.noisy:
            clean = "a run with context_from_last_step=False"
            yield f"{M}.context_from_last_step_start_chunk", clean
        scm = kind in ("tf_scm", "tf_dscm", "tf_meanflow", "tf_scm_sf_dmd")
        rolls = kind not in ("df", "bidirectional") and (kind != "tf" or model.context.noisy)
        dcm, simple = kind in ("tf_dcm", "tf_dscm"), kind in ("tf", "df", "bidirectional")
        reads |= {
            "loss_scale": kind != "sf_dmd",
            "p_G": scm or simple,
            "tangent_warmup": scm,
            "jvp_implementation": scm,
            "sample_timestep_shift": dcm or simple,
            "dcm_total_steps": dcm,
            "dcm_skipping_interval_steps": dcm,
            "loss_weighting": simple,
            "df_timestep_strategy": kind == "df",
            "kd_timesteps": model.has.trajectories,
            "backward_timesteps": rolls,
            "shift3_backward": rolls,
            "first_chunk_t": model.pattern is not None,
            "chunk_t": model.pattern is not None,
            "meanflow_equal_share": kind == "tf_meanflow",
            "causal_guidance": model.has.consistency or kind in ("tf", "df"),
            "bidirectional_guidance": model.has.self_forced or kind == "bidirectional",
        }
    else:
        assert isinstance(model, RCMConfig)
        consistent = model.loss_scale > 0
        dcm = consistent and model.cm_type == "dcm"
        if model.net_fake_score is None:
            stage += " without fake score"
        elif not critic:
            stage += f" with {M}.loss_scale_dmd=0"
        else:
            stage += f" with cm_type={model.cm_type}" if consistent else f" with {M}.loss_scale=0"
        reads |= {
            "p_G": consistent and not dcm,
            "tangent_warmup": consistent,
            "jvp_implementation": consistent and not dcm and model.fd_type < 2,
            **dict.fromkeys(("cm_type", "use_rf_scm", "tangent_form", "fd_type"), consistent),
            "dcm_total_steps": dcm,
            "dcm_skipping_interval_steps": dcm,
            "dcm_timestep_shift": dcm,
        }
    yield from ((f"{M}.{key}", stage) for key, read in reads.items() if not read)
    frozen = (knob for knob in networks(model) if knob not in TRAINED)
    yield from ((f"{M}.{knob}.sac_config", "a frozen network") for knob in frozen)
