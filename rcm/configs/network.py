"""Sizes and parameters of a configured network; nothing is allocated."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from rcm.configs.schema_common import SIZES, CommonModelConfig, NetConfig
from rcm.core.errors import ConfigError
from rcm.nets.wan.config import PRESETS, WanConfig

NETS = ("net", "net_teacher", "net_causal_teacher", "net_bidirectional_teacher", "net_fake_score")
"""Keys of `model.config` that hold a network."""


def wan_config(net: NetConfig, *, knob: str = "model.config.net") -> WanConfig:
    """The network's sizes: its preset with the given numbers put in."""
    if net.preset not in PRESETS:
        raise ConfigError(f"{knob}.preset={net.preset!r} must be one of {', '.join(PRESETS)}")
    given = {name: getattr(net, name) for name in SIZES if getattr(net, name) is not None}
    try:
        return replace(PRESETS[net.preset], two_times=net.two_times, **given)
    except ConfigError as error:
        raise ConfigError(f"{knob}: {error}") from error


def networks(config: CommonModelConfig) -> dict[str, NetConfig]:
    """Key -> net config of every network that this run has."""
    found = {key: getattr(config, key, None) for key in NETS}
    if config.loss_scale_dmd == 0:  # nobody asks a fake score
        del found["net_fake_score"]
    return {key: net for key, net in found.items() if net is not None}


@cache
def parameter_count(net: NetConfig) -> int:
    """Parameters of the network, counted on the meta device."""
    import torch

    from rcm.nets.wan.model import WanDiT

    with torch.device("meta"):
        return sum(p.numel() for p in WanDiT(wan_config(net)).parameters())
