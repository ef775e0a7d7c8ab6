"""Precision policy: one record that names every dtype decision."""

from __future__ import annotations

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


# params, compute, reduce, time
_PRESETS = {
    "fp64": (torch.float64, torch.float64, torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16_fp32_time": (torch.float32, torch.bfloat16, torch.float32, torch.float32),
}
