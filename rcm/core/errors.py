"""The package's own exceptions, two checks whose messages carry both numbers and the knob to turn,
and how another's error is quoted.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is impossible, unset or contradicts another; raised before any work is done."""


class TangentLost(RuntimeError):
    """A forward-mode tangent disappeared inside a network; the message names the module."""


class NonFinite(RuntimeError):
    """A loss, a gradient, latents or pixels are NaN or infinite; raised before the update that
    would have used them, or in place of the chunk that they are.
    """


class PeerGone(RuntimeError):
    """Another rank of this launch ended or cannot be reached; its own output says why."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, truncated, or does not fit what it is loaded into."""


def require_equal(name: str, *, got: object, expected: object, knob: str) -> None:
    """Raise `ConfigError` unless `got == expected`; `knob` is the configuration key (or argument)
    the reader should change.
    """
    if got != expected:
        raise ConfigError(f"{name} is {got!r}, expected {expected!r}; change {knob}")


def require_divisible(name: str, *, value: int, by: int, by_name: str, knob: str) -> None:
    """Raise `ConfigError` unless `by` >= 1 divides `value` >= 0; the message lists the divisors of
    `value` that `knob` may take.
    """
    if by < 1:
        raise ConfigError(
            f"{by_name}={by} must be at least 1 to divide {name}={value}; change {knob}"
        )
    if value < 0:
        raise ConfigError(f"{name}={value} must not be negative; change {knob}")
    if value % by:
        choices = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
        raise ConfigError(
            f"{by_name}={by} does not divide {name}={value}; choose {knob} from {choices}"
        )


def first_line(error: BaseException) -> str:
    """The kind of a library's error and the first line of its message, at most 200 characters of
    it.
    """
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
