"""Networks of a run: built on meta, parallelised, given memory, and filled from a checkpoint or at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from zipfile import is_zipfile

import torch
from loguru import logger
from safetensors.torch import load_file
from torch import Tensor, nn

from rcm.configs.network import wan_config
from rcm.configs.schema_model import CommonModelConfig, NetConfig
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.convert import to_wan
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.init import check_equal, initialise, load_full, materialise, on_meta
from rcm.parallel.mesh import ParallelDims
from rcm.train.export import describe, read_weights

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def precision_of(config: CommonModelConfig) -> Precision:
    """Master weights and reductions in float32 (float64 for float64 runs), compute and timestep as configured."""
    compute = _DTYPES[config.precision]
    wide = torch.promote_types(compute, torch.float32)
    return Precision(params=wide, compute=compute, reduce=wide, time=_DTYPES[config.time_precision])


def read_checkpoint(path: str | Path, *, knob: str) -> dict[str, Tensor]:
    """Full weights under Wan's original names from a file (.pt, .pth, .safetensors) or a checkpoint folder of this package (EMA preferred).

    Raises `CheckpointError` naming the path and the config key for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{knob}={path} does not exist")
    if path.is_dir():
        try:
            return read_weights(path, weights="ema")
        except CheckpointError as error:
            if "net_ema" not in str(error):
                raise
            return read_weights(path, weights="reg")
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))  # files of old torch are no zip
        if not isinstance(state, Mapping):
            raise CheckpointError(f"it holds a {type(state).__name__}, not a state dict")
        return to_wan(state)
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise CheckpointError(
            f"{knob}={path} cannot be read ({type(error).__name__}: {reason}); it is damaged or not a checkpoint"
        ) from error


class NetBuilder:
    """Builds the networks of one run on this rank; every call is collective."""

    def __init__(self, config: CommonModelConfig, *, dims: ParallelDims, device: torch.device, seed: int) -> None:
        self.config, self.dims, self.device, self.seed = config, dims, device, seed
        self.precision = precision_of(config)

    def trained(self, net: NetConfig, *, knob: str, checkpoint: str) -> Denoiser:
        """A network that will be trained: master weights, activation checkpointing as configured."""
        return Denoiser(self._build(net, knob=knob, checkpoint=checkpoint, frozen=False), self.precision)

    def frozen(self, net: NetConfig, *, knob: str, checkpoint: str) -> Denoiser:
        """A teacher: compute precision, no gradient."""
        return Denoiser(self._build(net, knob=knob, checkpoint=checkpoint, frozen=True), self.precision).eval_params()

    def _build(self, net_config: NetConfig, *, knob: str, checkpoint: str, frozen: bool) -> nn.Module:
        sizes, config = wan_config(net_config, knob=f"model.config.{knob}"), self.config

        def build() -> WanDiT:
            return WanDiT(sizes, attention=config.attention_backend or "auto")

        net = on_meta(build).requires_grad_(not frozen)
        parallelize(net, dims=self.dims, precision=self.precision, checkpoint=net_config.sac_config.mode, compile=config.compile)
        net.set_jvp_implementation(config.jvp_implementation)
        materialise(net, device=self.device)
        if checkpoint:
            weights = read_checkpoint(checkpoint, knob=f"model.config.{knob}'s checkpoint") if self.dims.rank == 0 else None
            about = f"model.config.{knob} = {net_config.preset}, {_size(asdict(sizes))}"
            load_full(net, weights, source=f"{checkpoint}{_said(checkpoint) if self.dims.rank == 0 else ''} (for {about})")
            logger.info("{}: weights from {}", knob, checkpoint)
        else:
            initialise(net, build, seed=self.seed)
            logger.warning("{}: RANDOM weights (seed {}), no checkpoint was given", knob, self.seed)
        check_equal(net, dims=self.dims)
        return net


def _size(network: Mapping[str, object]) -> str:
    return f"{network.get('num_layers')} layers of width {network.get('dim')}"


def _said(checkpoint: str) -> str:
    """Which network a checkpoint says it holds; nothing for a file that does not describe itself."""
    found = describe(checkpoint)
    return "" if found is None else f", which holds {found.network_name or 'a network'} of {_size(found.network)}"
