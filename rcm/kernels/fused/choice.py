"""When the fused layers run: one named setting, one rule, no silent substitute."""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.core.dual import in_dual_level
from rcm.core.errors import ConfigError
from rcm.kernels.launching import FLOATS, runs_on

SETTINGS = ("auto", "on", "off")
MAX_WIDTH = 8192
"""A row is held in registers; the widest Wan network has 5120 channels."""
LAUNCH_BOUND = 1 << 22
"""Elements below which "auto" takes the plain formulas in passes without gradient and tangent. A
launch by Triton costs the host 13 to 25 us, one of torch's 5 to 8: a forward of one frame (1560 x
1536), which waits for its launches, takes 27 ms instead of 23 (docs/performance_log.md). Under CUDA
graphs launches cost nothing: set "on" before capturing one.
"""


def check_setting(name: str) -> str:
    """`name`, if it is one of `SETTINGS`; else `ConfigError`."""
    if name not in SETTINGS:
        raise ConfigError(
            f"unknown setting of the fused layers {name!r}; set model.config.fused_layers to one of"
            f" {', '.join(SETTINGS)}"
        )
    return name


def obstacle(x: Tensor, *, width: int) -> str | None:
    """Why the fused layers cannot take `x` with rows of `width` channels, or None if they can."""
    if torch.compiler.is_compiling():
        return "inside compiled code the compiler fuses the plain formulas"
    if not runs_on(x):
        return f"they need a CUDA device, the input is on {x.device}"
    if x.dtype not in FLOATS:
        return f"they compute in float32, the input is {x.dtype}"
    if width > MAX_WIDTH:
        return f"rows of {width} channels are wider than {MAX_WIDTH}"
    return None


def use_fused(setting: str, x: Tensor, *, width: int) -> bool:
    """Whether a layer with `setting` runs its fused kernels on `x`.

    "off": never. "auto": on CUDA in bf16, fp16 or fp32, up to MAX_WIDTH channels, outside
    torch.compile, and not for the small inputs of LAUNCH_BOUND; the plain formulas elsewhere. "on":
    always; `ConfigError` saying why where they cannot. Both compute the same function; results
    differ by rounding.
    """
    if setting == "off" or (setting == "auto" and (not x.is_cuda or _waits_for_launches(x))):
        return False
    reason = obstacle(x, width=width)
    if reason is not None and setting == "on":
        raise ConfigError(
            f"fused_layers=on, but the fused layers cannot run: {reason}; use fused_layers=auto"
            " or off"
        )
    return reason is None


def _waits_for_launches(x: Tensor) -> bool:
    return x.numel() < LAUNCH_BOUND and not torch.is_grad_enabled() and not in_dual_level()
