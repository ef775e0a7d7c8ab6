"""What every objective returns, the three reductions they use, and the one policy about samples
that are not finite.

Shapes: predictions and targets [B, C, T, H, W]. Every loss reduces each sample as its source does,
then takes the mean over the local batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.time import require_same_shape

Reduction = Callable[[torch.Tensor], torch.Tensor]
NonFinitePolicy = Literal["propagate", "zero_sample"]


@dataclass(frozen=True)
class LossTerm:
    """One objective of one micro-batch: `value` is the scalar to differentiate, `logs` named
    scalars without a graph.

    Raises `ValueError` if `value` or a log is not a scalar tensor, or if a log would keep a graph
    alive.
    """

    name: str
    value: torch.Tensor
    logs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.value.dim() != 0:
            raise ValueError(
                f"loss {self.name!r} has shape {tuple(self.value.shape)}, expected a scalar: reduce"
                " it first"
            )
        for key, log in self.logs.items():
            if log.dim() != 0 or log.requires_grad:
                raise ValueError(
                    f"log {key!r} of loss {self.name!r} must be a detached scalar, got"
                    f" {tuple(log.shape)}, grad={log.requires_grad}"
                )


def together(*terms: LossTerm) -> LossTerm:
    """Terms of one graph, which is back-propagated once: their sum, named after all of them. What
    they log stays, beside `loss/NAME` of each.
    """
    logs: dict[str, torch.Tensor] = {}
    for term in terms:
        logs |= {f"loss/{term.name}": term.value.detach(), **term.logs}
    value = torch.stack([term.value.double() for term in terms]).sum()
    return LossTerm("+".join(term.name for term in terms), value, logs)


def sample_sum(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B]: sum over everything but the batch, in at least float32."""
    return _wide(x).flatten(1).sum(1)


def sample_mean(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B]: mean over everything but the batch, in at least float32."""
    return _wide(x).flatten(1).mean(1)


def frame_sum(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [B]: sum over frames of the mean over channels and pixels, the reduction
    of the causal objectives (eq. 8, 10).
    """
    return _wide(x).mean(dim=(1, 3, 4)).sum(1)


def screen_samples(
    policy: NonFinitePolicy, *tensors: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Apply the policy about NaN and infinity to batch-first tensors; returns them and the number
    of affected samples (a tensor, no sync).

    "propagate" (the default of every loss) changes nothing: the loss becomes NaN and the train step
    stops before the update. "zero_sample" (the release's guard) replaces all of a sample by zeros
    in every tensor, so it adds no loss and passes no gradient on; the count must then be watched. A
    tangent or a target is left out by that; a network's output that is not finite because of what
    is inside it still makes the gradients of its weights so (0 times NaN), and the step stops.
    Raises `ConfigError` on another policy.
    """
    if policy not in ("propagate", "zero_sample"):
        raise ConfigError(
            f"nonfinite={policy!r} is unknown; choose nonfinite from propagate, zero_sample"
        )
    finite = torch.stack([x.detach().isfinite().flatten(1).all(1) for x in tensors]).all(0)
    if policy == "zero_sample":
        tensors = tuple(
            torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))
            for x in tensors
        )
    return tensors, (~finite).sum()


def require_videos(**tensors: torch.Tensor) -> None:
    """`ValueError` naming the arguments unless all are [B, C, T, H, W] of one shape: without B,
    channels would be taken for samples.
    """
    require_same_shape(**tensors)
    for name, x in tensors.items():
        if x.dim() != 5:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [B, C, T, H, W]")


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
