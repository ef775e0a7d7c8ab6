"""The training method a config describes, and how its checkpoints are meant to be sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rcm.configs.build_gan import build_adversary
from rcm.configs.build_nets import NetBuilder
from rcm.configs.network import networks
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import ConfigError
from rcm.diffusion.directional import Directional, Discrete, Exact, RFStep, SemiContinuous, TrigStep
from rcm.diffusion.time_sampling import ConsistencyGrid
from rcm.losses.denoising import TimeWeight, gaussian_bell
from rcm.losses.term import NonFinitePolicy
from rcm.methods.base import Joint, Method
from rcm.methods.causal_diffusion import (
    BidirectionalDiffusion,
    DiffusionForcing,
    TeacherForcedDiffusion,
)
from rcm.methods.ode_pairs import ODEPairs
from rcm.methods.rcm import (
    BackwardSimulation,
    ContinuousConsistency,
    DiscreteConsistency,
    DistributionMatching,
)
from rcm.methods.schedule import Alternation
from rcm.methods.sf_dmd import SelfForcedDMD
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.methods.tf_dcm import TFDiscreteConsistency
from rcm.methods.tf_meanflow import TFMeanFlow
from rcm.methods.tf_scm import TFContinuousConsistency
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided, VelocityModel
from rcm.rollout.plan import StepSchedule
from rcm.rollout.recipe import SamplingRecipe

Negative = Callable[[], Condition]


def sampling_recipe(config: CommonModelConfig) -> SamplingRecipe | None:
    """How a checkpoint of this run is sampled; None for bidirectional networks."""
    if not isinstance(config, CausalConfig) or config.pattern is None:
        return None
    pattern = config.pattern.name
    if config.training_type in ("tf", "df"):
        return SamplingRecipe(
            kind="ode",
            pattern=pattern,
            sigma_max=config.sigma_max,
            shift=config.sample_timestep_shift,
            guidance=config.causal_guidance,
        )
    rollout = config.has.self_forced
    mids = config.step_schedule().mids if rollout else (tuple(config.backward_timesteps),)
    return SamplingRecipe(
        kind="flow_map" if config.training_type == "tf_meanflow" else "few_step",
        pattern=pattern,
        mids=mids,
        sigma_max=config.sigma_max,
        noisy_context=config.context_from_last_step,
        noisy_context_start_chunk=config.context_from_last_step_start_chunk,
        window=config.long_tuning.window_blocks or None,
        sinks=config.long_tuning.sink_blocks,
    )


def build_method(run: TrainConfig, nets: NetBuilder, *, negative: Negative) -> Method:
    """Networks and objective of `run`; `negative` gives the unconditional embedding."""
    family = _RCM if isinstance(run.model.config, RCMConfig) else _Causal
    return family(run, nets, negative).build()


class _Parts:
    """What both families share."""

    def __init__(self, run: TrainConfig, nets: NetBuilder, negative: Negative) -> None:
        self.config, self.nets, self._negative = run.model.config, nets, negative
        skips = run.trainer.nan_policy == "skip_sample"
        self.nonfinite: NonFinitePolicy = "zero_sample" if skips else "propagate"

    def guided(self, teacher: VelocityModel, scale: float) -> VelocityModel:
        return Guided(teacher, self._negative(), scale) if scale > 1 else teacher


class _Causal(_Parts):
    config: CausalConfig

    def build(self) -> Method:
        c = self.config
        student = self.nets.trained("net")
        simple: dict[str, Any] = {
            "law": c.p_G.build(),
            "weight": self._weight(),
            "loss_scale": c.loss_scale,
            "nonfinite": self.nonfinite,
        }
        if c.pattern is None:
            return BidirectionalDiffusion(student, **simple)
        long = c.long_tuning
        forcing = TeacherForcing(c.pattern, long.window_blocks or None, long.sink_blocks)
        match c.training_type:
            case "tf":
                noisy: dict[str, Any] = {
                    "context": c.context,
                    "context_schedule": StepSchedule((tuple(c.backward_timesteps),)),
                }
                return TeacherForcedDiffusion(student, forcing=forcing, **simple, **noisy)
            case "df":
                return DiffusionForcing(
                    student, pattern=forcing.pattern, strategy=c.df_timestep_strategy, **simple
                )
            case "tf_kd" | "df_kd":
                times = (0.0, *c.kd_timesteps)
                return ODEPairs(
                    student,
                    forcing=forcing,
                    times=times,
                    per_block=c.training_type == "df_kd",
                    loss_scale=c.loss_scale,
                    nonfinite=self.nonfinite,
                )
            case "sf_dmd":
                return self._self_forced(student, forcing)
            case "tf_scm_sf_dmd":
                return Joint(
                    c.training_type,
                    self._continuous(student, forcing, self._teacher()),
                    self._self_forced(student, forcing),
                )
            case "tf_dcm":
                return self._discrete(student, forcing, self._teacher())
            case "tf_scm":
                return self._continuous(student, forcing, self._teacher())
            case "tf_meanflow":
                return self._mean_flow(student, forcing, self._teacher())
            case "tf_dscm":
                teacher = self._teacher()
                return Joint(
                    c.training_type,
                    self._discrete(student, forcing, teacher),
                    self._continuous(student, forcing, teacher),
                )
        raise ConfigError(f"model.config.training_type={c.training_type!r} has no method")

    def _weight(self) -> TimeWeight | None:
        return gaussian_bell if self.config.loss_weighting == "gaussian_bell" else None

    def _teacher(self) -> VelocityModel:
        return self.guided(self.nets.frozen("net_causal_teacher"), self.config.causal_guidance)

    def _shared(self, forcing: TeacherForcing) -> dict[str, Any]:
        """Arguments of consistency methods; joint stages make context noisy at rollout times
        (Causal_rCM.md section 5).
        """
        c = self.config
        joint = c.training_type == "tf_scm_sf_dmd"
        schedule = c.step_schedule() if joint else StepSchedule((tuple(c.backward_timesteps),))
        return {
            "forcing": forcing,
            "loss_scale": c.loss_scale,
            "context": c.context,
            "context_schedule": schedule,
            "nonfinite": self.nonfinite,
        }

    def _discrete(
        self, student: Denoiser, forcing: TeacherForcing, teacher: VelocityModel
    ) -> Method:
        c = self.config
        grid = ConsistencyGrid(
            c.dcm_total_steps, c.dcm_skipping_interval_steps, c.sample_timestep_shift
        )
        return TFDiscreteConsistency(student, teacher, grid=grid, **self._shared(forcing))

    def _continuous(
        self, student: Denoiser, forcing: TeacherForcing, teacher: VelocityModel
    ) -> Method:
        c = self.config
        return TFContinuousConsistency(
            student,
            teacher,
            law=c.p_G.build(),
            tangent_warmup=c.tangent_warmup,
            **self._shared(forcing),
        )

    def _mean_flow(
        self, student: Denoiser, forcing: TeacherForcing, teacher: VelocityModel
    ) -> Method:
        c = self.config
        times: dict[str, Any] = {
            "law": c.p_G.build(),
            "equal_share": c.meanflow_equal_share,
            "tangent_warmup": c.tangent_warmup,
        }
        return TFMeanFlow(student, teacher, **times, **self._shared(forcing))

    def _self_forced(self, student: Denoiser, forcing: TeacherForcing) -> Method:
        c = self.config
        teacher = self.nets.frozen("net_bidirectional_teacher")
        fake_score = self.nets.trained("net_fake_score")
        return SelfForcedDMD(
            student,
            self.guided(teacher, c.bidirectional_guidance),
            fake_score,
            forcing=forcing,
            schedule=c.step_schedule(),
            law=c.p_D.build(),
            alternation=Alternation(c.student_update_freq),
            context=c.context,
            loss_scale=c.loss_scale_dmd,
            replayed=c.replayed_training,
            rollout_frames=c.long_tuning.frames or None,
            adversary=build_adversary(c, self.nets, fake_score, nonfinite=self.nonfinite),
            nonfinite=self.nonfinite,
        )


class _RCM(_Parts):
    config: RCMConfig

    def build(self) -> Method:
        c = self.config
        student = self.nets.trained("net")
        teacher = self.guided(self.nets.frozen("net_teacher"), c.teacher_guidance)
        consistency = self._consistency(student, teacher) if c.loss_scale > 0 else None
        if "net_fake_score" not in networks(c):
            assert consistency is not None  # checked: a run has a loss
            return consistency
        matching = self._matching(
            student, teacher, warmup=0 if consistency is None else c.tangent_warmup
        )
        return Joint("rcm", consistency, matching) if consistency is not None else matching

    def _consistency(self, student: Denoiser, teacher: VelocityModel) -> Method:
        c = self.config
        if c.cm_type == "dcm":
            grid = ConsistencyGrid(
                c.dcm_total_steps, c.dcm_skipping_interval_steps, c.dcm_timestep_shift
            )
            return DiscreteConsistency(
                student, teacher, grid=grid, loss_scale=c.loss_scale, nonfinite=self.nonfinite
            )
        return ContinuousConsistency(
            student,
            teacher,
            law=c.p_G.build(),
            directional=self._directional(),
            rf_native=c.use_rf_scm,
            variant=c.tangent_form,
            tangent_warmup=c.tangent_warmup,
            loss_scale=c.loss_scale,
            nonfinite=self.nonfinite,
        )

    def _directional(self) -> Directional:
        c = self.config
        geometry = RFStep() if c.use_rf_scm else TrigStep()
        if c.fd_type == 0:
            return Exact()
        return (SemiContinuous if c.fd_type == 1 else Discrete)(geometry, c.fd_size)

    def _matching(self, student: Denoiser, teacher: VelocityModel, *, warmup: int) -> Method:
        """DMD; during `warmup` iterations the consistency term has the student for itself."""
        c = self.config
        law = c.p_D.build()
        fixed = tuple(c.backward_timesteps) if c.dmd_fix_timesteps else None
        return DistributionMatching(
            student,
            teacher,
            self.nets.trained("net_fake_score"),
            law=law,
            simulation=BackwardSimulation(c.max_simulation_steps_fake, law, fixed),
            alternation=Alternation(c.student_update_freq, warmup=warmup),
            loss_scale=c.loss_scale_dmd,
            nonfinite=self.nonfinite,
        )
