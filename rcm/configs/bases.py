"""Networks of a run that start from the same weights; with adapters they are one in memory."""

from __future__ import annotations

import os

from rcm.configs.network import networks, wan_config
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig, M
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import ConfigError
from rcm.nets.wan.adapters import LoRAConfig, largest_rank
from rcm.nets.wan.config import WanConfig

TRAINED = {"net": "student", "net_fake_score": "fake_score"}
"""Keys of the networks that are trained -> their roles."""

Base = tuple[WanConfig, str]
"""Sizes, and where the weights come from ("": random): equal for networks that start equal."""


def checkpoint_of(model: CommonModelConfig, knob: str) -> str:
    """Path of the weights that the network at `knob` starts from; "" for random ones."""
    if knob == "net":
        return model.student_ckpt or (model.teacher_ckpt if isinstance(model, RCMConfig) else "")
    if knob == "net_fake_score":
        causal = isinstance(model, CausalConfig)
        teacher = "bidirectional_teacher_ckpt" if causal else "teacher_ckpt"
        return model.fake_score_ckpt or getattr(model, teacher)
    return getattr(model, f"{knob.removeprefix('net_')}_ckpt")


def base_of(model: CommonModelConfig, knob: str) -> Base:
    """Sizes and weights that the network at `knob` starts from."""
    path = checkpoint_of(model, knob)
    sizes = wan_config(getattr(model, knob), knob=f"{M}.{knob}")
    return sizes, os.path.realpath(path) if path else ""


def roles_on(model: CommonModelConfig, base: Base) -> tuple[str, ...]:
    """Roles that are trained on `base`, one set of adapters each; none without adapters."""
    if not model.lora.rank:
        return ()
    return tuple(
        role
        for knob, role in TRAINED.items()
        if knob in networks(model) and base_of(model, knob) == base
    )


def alpha_of(lora: LoRAConfig) -> float:
    """The alpha that `lora` means."""
    return float(lora.rank if lora.alpha is None else lora.alpha)


def check_lora(model: CommonModelConfig) -> None:
    """Raise `ConfigError` for adapters that the networks do not take."""
    lora = model.lora
    if not lora.rank:
        return
    layers, present = lora.layers, networks(model)
    for knob in TRAINED.keys() & present.keys():
        most = largest_rank(layers, wan_config(present[knob], knob=f"{M}.{knob}"))
        if lora.rank > most:
            raise ConfigError(
                f"{M}.lora.rank={lora.rank} must be at most {most}, the smallest layer that"
                f" {M}.{knob} adapts"
            )
    _one_way_to_recompute(model)


def _one_way_to_recompute(model: CommonModelConfig) -> None:
    knobs = [knob for knob in TRAINED if knob in networks(model)]
    if len(knobs) == 2 and base_of(model, knobs[0]) == base_of(model, knobs[1]):
        mine, theirs = (getattr(model, knob).sac_config for knob in knobs)
        if mine != theirs:
            told = [
                f"{sac.mode}, every {sac.every_n_blocks}"
                + f", last {sac.keep_last_blocks} kept" * (sac.keep_last_blocks > 0)
                for sac in (mine, theirs)
            ]
            raise ConfigError(
                f"{M}.net.sac_config ({told[0]}) and {M}.net_fake_score.sac_config ({told[1]})"
                f" differ, and with {M}.lora.rank={model.lora.rank} both are one network"
                f" ({checkpoint_of(model, 'net') or 'random weights'}); give both the same"
            )
