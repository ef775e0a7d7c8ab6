"""One training step: the terms of one phase, their gradients, one verdict, one update.

The verdict (are the losses and gradients finite, did someone ask to stop) is a single reduction
over all ranks and a single read on the host, taken before the update: a step either happens on
every rank or on none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rcm.core.errors import ConfigError, NonFinite
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.methods.base import Method, Phase
from rcm.parallel.fsdp import gathered, local, reshard, set_gradient_sync
from rcm.parallel.mesh import ParallelDims
from rcm.train.diagnose import explain
from rcm.train.offload import IdleRoles
from rcm.train.state import STUDENT, TrainState

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step treats gradients.

    `grad_clip`: scale gradients down to norm `clip_norm` (off in every published run; the norm is
    measured always). `gradient_sync`: "last" reduces gradients over ranks once, in the backward
    pass of the last term of the last micro-batch, and holds unsharded gradients until then; "each"
    reduces after every term, which costs communication and saves that memory. `keep_gathered`:
    largest student, in parameters, whose weights FSDP2 keeps gathered through the passes of a
    rollout and of the chunks that are replayed.
    """

    grad_clip: bool = False
    clip_norm: float = 1.0
    gradient_sync: Literal["last", "each"] = "last"
    keep_gathered: int = 0

    def __post_init__(self) -> None:
        if self.gradient_sync not in ("last", "each"):
            raise ConfigError(
                f"trainer.gradient_sync={self.gradient_sync!r} is unknown; choose last or each"
            )
        if not self.clip_norm > 0:
            raise ConfigError(f"trainer.clip_norm={self.clip_norm} must be positive")


@dataclass(frozen=True)
class StepReport:
    """What a step did: its phase, scalars to log (tensors on the device, or floats), and whether
    any rank asked to stop.
    """

    phase: Phase
    logs: dict[str, Tensor | float]
    stop: bool


def run_step(
    state: TrainState,
    method: Method,
    *,
    batches: Sequence[LatentBatch],
    rngs: Sequence[StepRng],
    dims: ParallelDims,
    config: StepConfig,
    idle: IdleRoles | None = None,
    stop: bool = False,
) -> StepReport:
    """Run the phase of `state.iteration` on `batches` (one per micro-batch, `rngs` alike) and
    update the phase's roles, their schedules and the EMA. `idle`: networks that wait in host memory
    while it is not their turn.

    Losses are averaged over micro-batches and ranks. Raises NonFinite (naming role, step, term, and
    the module or parameter concerned) before anything is updated, on every rank, when a loss or
    gradient is NaN or infinite; RuntimeError when a phase has no term or touches another role's
    gradients.
    """
    phase = method.phase(state.iteration)
    roles = {name: state.roles[name] for name in phase.roles}
    nets = [role.net for role in roles.values()]
    idle, each = idle or IdleRoles(), config.gradient_sync == "each"
    rolled = _rolled(state, phase, config)
    idle.begin(phase.roles)
    with ExitStack() as stack:
        for net in rolled:
            stack.enter_context(gathered(net))
        borrowed = [net for net in rolled if STUDENT not in phase.roles]
        losses, logs = _accumulate(
            method,
            phase,
            nets,
            batches=batches,
            rngs=rngs,
            each=each,
            idle=idle,
            borrowed=borrowed,
        )
    idle.rest()
    _refuse_stray_gradients(state, phase)
    for net in nets:
        reshard(net)
    norms, finite, stopping = _verdict(nets, losses, dims=dims, stop=stop)
    if not finite:
        message = explain(method, phase, batches=batches, rngs=rngs, losses=losses, norms=norms)
        for role in roles.values():
            role.optimizer.zero_grad(set_to_none=True)
        raise NonFinite(message)
    for (name, role), norm in zip(roles.items(), norms, strict=True):
        if config.grad_clip:
            _scale_gradients(role.net, min(1.0, config.clip_norm / (norm + 1e-6)))
        logs |= {f"grad_norm/{name}": norm, f"lr/{name}": role.step()}
    if phase.role == STUDENT and state.ema is not None:
        state.ema.update(roles[STUDENT].net, index=phase.index)
    for role in roles.values():
        role.optimizer.zero_grad(set_to_none=True)
    state.iteration += 1
    return StepReport(phase, logs, stopping)


def _rolled(state: TrainState, phase: Phase, config: StepConfig) -> list[nn.Module]:
    """The student, if it makes a video in this phase and is small enough to stay gathered."""
    net = state.roles[STUDENT].net
    # of all modules: what is gathered with adapters is their base
    held = (p for module in net.modules() for p in module._parameters.values() if p is not None)
    small = sum(p.numel() for p in held) <= config.keep_gathered
    return [net] if phase.rollout and small else []


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Items, each with whether it is the last; looks one item ahead."""
    iterator = iter(items)
    for current in iterator:
        for following in iterator:
            yield current, False
            current = following
        yield current, True


def _accumulate(
    method: Method,
    phase: Phase,
    nets: Sequence[nn.Module],
    *,
    batches: Sequence[LatentBatch],
    rngs: Sequence[StepRng],
    each: bool,
    idle: IdleRoles,
    borrowed: Sequence[nn.Module],
) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor | float]]:
    """Evaluate and back-propagate every term of every micro-batch; return the losses by name, and
    the means over micro-batches of what terms log. No backward pass needs the weights of networks
    that are `borrowed`.
    """
    losses: list[tuple[str, Tensor]] = []
    sums: dict[str, Tensor | float] = {}
    for micro, (batch, rng) in enumerate(zip(batches, rngs, strict=True), start=1):
        terms = method.terms(phase, batch, rng)
        for thunk, is_last in ((t, True) for t in terms) if each else _with_last(terms):
            for net in nets:
                set_gradient_sync(net, each or (is_last and micro == len(batches)))
            idle.rest()
            term = thunk()
            for net in borrowed:
                reshard(net)
            idle.rest()
            (term.value / len(batches)).backward()
            value = term.value.detach()
            losses.append((term.name, value))
            for key, scalar in ((f"loss/{term.name}", value), *term.logs.items()):
                share = scalar.detach().double() / len(batches)
                sums[key] = sums[key] + share if key in sums else share
    if not losses:
        raise RuntimeError(f"method {method.name} yielded no loss term in phase {phase}")
    return losses, sums


def _refuse_stray_gradients(state: TrainState, phase: Phase) -> None:
    for name, other in state.roles.items():
        if name not in phase.roles and any(p.grad is not None for p in other.net.parameters()):
            raise RuntimeError(
                f"a {phase.role} phase left gradients in {name}; its terms must run other roles"
                " under no_grad"
            )


def _gradients(net: nn.Module) -> list[Tensor]:
    return [local(p.grad) for p in net.parameters() if p.grad is not None]


def _verdict(
    nets: Sequence[nn.Module], losses: list[tuple[str, Tensor]], *, dims: ParallelDims, stop: bool
) -> tuple[list[float], bool, bool]:
    """Global gradient norm of each network, whether all losses and gradients are finite, whether
    any rank asks to stop: one reduction, one host read.
    """
    squares = []
    for net in nets:
        grads = _gradients(net)
        if not grads:
            raise RuntimeError(
                "the backward pass reached no parameter of the trained network"
                f" {type(net).__name__}"
            )
        squares.append(torch.nn.utils.get_total_norm(grads, norm_type=2.0).double().square())
    bad_losses = (~torch.stack([value.isfinite() for _, value in losses])).sum().to(squares[0])
    # a discriminator's head is on the card while the network it reads lives on the host
    squares = [square.to(bad_losses.device) for square in squares]
    facts = torch.stack([*squares, bad_losses, torch.full_like(bad_losses, float(stop))])
    if dims.world_size > 1:
        dist.all_reduce(facts)
    *totals, bad, stops = facts.tolist()
    # every replica adds the same shards
    norms = [(total / dims.dp_replicate) ** 0.5 for total in totals]
    return norms, bad == 0 and all(norm < float("inf") for norm in norms), stops > 0


def _scale_gradients(net: nn.Module, factor: float) -> None:
    torch._foreach_mul_(_gradients(net), factor)
