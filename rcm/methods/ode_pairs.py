"""Baseline initialisations by regression on stored teacher trajectories: TF-KD (causal teacher's,
clean context) and DF-KD (bidirectional's).

Batches carry `trajectory` [B, K, C, T, H, W], index 0 the ODE's clean end, index k at RF time
`times[k]` (docs/reference/training.md#ode-pairs; recipes of Self-Forcing and Causal-Forcing), and
in `latents` the data that a causal teacher had as context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_x0
from rcm.losses.denoising import ode_pair_loss, pick_states
from rcm.losses.term import LossTerm, NonFinitePolicy
from rcm.methods.base import Phase, StudentOnly, Thunk
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout


class ODEPairs(StudentOnly):
    """`tf_kd` or `df_kd`: predict the trajectory's clean end from one of its states.

    `times[k]` is the RF time of stored state k; times[0] must be 0. TF-KD draws one state per video
    and gives the data as clean context, as its teacher had it; DF-KD draws one state per block
    under the block-causal mask.
    """

    def __init__(
        self,
        student: Denoiser,
        *,
        forcing: TeacherForcing,
        times: Sequence[float],
        per_block: bool,
        loss_scale: float = 1.0,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        if len(times) < 2 or times[0] != 0.0 or any(not 0 < t <= 1 for t in times[1:]):
            raise ConfigError(
                f"trajectory times {list(times)} must start with 0 (the clean end) and then lie in"
                " (0, 1]"
            )
        self.student, self.forcing, self.times = student, forcing, tuple(times)
        self.per_block, self.loss_scale, self.nonfinite = per_block, loss_scale, nonfinite
        self.name = "df_kd" if per_block else "tf_kd"

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One regression term; `ConfigError` if the batch has no matching trajectory."""
        trajectory = batch.trajectory
        if trajectory is None or trajectory.shape[1] != len(self.times):
            got = "none" if trajectory is None else f"{trajectory.shape[1]} states"
            raise ConfigError(
                f"{self.name} needs trajectories of {len(self.times)} states, the clean end and"
                f" model.config.kd_timesteps={[round(t, 6) for t in self.times[1:]]}, got {got} in"
                " the data; set kd_timesteps to the --times that scripts.build_ode_pairs was"
                " given, or change dataloader_train.tar_path_pattern"
            )
        yield lambda: self._term(batch, trajectory, rng)

    def _term(self, batch: LatentBatch, trajectory: torch.Tensor, rng: StepRng) -> LossTerm:
        cond = batch.condition()
        num_frames, device = trajectory.shape[3], trajectory.device
        blocks = torch.tensor(self.forcing.pattern.block_of_frame(num_frames))
        draws = (trajectory.shape[0], int(blocks.max()) + 1 if self.per_block else 1)
        # State 0 is the clean end itself; per-block draws include it so that a block may see clean
        # neighbours, as in Self-Forcing.
        index = torch.randint(
            0 if self.per_block else 1, len(self.times), draws, generator=rng.generator("state")
        )
        index = index[:, blocks] if self.per_block else index
        t = torch.tensor(self.times, dtype=torch.float64)[index].to(device)
        x_t, x0 = pick_states(trajectory, index.to(device)), trajectory[:, 0]
        x0_student = rf_x0(x_t, self._velocity(x_t, t, cond, context=batch.latents), t)
        how: dict[str, Any] = {"loss_scale": self.loss_scale, "nonfinite": self.nonfinite}
        return ode_pair_loss(x0_student, x0, t, **how, name=self.name)

    def _velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition, *, context: torch.Tensor
    ) -> torch.Tensor:
        if not self.per_block:
            return self.forcing.velocity(
                self.student, x_t, t, cond, context=self.forcing.clean(context)
            )
        grid = self.student.token_grid(x_t.shape[3], x_t.shape[4])
        layout = TokenLayout.block_causal(
            x_t.shape[2],
            grid=grid,
            pattern=self.forcing.pattern,
            window=self.forcing.window,
            sinks=self.forcing.sinks,
        )
        return self.student.velocity(x_t, t, cond, layout)
