"""Whose turn it is when a fake score is trained beside the student (Causal_rCM.md sections 6,
8).
"""

from __future__ import annotations

from dataclasses import dataclass

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.methods.base import Phase


@dataclass(frozen=True)
class Alternation:
    """Exclusive phases: the student alone for `warmup` iterations, then 1 student update and
    `student_update_freq` - 1 fake-score updates, repeated.

    Effective indices count each role's own updates: student i_s = i before the warm-up ends, else
    warmup + floor((i - warmup) / freq); fake score i_f = i - i_s - 1.
    """

    student_update_freq: int
    warmup: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.student_update_freq < 1:
            raise ConfigError(
                f"model.config.student_update_freq={self.student_update_freq} must be >= 1 (1"
                " trains no fake score)"
            )
        if self.warmup < 0:
            raise ConfigError(f"model.config.tangent_warmup={self.warmup} must be >= 0")

    def phase(self, iteration: int) -> Phase:
        """Phase of trainer iteration `iteration` >= 0."""
        if iteration < self.warmup:
            return Phase("student", iteration, iteration)
        cycle, position = divmod(iteration - self.warmup, self.student_update_freq)
        student_index = self.warmup + cycle
        if position == 0:
            return Phase("student", student_index, iteration)
        return Phase("fake_score", iteration - student_index - 1, iteration)
