"""Networks of a run: built on meta, parallelised, given memory, and filled from a checkpoint or at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from loguru import logger
from torch import nn

from rcm.configs.network import wan_config
from rcm.configs.schema_model import CausalConfig, CommonModelConfig, NetConfig
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.attention import configured
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.model import WanDiT
from rcm.parallel.agree import on_first
from rcm.parallel.apply import parallelize
from rcm.parallel.init import check_equal, initialise, load_full, materialise, on_meta
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.wan_files import NetworkWeights, description_of, network_weights
from rcm.pipelines.weight_files import open_weights

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def precision_of(config: CommonModelConfig) -> Precision:
    """Master weights and reductions in float32 (float64 for float64 runs), compute and timestep as configured."""
    compute = _DTYPES[config.precision]
    wide = torch.promote_types(compute, torch.float32)
    return Precision(params=wide, compute=compute, reduce=wide, time=_DTYPES[config.time_precision])


def open_network(path: str | Path, *, knob: str) -> NetworkWeights:
    """The network of any file or folder that `open_weights` takes, averaged weights preferred; nothing is read yet.

    Raises `CheckpointError` naming the path and the config key for a missing, truncated or foreign file.
    """
    try:
        return network_weights(open_weights(path))
    except CheckpointError as error:
        raise CheckpointError(f"{knob}: {error}") from error


class NetBuilder:
    """Builds the networks of one run on this rank; every call is collective. `resumes`: a checkpoint will replace the trained weights."""

    def __init__(
        self, config: CommonModelConfig, *, dims: ParallelDims, device: torch.device, seed: int, resumes: bool = False
    ) -> None:
        self.config, self.dims, self.device, self.seed, self.resumes = config, dims, device, seed, resumes
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
            backend = configured(config.attention_backend, flex_backend=config.flex_backend)
            return WanDiT(sizes, attention=backend, fused=config.fused_layers)

        net = on_meta(build).requires_grad_(not frozen)
        parallelize(
            net,
            dims=self.dims,
            precision=self.precision,
            checkpoint=net_config.sac_config.mode,
            checkpoint_every=net_config.sac_config.every_n_blocks,
            compile=config.compile,
        )
        net.set_jvp_implementation(config.jvp_implementation)
        materialise(net, device=self.device)
        if checkpoint:
            weights = on_first(lambda: open_network(checkpoint, knob=f"model.config.{knob}'s checkpoint"))
            about = f"model.config.{knob} = {net_config.preset}, {_size(asdict(sizes))}"
            load_full(net, weights, source=f"{checkpoint}{'' if weights is None else _said(weights)} (for {about})")
            logger.info("{}: weights from {}", knob, checkpoint)
            if weights is not None and (told := _other_pattern(weights, config)):
                logger.warning("{}: {} {}", knob, checkpoint, told)
        else:
            initialise(net, build, seed=self.seed)
            if frozen or not self.resumes:
                logger.warning("{}: RANDOM weights (seed {}), no checkpoint was given", knob, self.seed)
        check_equal(net, dims=self.dims)
        return net


def _size(network: Mapping[str, object]) -> str:
    return f"{network.get('num_layers')} layers of width {network.get('dim')}"


def _said(weights: NetworkWeights) -> str:
    """Which network a checkpoint says it holds; nothing for a file that does not describe itself."""
    found = description_of(weights.file)
    return "" if found is None else f", which holds {found.network_name or 'a network'} of {_size(found.network)}"


def _other_pattern(weights: NetworkWeights, config: CommonModelConfig) -> str:
    """What to say of a checkpoint that was trained in other blocks than the run's; "" for no contradiction. Legal, seldom meant."""
    found = description_of(weights.file)
    if found is None or found.pattern is None or not isinstance(config, CausalConfig) or config.training_type == "bidirectional":
        return ""
    mine = BlockPattern(config.first_chunk_t, config.chunk_t).name
    return "" if found.pattern == mine else f"was trained in blocks {found.pattern}, this run has {mine} (first_chunk_t, chunk_t)"
