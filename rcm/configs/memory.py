"""Which ways to save memory a run may combine. What each does: docs/scale.md."""

from __future__ import annotations

import torch

from rcm.configs.bases import TRAINED, base_of, roles_on
from rcm.configs.network import networks, wan_config
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig, M
from rcm.core.errors import ConfigError
from rcm.kernels.flash_jvp.validation import MAX_HEAD, MIN_HEAD
from rcm.nets.fp8_linear import CAPABILITY
from rcm.train.moments import forms


def frozen_alone(model: CommonModelConfig) -> list[str]:
    """Keys of the frozen networks that are no base of adapters."""
    return [
        knob
        for knob in networks(model)
        if knob not in TRAINED and not roles_on(model, base_of(model, knob))
    ]


def check_memory(config: TrainConfig) -> None:
    """`ConfigError` for a way to save memory that this run cannot take, or that saves nothing."""
    model, offload = config.model.config, config.trainer.offload
    if model.frozen_weights != "compute":
        _frozen_weights(model)
    if offload.parameters and offload.states:
        raise ConfigError(
            "trainer.offload.states=True has no effect with trainer.offload.parameters=True, whose"
            " states are on the host already; choose one of them"
        )
    for key in ("idle_roles", "parameters"):
        if getattr(offload, key) and model.lora.rank:
            raise ConfigError(
                f"trainer.offload.{key}=True cannot take {M}.lora.rank={model.lora.rank}: roles on"
                " one base share its weights, which are never idle; choose one of them"
            )
    gan = model.gan if isinstance(model, CausalConfig) else None
    if offload.parameters and gan is not None and gan.r1 == "exact":
        raise ConfigError(
            f"trainer.offload.parameters=True cannot take {M}.gan.r1=exact: FSDP2, which gathers"
            f" them, gives no gradient that is differentiated again; set {M}.gan.r1=approximate"
        )
    if not offload.idle_roles:
        return
    if len(networks(model)) == 1:
        raise ConfigError(
            "trainer.offload.idle_roles=True has no effect on a run with one network, which is"
            " never idle; leave it at False"
        )


def require_here(config: TrainConfig, *, device: torch.device) -> None:
    """`ConfigError` if this machine lacks a package, FP8 products, or the kernel of tangents that
    the run needs.
    """
    model = config.model.config
    if model.jvp_implementation == "triton":
        _tangent_kernel(model, device)
    optimizers = {"optimizer": config.optimizer}
    if "net_fake_score" in networks(model):
        optimizers[f"{M}.optimizer_fake_score"] = model.optimizer_fake_score
    if isinstance(model, CausalConfig) and model.gan.loss_scale:
        optimizers[f"{M}.gan.optimizer"] = model.gan.optimizer
    for knob, optimizer in optimizers.items():
        forms(optimizer.states, knob=f"{knob}.states")
    if device.type == "cuda":  # other devices emulate the products
        require_products(model, torch.cuda.get_device_capability(device), where=str(device))


def require_products(model: CommonModelConfig, capability: tuple[int, int], *, where: str) -> None:
    """`ConfigError` for FP8 products that a card of this compute capability, called `where`, has
    not.
    """
    instead = {f"{M}.frozen_weights=fp8": "fp8_storage"} if model.frozen_weights == "fp8" else {}
    for role, net in networks(model).items():
        if net.linear_precision != "compute":
            instead[f"{M}.{role}.linear_precision={net.linear_precision}"] = "compute"
    if instead and (capability < CAPABILITY or model.precision != "bfloat16"):
        told, value = next(iter(instead.items()))
        raise ConfigError(
            f"{told} needs compute capability 8.9 or later and {M}.precision=bfloat16, {where} has"
            f" {'.'.join(map(str, capability))} and the run {model.precision}; set"
            f" {told.split('=')[0]}={value}"
        )


def _tangent_kernel(model: CommonModelConfig, device: torch.device) -> None:
    size = wan_config(model.net, knob=f"{M}.net").head_dim
    obstacles = {
        f"a CUDA device, this run is on {device}": device.type != "cuda",
        f"{M}.precision other than float64": model.precision == "float64",
        f"heads of {MIN_HEAD} to {MAX_HEAD}, {M}.net has {size}": not MIN_HEAD <= size <= MAX_HEAD,
    }
    for needed, lacks in obstacles.items():
        if lacks:
            raise ConfigError(
                f"{M}.jvp_implementation=triton needs {needed}; set it to auto or reference"
            )


def _frozen_weights(model: CommonModelConfig) -> None:
    told = f"{M}.frozen_weights={model.frozen_weights}"
    if not frozen_alone(model):
        base = f" beside the base of {M}.lora.rank={model.lora.rank}" if model.lora.rank else ""
        raise ConfigError(
            f"{told} has no effect on a run without a frozen network{base}; leave it at compute"
        )
    if model.compile:
        raise ConfigError(
            f"{told} cannot take {M}.compile=True, with which it was never tried; choose one of"
            " them"
        )
