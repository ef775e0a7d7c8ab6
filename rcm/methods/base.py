"""What a training method is: roles it trains, whose turn it is at an iteration, and the loss terms
of that turn.

Roles: "student", "fake_score" and "gan_head" are trained; "causal_teacher" and
"bidirectional_teacher" are frozen arguments of a method's constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.losses.term import LossTerm
from rcm.nets.denoiser import Denoiser

Thunk = Callable[[], LossTerm]


@dataclass(frozen=True)
class Phase:
    """Whose turn it is: the trained role, its effective update index (own counter of that role's
    updates), the trainer iteration, roles that are updated `beside` it by the same terms, and
    whether the student makes a video in a `rollout`, many passes through the same weights.

    Step-count cycles and EMA follow `index`; the tangent warm-up follows `iteration` (Causal_rCM.md
    sections 5, 6).
    """

    role: str
    index: int
    iteration: int
    beside: tuple[str, ...] = ()
    rollout: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role that is updated."""
        return (self.role, *self.beside)


class Method(Protocol):
    """A training objective. `terms` yields thunks, evaluated and back-propagated one by one.

    The trainer may ask for one thunk ahead, to know which is the last: work that needs memory, or
    must come after the previous term, belongs inside the thunk.
    """

    name: str

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """Networks by role, "student" always among them."""
        ...

    def phase(self, iteration: int) -> Phase:
        """The phase of trainer iteration `iteration` (0-based, counting updates of either role)."""
        ...

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """Loss terms of this phase, in order. Randomness comes from `rng` only."""
        ...


def student_only(iteration: int) -> Phase:
    """Phase of methods that train nothing but the student."""
    return Phase("student", iteration, iteration)


class StudentOnly:
    """The half of a `Method` that says what it trains: nothing but `student`."""

    student: Denoiser

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The student."""
        return {"student": self.student.net}

    def phase(self, iteration: int) -> Phase:
        """Always the student's turn."""
        return student_only(iteration)


class Joint:
    """Two methods as one: the terms of `first`, then those of `second`, in student phases; other
    phases belong to `second` alone.

    Both must train the same student. Used for tf_dscm (dCM then sCM) and tf_scm_sf_dmd (sCM then
    SF-DMD).
    """

    def __init__(self, name: str, first: Method, second: Method) -> None:
        if first.trainable["student"] is not second.trainable["student"]:
            raise ConfigError(
                f"joint method {name} needs one student shared by both parts, got two different"
                " networks"
            )
        if set(first.trainable) != {"student"}:
            raise ConfigError(
                f"the first part of joint method {name} may train the student only, it trains"
                f" {sorted(first.trainable)}"
            )
        self.name, self.first, self.second = name, first, second

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The roles of the second part (which include the student)."""
        return self.second.trainable

    def phase(self, iteration: int) -> Phase:
        """The second part decides whose turn it is."""
        return self.second.phase(iteration)

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """Terms of both parts in student phases."""
        if phase.role == "student":
            yield from self.first.terms(phase, batch, rng)
        yield from self.second.terms(phase, batch, rng)
