"""The checkpoint keys of a run, and which parts of a checkpoint it takes by them: all of them, or
those that the keys leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within

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
        left: list[str] = []
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


@dataclass(frozen=True)
class CheckpointConfig(Record):
    """Saving and resuming."""

    save_iter: int = within(500, least=1, most=10**12)  # iterations between checkpoints
    keep_last: int = within(0, least=0, most=10**12)  # number of checkpoints kept; 0 = all
    # checkpoint, or job, to continue from where this run's folder has none yet ("" = start at 0);
    # its own newest wins
    load_path: str = ""
    # also optimisers, step, data position of load_path (False: weights only, the run starts at 0)
    load_training_state: bool = True
    # with load_training_state=False: also the update counts, where the rates' schedules stand
    only_load_scheduler_state: bool = False
    load_ema_to_reg: bool = False  # the student starts from the averaged weights of load_path
    # parts left as built: model, optim[_net|_fake_score], scheduler[_net|_fake_score], trainer
    keys_not_to_resume: tuple[str, ...] = ()
    strict_resume: bool = True  # this alone: missing or foreign keys stop the run
    # resume although as many samples have other contents (mended ones)
    accept_changed_data: bool = False
    dcp_async_mode_enabled: bool = False  # write in the background

    def __post_init__(self) -> None:
        super().__post_init__()
        Taken.all_but(self.keys_not_to_resume)
        started = {
            "load_training_state": False,
            "load_ema_to_reg": True,
            "only_load_scheduler_state": True,
        }
        for key, value in started.items():
            if getattr(self, key) == value and not self.load_path:
                raise ConfigError(
                    f"{key}={value} has no effect without checkpoint.load_path, the checkpoint to"
                    " start from; set it"
                )
        if self.only_load_scheduler_state and self.load_training_state:
            raise ConfigError(
                "only_load_scheduler_state=True has no effect while"
                " checkpoint.load_training_state=True takes the schedules and all else; set"
                " checkpoint.load_training_state=False"
            )
        if self.load_ema_to_reg and "model" in self.keys_not_to_resume:
            raise ConfigError(
                "load_ema_to_reg=True starts from weights that checkpoint.keys_not_to_resume leaves"
                " out; choose one"
            )
        if (
            not (self.load_training_state or self.only_load_scheduler_state)
            and "model" in self.keys_not_to_resume
        ):
            raise ConfigError(
                "load_training_state=False takes weights alone, which checkpoint.keys_not_to_resume"
                " leaves out; choose one"
            )

    def taken_from_load_path(self) -> Taken:
        """Parts that are read of `load_path`; of the run's own checkpoints all but
        `keys_not_to_resume` are.
        """
        taken = Taken.all_but(self.keys_not_to_resume)
        if self.load_training_state:
            return replace(taken, averaged=self.load_ema_to_reg)
        return taken.weights_alone(
            scheduler=self.only_load_scheduler_state, averaged=self.load_ema_to_reg
        )
