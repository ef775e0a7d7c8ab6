"""Time grids for sampling. Every time in and out is rectified-flow (RF) time: 1 is noise, 0 is
data; float64 Python numbers.

A grid is a tuple of decreasing times that ends at exactly 0.0: N network evaluations walk over N +
1 times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

from rcm.core.errors import ConfigError
from rcm.diffusion.time import check_shift

TRIG_MID_TIMES = (1.5, 1.4, 1.0)
"""TrigFlow midpoints (radians) of the bidirectional few-step sampler; spec of rCM's released
scripts.
"""

CAUSAL_MID_TIMES = (15 / 16, 5 / 6, 5 / 8)
"""RF midpoints of the causal 4-step sampler: shift 5 applied to 3/4, 1/2, 1/4."""


def initial_time(sigma_max: float) -> float:
    """RF time of noise level `sigma_max`: t = sigma / (sigma + 1). `ConfigError` unless sigma_max >
    0 and finite.
    """
    if not 0 < sigma_max < math.inf:
        raise ConfigError(
            f"sigma_max={sigma_max} must be positive and finite; set sigma_max (80 for"
            " bidirectional rCM, 1600 for causal sampling)"
        )
    return sigma_max / (sigma_max + 1)


def shifted_grid(num_steps: int, *, shift: float, sigma_max: float) -> tuple[float, ...]:
    """Grid of the many-step samplers: uniform in unshifted time from `sigma_max` to 0, then
    shifted.

    t_k = s u_k / (1 + (s - 1) u_k) with u_k linear from u(t_0) to 0, t_0 = sigma_max / (sigma_max +
    1). Shift <= 0 or 1 is the identity.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps={num_steps} must be at least 1")
    check_shift(shift, knob="timestep shift")
    s = shift if shift > 0 else 1.0
    start = initial_time(sigma_max)
    u0 = start / (s - (s - 1) * start)
    us = [u0 * (num_steps - k) / num_steps for k in range(num_steps + 1)]
    return tuple(s * u / (1 + (s - 1) * u) for u in us)


def few_step_grid(mid_times: Sequence[float], *, first: float) -> tuple[float, ...]:
    """(first, *mid_times, 0): the grid of a consistency sampler. Checks that times decrease
    strictly inside (0, first).
    """
    grid = (float(first), *(float(t) for t in mid_times), 0.0)
    if not 0 < first <= 1:
        raise ConfigError(f"first time {first} of a few-step grid must be in (0, 1]")
    if not all(a > b for a, b in pairwise(grid)):
        late = first <= grid[1] < 1 and f"raise sigma_max above {grid[1] / (1 - grid[1]):.4g}, or "
        raise ConfigError(
            f"few-step times must decrease strictly from {first:g} to 0, got"
            f" {[f'{t:g}' for t in grid]}; {late or ''}change mid_t / mid_t_schedules (training:"
            " model.config.backward_timesteps or sf_backward_timestep_schedules)"
        )
    return grid


def trig_grid(
    num_steps: int, *, sigma_max: float, mid_times: Sequence[float] = TRIG_MID_TIMES
) -> tuple[float, ...]:
    """RF grid of bidirectional rCM sampling: TrigFlow times (arctan sigma_max, first num_steps - 1
    of `mid_times`, 0) mapped by sin/(sin + cos). `ConfigError` for more steps than mid times, or a
    sigma_max at or below the first of them.
    """
    if not 1 <= num_steps <= len(mid_times) + 1:
        raise ConfigError(
            f"num_steps={num_steps} is not in 1..{len(mid_times) + 1}: only {len(mid_times)} mid"
            " times are given"
        )
    taus = (math.atan(sigma_max), *mid_times[: num_steps - 1])
    if not all(a > b for a, b in zip(taus, (*taus[1:], 0.0), strict=True)):
        least = math.tan(taus[1]) if num_steps > 1 else 0.0
        raise ConfigError(
            f"sigma_max={sigma_max:g} must be above {least:.4g}, the noise level of the second"
            " step; raise sigma_max"
        )
    return (*(math.sin(a) / (math.sin(a) + math.cos(a)) for a in taus), 0.0)


def parse_times(text: str | Iterable[str | float]) -> tuple[float, ...]:
    """Times from a command line: fractions ("15/16"), decimals, separated by commas or spaces, or a
    list of such words.
    """
    words = (
        re.split(r"[,\s]+", text)
        if isinstance(text, str)
        else [w for part in text for w in re.split(r"[,\s]+", str(part))]
    )
    try:
        times = tuple(float(Fraction(w) if "/" in w else w) for w in words if w)
        if not all(map(math.isfinite, times)):
            raise ValueError("no finite number")
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            f"cannot read times from {text!r}: write numbers or fractions such as '15/16 5/6 5/8'"
        ) from error
    return times


def parse_schedules(text: str) -> tuple[tuple[float, ...], ...]:
    """Per-chunk mid times: entries separated by ';', an empty entry means a single step
    ("15/16,5/6,5/8;" is 4 steps, then 1).
    """
    return tuple(parse_times(entry) for entry in text.split(";")) if text.strip() else ()
