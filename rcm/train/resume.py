"""Which parts of a checkpoint a run takes: all of them, or those that the checkpoint keys of a run
leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcm.core.errors import ConfigError

PARTS = (
    "model",
    "optim_net",
    "optim_fake_score",
    "scheduler_net",
    "scheduler_fake_score",
    "trainer",
)
"""What can be taken or left: weights and averages; per role, moments and the update count that
drives its schedule; iteration, settings and data position.
"""

_BOTH_ROLES = {
    "optim": ("optim_net", "optim_fake_score"),
    "scheduler": ("scheduler_net", "scheduler_fake_score"),
}


@dataclass(frozen=True)
class Taken:
    """`parts`: those of PARTS that are read; the rest stays as it was built. `averaged`: the
    student starts from the averaged weights.
    """

    parts: frozenset[str] = frozenset(PARTS)
    averaged: bool = False

    @property
    def left(self) -> list[str]:
        """Parts that are not read."""
        return [part for part in PARTS if part not in self.parts]

    @classmethod
    def all_but(cls, keys: Sequence[str]) -> Taken:
        """Everything but `keys` (checkpoint.keys_not_to_resume): parts, or "optim" and "scheduler"
        of both roles. ConfigError for an unknown key, and where nothing is left to resume.
        """
        left = []
        for key in keys:
            if key not in PARTS and key not in _BOTH_ROLES:
                known = (
                    "model, optim (optim_net, optim_fake_score), scheduler (scheduler_net,"
                    " scheduler_fake_score), trainer"
                )
                raise ConfigError(
                    f"keys_not_to_resume has {key!r}, which is no part of a checkpoint;"
                    f" its parts are {known}"
                )
            left.extend(_BOTH_ROLES.get(key, (key,)))
        parts = frozenset(PARTS) - frozenset(left)
        if not parts:
            raise ConfigError(
                "keys_not_to_resume leaves nothing to resume; to start afresh choose"
                " another job.name"
            )
        return cls(parts)

    def weights_alone(self, *, scheduler: bool = False, averaged: bool = False) -> Taken:
        """Of these, the weights (checkpoint.load_training_state=False), with `scheduler` the update
        counts too.
        """
        wanted = {"model", *(_BOTH_ROLES["scheduler"] if scheduler else ())}
        return Taken(self.parts & wanted, averaged)
