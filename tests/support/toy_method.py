"""A small complete training set-up: the tiny Wan network, fake data, and a method with both roles,
two terms and optional faults.

Losses are smooth functions of network outputs with noise keyed by the step's rng, so every claim
about steps, ranks and resumes can be checked on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from rcm.core.dtypes import Precision
from rcm.core.rng import StepRng, randn
from rcm.data.batch import LatentBatch
from rcm.data.fake import FakeLatents
from rcm.data.loader import Loader
from rcm.losses.term import LossTerm
from rcm.methods.base import Phase
from rcm.nets.condition import Condition
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.mesh import ParallelDims
from rcm.train.ema import EMAConfig
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.state import TrainState
from tests.support.tiny_nets import tiny_config, tiny_net

FRAMES, HEIGHT, WIDTH, CHANNELS = 3, 4, 8, 4
CONFIG = tiny_config(dim=32, ffn_dim=48, text_dim=8, text_len=6)
LAYOUT = TokenLayout.bidirectional(FRAMES, grid=CONFIG.token_grid(HEIGHT, WIDTH))


def make_net(*, seed: int, dtype: torch.dtype = torch.float32) -> WanDiT:
    """A tiny network of `CONFIG` without a zero anywhere, eager attention in both passes."""
    net = tiny_net(seed=seed, dtype=dtype, attention="reference", **asdict(CONFIG))
    net.set_jvp_implementation("reference")
    return net


def make_loader(*, dims: ParallelDims, batch_size: int = 2, num: int = 24, prefetch: int = 0) -> Loader[LatentBatch]:
    """Fake latents for this data rank."""
    source = FakeLatents(num=num, latent_shape=(CHANNELS, FRAMES, HEIGHT, WIDTH), text_shape=(5, CONFIG.text_dim))
    return Loader(source, batch_size=batch_size, data_rank=dims.data_rank, data_world=dims.num_data_ranks, prefetch=prefetch)


@dataclass
class ToyMethod:
    """Velocity regression for the student (terms "flow" and "size") and, every third iteration, for
    a fake score (term "critic").

    `fault(iteration, net)` is called inside the first term of each phase: tests use it to break
    things.
    """

    nets: Mapping[str, nn.Module]
    dtype: torch.dtype = torch.float32  # of network inputs; losses are computed at least in float32
    fault: Callable[[int, Tensor], Tensor] | None = None
    name: str = "toy"

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        return self.nets

    def phase(self, iteration: int) -> Phase:
        if "fake_score" not in self.nets:
            return Phase("student", iteration, iteration)
        cycle, place = divmod(iteration, 3)
        return Phase("fake_score", cycle, iteration) if place == 2 else Phase("student", 2 * cycle + place, iteration)

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Callable[[], LossTerm]]:
        if phase.role == "fake_score":
            yield lambda: self._flow("critic", self.nets["fake_score"], batch, rng, phase)
            return
        yield lambda: self._flow("flow", self.nets["student"], batch, rng, phase)
        yield lambda: self._size(batch)

    def _flow(self, name: str, net: nn.Module, batch: LatentBatch, rng: StepRng, phase: Phase) -> LossTerm:
        x0, eps, t = self._draw(batch, rng)
        v = self._velocity(net, torch.lerp(x0, eps, t[:, None, :, None, None]), 1000 * t, batch)
        if self.fault is not None:
            v = self.fault(phase.iteration, v)
        loss = (v - (eps - x0)).square().mean()
        return LossTerm(name, loss, {f"{name}/noise": eps.sum().detach()})

    def _size(self, batch: LatentBatch) -> LossTerm:
        x0 = batch.latents
        v = self._velocity(self.nets["student"], x0, torch.full((x0.shape[0], 1), 500.0, device=x0.device), batch)
        return LossTerm("size", 0.1 * v.square().mean())

    def _draw(self, batch: LatentBatch, rng: StepRng) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents, noise and times [B, 1]; drawn on the CPU, so that every device sees the
        same.
        """
        rng = replace(rng, device="cpu")
        wide = torch.promote_types(self.dtype, torch.float32)
        x0 = batch.latents.to(wide)
        eps = randn(x0.shape, generator=rng.generator("noise"), dtype=wide, device=x0.device)
        t = torch.rand((x0.shape[0], 1), generator=rng.generator("time"), dtype=torch.float64)
        return x0, eps, t.to(x0)

    def _velocity(self, net: nn.Module, x: Tensor, timestep: Tensor, batch: LatentBatch) -> Tensor:
        return net(
            x.to(self.dtype), timestep.to(torch.promote_types(self.dtype, torch.float32)), Condition(batch.text.to(self.dtype)), LAYOUT
        )


def make_run(
    *,
    dims: ParallelDims,
    roles: tuple[str, ...] = ("student", "fake_score"),
    precision: str = "fp32",
    checkpoint: str = "none",
    ema: bool = True,
    fault: Callable[[int, Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    compile_blocks: bool = False,
) -> tuple[ToyMethod, TrainState]:
    """Parallelised networks, their method and the state before the first iteration."""
    policy = Precision.preset(precision)
    nets = {}
    for seed, role in enumerate(roles):
        net = make_net(seed=seed, dtype=policy.params).to(device)
        nets[role] = parallelize(net, dims=dims, precision=policy, checkpoint=checkpoint, compile=compile_blocks)
    optim = {role: AdamWConfig(lr=1e-3, weight_decay=0.01, betas=(0.0, 0.999)) for role in roles}
    state = TrainState.create(nets, optim=optim, schedule=LambdaLinear(warm_up_steps=4), ema=EMAConfig() if ema else None)
    return ToyMethod(nets, policy.compute, fault), state
