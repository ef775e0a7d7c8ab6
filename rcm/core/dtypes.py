"""Precision policy: one record that names every dtype decision, and nothing beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch

from rcm.core.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Floating-point formats of a run.

    `params`: master weights and optimiser state. `compute`: network inputs, activations and
    matmuls. `reduce`: gradient reduction across ranks. `time`: the timestep (1000 t) at the
    network's door; Wan's public weights were trained with it rounded to bfloat16, which quantises
    timesteps to multiples of 4 near 1000. Time arithmetic before that cast is float64 always.
    Raises `ConfigError` on a non-floating dtype.
    """

    params: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype
    time: torch.dtype

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, torch.dtype) or not value.is_floating_point:
                raise ConfigError(
                    f"precision.{field.name} is {value!r}, expected a floating-point torch.dtype"
                )

    @classmethod
    def preset(cls, name: str) -> Precision:
        """One of "fp64" (tests), "fp32", "bf16" (as the Wan checkpoints were trained),
        "bf16_fp32_time"; else `ConfigError`.
        """
        if name not in _PRESETS:
            raise ConfigError(
                f"precision preset {name!r} is unknown; choose precision from"
                f" {', '.join(sorted(_PRESETS))}"
            )
        return cls(*_PRESETS[name])


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Within, operators on `device` compute in the dtypes that they are given: an autocast of the
    caller would compute times and norms, too, in its own.
    """
    known = torch.amp.is_autocast_available(device.type)
    if known and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# params, compute, reduce, time
_PRESETS = {
    "fp64": (torch.float64, torch.float64, torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16_fp32_time": (torch.float32, torch.bfloat16, torch.float32, torch.float32),
}
