"""The keys of `model.config` of bidirectional rCM, and rules between them.

Times are TrigFlow angles in (0, pi/2) (docs/reference/training.md#bidirectional-keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rcm.configs.schema_common import CommonModelConfig, M, NetConfig, require_times
from rcm.core.errors import ConfigError
from rcm.core.records import within
from rcm.diffusion.time_sampling import TimeLawConfig


@dataclass(frozen=True)
class RCMConfig(CommonModelConfig):
    """`model=fsdp_t2v_distill_rcm`: docs/reference/training.md#bidirectional-keys."""

    net_teacher: NetConfig | None = None  # the diffusion teacher
    # its weights; the student starts from them too unless student_ckpt is set
    teacher_ckpt: str = ""
    # classifier-free guidance of the teacher; <= 1 skips the unconditional pass
    teacher_guidance: float = within(5.0, least=0, most=1000)
    p_D: TimeLawConfig = field(default_factory=lambda: TimeLawConfig(law="lognormal", p_mean=0.0))
    sigma_data: float = 1.0  # this alone: the TrigFlow wrapper is written for it
    sigma_max: float = within(80.0, above=0, most=1e9)  # first noise level when sampling
    cm_type: Literal["scm", "dcm"] = "scm"  # continuous or discrete consistency
    use_rf_scm: bool = False  # sCM in rectified-flow form instead of TrigFlow
    # warm-up of the TrigFlow tangent: release leaves its JVP term unscaled
    tangent_form: Literal["paper", "release"] = "paper"
    fd_type: Literal[0, 1, 2] = 0  # 0 exact JVP, 1 semi-continuous, 2 discrete difference
    fd_size: float = 1e-4  # step of the difference, radians
    # TrigFlow angles after pi/2, when dmd_fix_timesteps
    backward_timesteps: tuple[float, ...] = (1.5, 1.4, 1.0)
    dmd_fix_timesteps: bool = False  # rollout times from backward_timesteps instead of p_D
    dcm_timestep_shift: float = within(5.0, least=1e-3, most=1e3)  # shift of the discrete grid

    @property
    def stage(self) -> str:
        return "rCM"

    @property
    def guided(self) -> bool:
        return self.teacher_guidance > 1

    def checkpoints(self) -> dict[str, str]:
        return {"teacher_ckpt": "the teacher's weights (the student starts from them)"}

    def check(self) -> None:
        """`ConfigError` for terms without a network or weight, and for other options."""
        if self.net_teacher is None:
            raise ConfigError(
                f"{M}.net_teacher is null, but rCM distils a teacher; choose one with"
                " net_teacher=NAME"
            )
        self._check_terms()
        self._check_objective()
        super().check()

    def _check_terms(self) -> None:
        critic = self.net_fake_score is not None
        if self.loss_scale == 0 and (not critic or self.loss_scale_dmd == 0):
            off = f"{M}.loss_scale_dmd=0" if critic else f"{M}.net_fake_score=null"
            raise ConfigError(
                f"nothing to train: {M}.loss_scale=0 turns consistency off and {off} turns DMD off"
            )
        if critic and self.student_update_freq < 2:
            raise ConfigError(
                f"{M}.student_update_freq=1 never trains the fake score; use at least 2, or"
                f" {M}.net_fake_score=null"
            )
        require_times(f"{M}.backward_timesteps", self.backward_timesteps, first=math.pi / 2)
        steps, given = self.max_simulation_steps_fake, len(self.backward_timesteps)
        if self.dmd_fix_timesteps and steps > given + 1:
            raise ConfigError(
                f"{M}.max_simulation_steps_fake={steps} needs {steps - 1} entries in"
                f" {M}.backward_timesteps, got {given}"
            )

    def _check_objective(self) -> None:
        if not 0 < self.fd_size < 0.1:
            raise ConfigError(f"{M}.fd_size={self.fd_size} must be in (0, 0.1)")
        if self.cm_type == "dcm" and (self.use_rf_scm or self.fd_type):
            raise ConfigError(
                f"{M}.use_rf_scm and {M}.fd_type belong to cm_type=scm, but {M}.cm_type=dcm"
            )
        if self.tangent_form != "paper" and (self.cm_type == "dcm" or self.use_rf_scm):
            raise ConfigError(
                f"{M}.tangent_form={self.tangent_form} is a TrigFlow tangent's; it needs"
                " cm_type=scm and use_rf_scm=False"
            )
        told = f"{M}.fd_type={self.fd_type} steps time by fd_size={self.fd_size}, which"
        if self.fd_type and self.time_precision == "bfloat16":
            raise ConfigError(
                f"{told} {M}.time_precision=bfloat16 cannot resolve; set {M}.time_precision=float32"
            )
        least = 1e-6 if self.time_precision == "float32" else 1e-12
        if self.fd_type and self.fd_size < least:
            raise ConfigError(
                f"{told} {M}.time_precision={self.time_precision} cannot resolve; set"
                f" {M}.fd_size={least:g} or more"
            )
