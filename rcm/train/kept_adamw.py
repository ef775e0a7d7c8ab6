"""AdamW whose moments are kept in another form, or in another memory, than it computes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from rcm.core.rng import generator
from rcm.parallel.fsdp import local
from rcm.parallel.host import passing, sharded_like, zeros_on_host
from rcm.train.moments import Form

BUCKET = 1 << 25
"""Trained numbers that are updated at once: what they need on the device beside them is at most
some hundred MiB.
"""

MOMENTS = ("exp_avg", "exp_avg_sq")


class KeptAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on this rank's shards, bucket by bucket: kept moments are opened,
    updated by torch's own kernel, and closed again.

    `forms`: of the first and the second moment. `host`: they live in host memory and pass through
    the device while it computes. With full forms the numbers are those of `ShardAdamW`, bit for
    bit. Random roundings are keyed by the update and the shard, so that replicas agree and a
    resumed run goes on as it would have.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        forms: tuple[Form, Form],
        host: bool,
        bucket: int = BUCKET,
        **options: Any,
    ) -> None:
        super().__init__(parameters, {**options, "fused": True})
        self.forms, self.host, self.bucket = forms, host, bucket

    def blank_state(self, p: Tensor) -> dict[str, Tensor]:
        """What is kept of `p` before its first update."""
        shard = local(p.detach())
        state = {"step": torch.zeros((), dtype=torch.float32, device=shard.device)}
        for name, form in zip(MOMENTS, self.forms, strict=True):
            for end, kept in form.blank(shard.to("meta") if self.host else shard).items():
                kept = zeros_on_host(kept, pinned=shard.is_cuda) if self.host else kept
                state[name + end] = sharded_like(kept, p)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply the gradients; no closure is called."""
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            for p in updated:
                if not self.state[p]:
                    self.state[p] = self.blank_state(p)
            if updated:
                self._update(group, buckets_of(updated, self.bucket))

    def _update(self, group: dict[str, Any], buckets: Sequence[Sequence[Tensor]]) -> None:
        states = [
            [{k: v for k, v in self.state[p].items() if k != "step"} for p in bucket]
            for bucket in buckets
        ]
        kept = [[local(v) for state in own for v in state.values()] for own in states]
        device = local(buckets[0][0]).device
        draws = generator(
            seed=0,
            step=group.get("update", 0),
            dp_rank=_place(buckets[0][0]),
            purpose="moments",
            device=device,
        )

        def visit(number: int, here: list[Tensor]) -> None:
            taken = iter(here)
            mine = [{name: next(taken) for name in state} for state in states[number]]
            self._update_bucket(group, buckets[number], mine, draws)

        if self.host:
            passing(kept, visit, device=device)
        else:
            for number, here in enumerate(kept):
                visit(number, here)

    def _update_bucket(
        self,
        group: dict[str, Any],
        bucket: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        draws: torch.Generator,
    ) -> None:
        shards = [local(p) for p in bucket]
        opened: list[list[Tensor]] = [
            [
                form.opened(_moment(state, name), shard)
                for state, shard in zip(states, shards, strict=True)
            ]
            for name, form in zip(MOMENTS, self.forms, strict=True)
        ]
        (beta1, beta2), (first, second) = group["betas"], opened
        adamw(
            shards,
            [local(p.grad) for p in bucket if p.grad is not None],
            first,
            second,
            [],
            [self.state[p]["step"] for p in bucket],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, form, values in zip(MOMENTS, self.forms, opened, strict=True):
            for state, value in zip(states, values, strict=True):
                form.close(_moment(state, name), value, draws)


def _moment(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one moment by the end of their name."""
    return {end: state[name + end] for end in ("", "_scale") if name + end in state}


def buckets_of(parameters: Sequence[Tensor], most: int = BUCKET) -> list[list[Tensor]]:
    """In order, at most `most` numbers each, or one tensor."""
    buckets: list[list[Tensor]] = []
    room = 0
    for p in parameters:
        size = local(p).numel()
        if not buckets or size > room:
            buckets.append([])
            room = most
        buckets[-1].append(p)
        room -= size
    return buckets


def _place(p: Tensor) -> int:
    """Number of this rank's shard: equal where a copy of the parameters lies on several ranks."""
    if not isinstance(p, DTensor):
        return 0
    coordinate, number = p.device_mesh.get_coordinate(), 0
    assert coordinate is not None  # this rank is of the mesh
    for axis, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            number = number * p.device_mesh.size(axis) + coordinate[axis]
    return number
