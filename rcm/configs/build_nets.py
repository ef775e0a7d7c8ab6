"""Networks of a run: built on meta, parallelised, given memory, and filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import Tensor, nn

from rcm.configs.bases import TRAINED, Base, alpha_of, base_of, checkpoint_of, roles_on
from rcm.configs.network import wan_config
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError
from rcm.nets.attention import configured
from rcm.nets.denoiser import Denoiser
from rcm.nets.lora import AdaptedNet, attach, initial_factors
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT
from rcm.nets.wan.two_times import SPAN, with_second_time
from rcm.parallel.agree import on_first, shared
from rcm.parallel.apply import parallelize, parallelize_head
from rcm.parallel.init import check_equal, drawn_weights, load_full, materialise, on_meta
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.adapted_weights import AdaptedWeights
from rcm.pipelines.described import description_of
from rcm.pipelines.wan_files import NetworkWeights, network_weights
from rcm.pipelines.weight_files import open_weights
from rcm.storage.digest import DigestedWeights
from rcm.train.offload import IdleRoles

Head = TypeVar("Head", bound=nn.Module)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def precision_of(config: CommonModelConfig) -> Precision:
    """Weights and reductions in float32 or wider; compute and timestep as configured."""
    compute = _DTYPES[config.precision]
    wide = torch.promote_types(compute, torch.float32)
    return Precision(params=wide, compute=compute, reduce=wide, time=_DTYPES[config.time_precision])


def kept_gathered(config: TrainConfig) -> int:
    """Parameters of the largest student that `trainer.keep_gathered_gib` lets stay gathered."""
    size = precision_of(config.model.config).compute.itemsize
    return int(config.trainer.keep_gathered_gib * 2**30 / size)


def open_network(path: str | Path, *, knob: str) -> NetworkWeights | AdaptedWeights:
    """The network in a file or folder, averaged weights preferred; nothing is read yet.

    `CheckpointError` names the path and the config key.
    """
    try:
        return network_weights(open_weights(path))
    except CheckpointError as error:
        raise CheckpointError(f"{knob}: {error}") from error


class NetBuilder:
    """Builds the networks of one run on this rank; every call is collective.

    `resumes`: a checkpoint will replace trained weights. `idle`: takes charge of networks that are
    alone in memory. `host`: trained ones live in host memory. With `lora.rank`, networks of equal
    sizes and checkpoint are one: adapters lie on it, a teacher is the base without them. `adapted`:
    role -> where its base comes from, as in `rcm.json`.
    """

    def __init__(
        self,
        config: CommonModelConfig,
        *,
        dims: ParallelDims,
        device: torch.device,
        seed: int,
        resumes: bool = False,
        idle: IdleRoles | None = None,
        host: bool = False,
    ) -> None:
        self.config, self.dims, self.device, self.seed = config, dims, device, seed
        self.resumes, self.idle, self.host = resumes, idle, host
        self.precision = precision_of(config)
        self.adapted: dict[str, dict[str, str | None]] = {}
        self._bases: dict[Base, nn.Module] = {}

    def trained(self, knob: str) -> Denoiser:
        """The network at `knob` ("net", "net_fake_score"), to be trained."""
        if self.config.lora.rank:
            return Denoiser(AdaptedNet(self._base(knob), TRAINED[knob]), self.precision)
        return Denoiser(self._alone(knob, frozen=False), self.precision)

    def frozen(self, knob: str) -> Denoiser:
        """A teacher: compute precision, no gradient."""
        shared = bool(roles_on(self.config, base_of(self.config, knob)))
        net = AdaptedNet(self._base(knob), None) if shared else self._alone(knob, frozen=True)
        return Denoiser(net, self.precision).eval_params()

    def head(self, build: Callable[[], Head]) -> Head:
        """What `build` makes, parallel as the network whose tokens it reads, at random weights."""
        head = on_meta(build)
        parallelize_head(head, dims=self.dims, precision=self.precision)
        materialise(head, device=self.device)
        drawn = on_first(lambda: drawn_weights(build, seed=self.seed))
        load_full(head, drawn, source="initial weights")
        check_equal(head, dims=self.dims)
        return head

    def adapters(self) -> dict[str, Any] | None:
        """What a checkpoint says of its adapters; None where all weights are trained."""
        lora = self.config.lora
        if not lora.rank:
            return None
        return {
            "rank": lora.rank,
            "alpha": alpha_of(lora),
            "layers": list(lora.layers),
            "bases": self.adapted,
        }

    def _base(self, knob: str) -> nn.Module:
        """The network that carries the adapters of every role that starts where `knob` does."""
        base = base_of(self.config, knob)
        if base not in self._bases:
            roles = roles_on(self.config, base)
            first = next(name for name, role in TRAINED.items() if role == roles[0])
            self._bases[base] = self._build(first, frozen=False, roles=roles)
            logger.info("{}: adapters of {} on one base", first, " and ".join(roles))
        return self._bases[base]

    def _alone(self, knob: str, *, frozen: bool) -> nn.Module:
        net = self._build(knob, frozen=frozen)
        if self.idle is not None and self.host and not frozen:
            self.idle.watch(net)
        elif self.idle is not None:
            gan = isinstance(self.config, CausalConfig) and self.config.gan.loss_scale > 0
            role = TRAINED.get(knob, knob.removeprefix("net_"))
            self.idle.add(role, net, judges=gan and knob == "net_fake_score")
        return net

    def _build(self, knob: str, *, frozen: bool, roles: tuple[str, ...] = ()) -> nn.Module:
        """A filled network; with `roles` a frozen one with adapters for each."""
        config, net_config = self.config, getattr(self.config, knob)
        sizes = wan_config(net_config, knob=f"model.config.{knob}")

        def plain() -> WanDiT:
            backend = configured(config.attention_backend, flex_backend=config.flex_backend)
            return WanDiT(sizes, attention=backend, fused=config.fused_layers)

        def build() -> WanDiT:
            net = plain().requires_grad_(not frozen)
            if roles:
                lora = config.lora
                attach(net, lora.layers, roles=roles, rank=lora.rank, alpha=alpha_of(lora))
            return net

        net, host = on_meta(build), self.host and not frozen
        parallelize(
            net,
            dims=self.dims,
            precision=self.precision,
            checkpoint=net_config.sac_config,
            compile=config.compile,
            frozen_weights=config.frozen_weights if frozen else "compute",
            linear_precision=net_config.linear_precision,
            host=host,
        )
        net.set_jvp_implementation(config.jvp_implementation)
        materialise(net, device="cpu" if host else self.device)
        quiet = self.resumes and not (frozen or roles)
        self._fill(net, knob, roles, lambda: self._weights(knob, plain, quiet=quiet))
        check_equal(net, dims=self.dims)
        return net

    def _fill(
        self,
        net: nn.Module,
        knob: str,
        roles: tuple[str, ...],
        start: Callable[[], tuple[Mapping[str, Tensor] | None, str]],
    ) -> None:
        """Give a network the values of `start`, and adapters for each of `roles`."""
        weights, source = start()
        if roles:
            self._fill_adapted(net, weights, source=source, knob=knob, roles=roles)
        else:
            load_full(net, weights, source=source)

    def _weights(
        self, knob: str, plain: Callable[[], WanDiT], *, quiet: bool
    ) -> tuple[Mapping[str, Tensor] | None, str]:
        """What a network starts from, on rank 0, and its name in errors; `quiet`: unsaid."""
        net_config, checkpoint = getattr(self.config, knob), checkpoint_of(self.config, knob)
        if not checkpoint:
            if not quiet:
                logger.warning(
                    "{}: RANDOM weights (seed {}), no checkpoint was given", knob, self.seed
                )
            return on_first(lambda: drawn_weights(plain, seed=self.seed)), "initial weights"
        key, size = f"model.config.{knob}", _size(asdict(wan_config(net_config)))
        weights = on_first(lambda: open_network(checkpoint, knob=f"{key}'s checkpoint"))
        said = "" if weights is None else _said(weights)
        about = f"{key} = {net_config.preset}, {size}"
        logger.info("{}: weights from {}", knob, checkpoint)
        if weights is not None and (told := _other_pattern(weights, self.config)):
            logger.warning("{}: {} {}", knob, checkpoint, told)
        start = on_first(lambda: weights and _in_times(weights, wan_config(net_config), key))
        if start is not weights:
            logger.info(
                "{}: {} has one time; the second one begins without effect", knob, checkpoint
            )
        if net_config.two_times:
            about += f", two times; only {SPAN}.* may be missing"
        return start, f"{checkpoint}{said} (for {about})"

    def _fill_adapted(
        self,
        net: nn.Module,
        weights: Mapping[str, Tensor] | None,
        *,
        source: str,
        knob: str,
        roles: tuple[str, ...],
    ) -> None:
        """Load the base, note which it is, and start adapters that change nothing."""
        compute = self.precision.compute
        digested = None if weights is None else DigestedWeights(weights, dtype=compute)
        load_full(AdaptedNet(net, None), digested, source=source)
        # the checkpoint, where a job was given: the job may go on
        file = getattr(weights, "file", None)
        found = (file and str(file.path), digested.digest) if digested is not None else None
        path, digest = shared(found)
        dtype = str(compute).removeprefix("torch.")
        told = {"path": path, "dtype": dtype, "digest": digest}
        for role in roles:
            view, seed = AdaptedNet(net, role), self.seed + list(TRAINED.values()).index(role)
            factors = on_first(partial(initial_factors, view, seed=seed))
            load_full(view, factors, source="initial adapters")
            self.adapted[role] = told


def _in_times(
    weights: NetworkWeights | AdaptedWeights, sizes: WanConfig, key: str
) -> Mapping[str, Tensor]:
    """As `with_second_time`; `CheckpointError` with the file and the config key."""
    try:
        return with_second_time(weights, sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{weights.file.path} (for {key}): {error}") from error


def _size(network: Mapping[str, object]) -> str:
    return f"{network.get('num_layers')} layers of width {network.get('dim')}"


def _said(weights: NetworkWeights | AdaptedWeights) -> str:
    """Which network a checkpoint says it holds; "" for a file that does not describe itself."""
    found = description_of(weights.file)
    if found is None:
        return ""
    return f", which holds {found.network_name or 'a network'} of {_size(found.network)}"


def _other_pattern(weights: NetworkWeights | AdaptedWeights, config: CommonModelConfig) -> str:
    """A warning about weights of other blocks than the run's, legal but seldom meant; or ""."""
    found = description_of(weights.file)
    if found is None or found.pattern is None or config.pattern is None:
        return ""
    mine = config.pattern.name
    if found.pattern == mine:
        return ""
    return f"was trained in blocks {found.pattern}, this run has {mine} (first_chunk_t, chunk_t)"
