"""A run of the toy method as the launcher would build it: networks, loader, checkpointer, sinks,
trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.parallel.fsdp import stored_tensors
from rcm.parallel.mesh import ParallelDims
from rcm.train.checkpoint import Checkpointer
from rcm.train.continuity import Settings
from rcm.train.describe import Description
from rcm.train.metrics import JsonLines
from rcm.train.observers import Observer
from rcm.train.state import TrainState
from rcm.train.step import StepConfig
from rcm.train.trainer import Trainer, TrainerConfig
from tests.support.toy_method import CONFIG, make_loader, make_run

DESCRIPTION = Description(stage="toy", network=asdict(CONFIG), network_name="toy", pattern=None, sigma_max=80.0, data_hash="fake")


def launch(
    job: Path,
    *,
    max_iter: int,
    dims: ParallelDims | None = None,
    save_iter: int = 1000,
    resume: bool = True,
    observers: Sequence[Observer] = (),
    prefetch: int = 0,
    asynchronous: bool = False,
    keep_last: int = 0,
    fault: Callable[[int, Tensor], Tensor] | None = None,
    precision: str = "fp64",
    settings: Settings = Settings(),
    step: StepConfig = StepConfig(),
    **config: Any,
) -> Trainer:
    """A trainer in `job`, resumed from its latest checkpoint where there is one."""
    dims = dims or ParallelDims()
    method, state = make_run(dims=dims, precision=precision, fault=fault)
    loader = make_loader(dims=dims, prefetch=prefetch)
    checkpointer = Checkpointer(job, dims=dims, description=DESCRIPTION, settings=settings, asynchronous=asynchronous, keep_last=keep_last)
    if resume:
        checkpointer.load(state, loader=loader)
    sinks = [JsonLines(job / "metrics.jsonl", resumed_at=state.iteration)] if dims.rank == 0 else []
    loop = TrainerConfig(max_iter=max_iter, logging_iter=1, **config)
    return Trainer(
        method,
        loader,
        state=state,
        dims=dims,
        config=loop,
        step=step,
        save_iter=save_iter,
        checkpointer=checkpointer,
        sinks=sinks,
        observers=observers,
    )


def lines(job: Path) -> list[dict[str, float]]:
    """What was logged, without the clock."""
    records = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def everything(state: TrainState) -> dict[str, Tensor]:
    """Full copies of all weights, averages and optimiser slots, in host memory: some wait there."""
    found: dict[str, Tensor] = {}
    for role, slot in state.roles.items():
        found |= {f"{role}.{k}": v for k, v in stored_tensors(slot.net).items()}
        for name, p in slot.net.named_parameters():
            found |= {f"{role}.{k}.{name}": v for k, v in slot.optimizer.state.get(p, {}).items()}
    if state.ema is not None:
        found |= {f"ema.{k}": v for k, v in state.ema.shadow.items()}
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in found.items()}
    return {k: v.detach().to("cpu", copy=True) for k, v in whole.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)
