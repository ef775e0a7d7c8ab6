"""Where a number stopped being finite. Slow and thorough: called once, when a run is about to stop,
on all ranks together.

A NaN in a gradient spreads towards the input, so the parameter nearest the output that has one is
closest to the cause. A NaN in a loss says nothing about its origin, so the phase is run again (its
randomness is keyed, hence the same) while every module of the trained networks is watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.methods.base import Method, Phase
from rcm.parallel.fsdp import local

Losses = Sequence[tuple[str, Tensor]]


def explain(
    method: Method,
    phase: Phase,
    *,
    batches: Sequence[LatentBatch],
    rngs: Sequence[StepRng],
    losses: Losses,
    norms: Sequence[float],
) -> str:
    """One sentence: role, update, term, and the module or parameter where the first NaN or infinity
    appeared. The same on every rank. Collective. `norms`: of the gradients of the phase's roles.
    """
    nets = {role: method.trainable[role] for role in phase.roles}
    bad_terms = sorted(
        {
            name
            for found in _everywhere(sorted({n for n, v in losses if not v.isfinite()}))
            for name in found
        }
    )
    start = f"{phase.role} update {phase.index} (iteration {phase.iteration}) is not finite"
    end = "weights were left as they were"
    if bad_terms:
        for net in nets.values():
            net.zero_grad(set_to_none=True)  # room for running the phase again
        modules = [
            found
            for found in _everywhere(_first_module(method, phase, batches=batches, rngs=rngs))
            if found
        ]
        where = (
            f"first non-finite output from {modules[0]}"
            if modules
            else (
                "all outputs of the trained networks are finite, so it arose in the term or a"
                " teacher"
            )
        )
        return f"{start}: loss of term {', '.join(bad_terms)}; {where}; {end}"
    names = [name for net in nets.values() for name, _ in net.named_parameters()]
    bad = {
        name
        for net in nets.values()
        for found in _everywhere(_bad_gradients(net))
        for name in found
    }
    ordered = [name for name in names if name in bad]
    where = (
        f"non-finite in {len(ordered)} of {len(names)} parameters, nearest the output"
        f" {ordered[-1]}, nearest the input {ordered[0]}"
        if ordered
        else f"no single one is non-finite, their norm is {max(norms)}"
    )
    return (
        f"{start}: gradient (all losses finite; terms {', '.join(sorted({n for n, _ in losses}))});"
        f" {where}; {end}"
    )


def _bad_gradients(net: nn.Module) -> list[str]:
    return [
        name
        for name, p in net.named_parameters()
        if p.grad is not None and not local(p.grad).isfinite().all()
    ]


def _first_module(
    method: Method, phase: Phase, *, batches: Sequence[LatentBatch], rngs: Sequence[StepRng]
) -> str | None:
    """Path of the first module whose output is not finite when the phase runs again."""
    found: list[str] = []
    with _watching(method, found):
        for batch, rng in zip(batches, rngs, strict=True):
            for thunk in method.terms(phase, batch, rng):
                thunk()
    return found[0] if found else None


@contextmanager
def _watching(method: Method, found: list[str]) -> Iterator[None]:
    def watch(role: str, name: str) -> Any:
        path = f"{role}.{name}" if name else role
        chosen = getattr(method.trainable[role], "chosen", None) if name else None

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            if chosen is not None and chosen.name != role:
                return  # another role computes on the base that both have
            for value in output if isinstance(output, tuple) else (output,):
                if (
                    isinstance(value, Tensor)
                    and value.is_floating_point()
                    and not torch.isfinite(value).all()
                ):
                    found.append(path)

        return look

    handles = [
        module.register_forward_hook(watch(role, name))
        for role, net in method.trainable.items()
        for name, module in net.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _everywhere(value: Any) -> list[Any]:
    """`value` of every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
