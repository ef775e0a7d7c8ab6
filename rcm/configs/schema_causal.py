"""The keys of `model.config` of causal training, its stages, and rules between the keys.

Times are rectified-flow (RF) times in (0, 1), 1 = noise (docs/reference/training.md#causal-keys).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from rcm.configs.schema_common import CommonModelConfig, M, NetConfig, require_times
from rcm.configs.schema_gan import GanConfig
from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.diffusion.blocks import BlockPattern
from rcm.rollout.plan import ContextRule, StepSchedule

TrainingType = Literal[
    "bidirectional",
    "tf",
    "df",
    "tf_kd",
    "df_kd",
    "tf_dcm",
    "tf_scm",
    "tf_dscm",
    "tf_meanflow",
    "sf_dmd",
    "tf_scm_sf_dmd",
]


@dataclass(frozen=True)
class Stage:
    """What a training type has beside its student.

    consistency   it distils a causal teacher.
    self_forced   it rolls out, and is scored by a bidirectional teacher and a trained fake score.
    context       clean frames that may be made noisy.
    trajectories  samples with states of a teacher's trajectory.
    """

    consistency: bool = False
    self_forced: bool = False
    context: bool = True
    trajectories: bool = False


_DISTILLED = Stage(consistency=True)
STAGES: dict[str, Stage] = {
    "bidirectional": Stage(context=False),
    "tf": Stage(),
    "df": Stage(context=False),
    "tf_kd": Stage(context=False, trajectories=True),
    "df_kd": Stage(context=False, trajectories=True),
    "tf_dcm": _DISTILLED,
    "tf_scm": _DISTILLED,
    "tf_dscm": _DISTILLED,
    "tf_meanflow": _DISTILLED,
    "sf_dmd": Stage(self_forced=True),
    "tf_scm_sf_dmd": Stage(consistency=True, self_forced=True),
}
"""By training type."""


@dataclass(frozen=True)
class LongTuningConfig(Record):
    """Self-forced rollouts longer than what is judged (Causal_rCM.md section 6)."""

    # longest rollout in latent frames, of which state_t are judged; 0 = off
    frames: int = within(0, least=0, most=2**16)
    # blocks that a chunk sees, its own included, beside the sinks
    window_blocks: int = within(0, least=0, most=2**16)
    sink_blocks: int = within(0, least=0, most=2**16)  # first blocks, which stay visible

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("window_blocks", "sink_blocks"):
            if getattr(self, key) and not self.frames:
                raise ConfigError(
                    f"{key}={getattr(self, key)} has no effect while {M}.long_tuning.frames=0 turns"
                    " long tuning off"
                )


@dataclass(frozen=True)
class CausalConfig(CommonModelConfig):
    """`model=fsdp_t2v_causal`: causal training (docs/reference/training.md#causal-keys)."""

    training_type: TrainingType = "tf"  # the stage
    net_causal_teacher: NetConfig | None = None  # stages tf_dcm, tf_scm, tf_dscm
    net_bidirectional_teacher: NetConfig | None = None  # stage sf_dmd
    causal_teacher_ckpt: str = ""  # weights of net_causal_teacher
    # weights of net_bidirectional_teacher (and of the fake score, unless fake_score_ckpt)
    bidirectional_teacher_ckpt: str = ""
    # guidance of the causal, and of the bidirectional teacher; <= 1 skips the unconditional pass
    causal_guidance: float = within(3.0, least=0, most=1000)
    bidirectional_guidance: float = within(5.0, least=0, most=1000)
    sigma_max: float = within(1600.0, above=0, most=1e9)  # first noise level when sampling
    first_chunk_t: int = 1  # latent frames of block 0; set by pattern=cF-C (0 = unset, a template)
    chunk_t: int = 1  # latent frames of each later block
    loss_scale_fake_score: float = 1.0  # this alone: the release reads it nowhere
    loss_weighting: Literal["none", "gaussian_bell"] = "none"  # time weight of velocity regression
    # per-block times of diffusion forcing
    df_timestep_strategy: Literal["random", "same", "fopp"] = "random"
    # shift of the tf_dcm grid and of many-step sampling
    sample_timestep_shift: float = within(3.0, least=1e-3, most=1e3)
    # RF times after t = 1 in a rollout
    backward_timesteps: tuple[float, ...] = (15 / 16, 5 / 6, 5 / 8)
    shift3_backward: bool = False  # use (0.9, 0.75, 0.5) instead (resolved away by compose)
    # tf_meanflow: samples whose second time is the first one
    meanflow_equal_share: float = within(0.25, least=0, most=0.99)
    replayed_training: bool = False  # back-propagate one block at a time (sf_dmd)
    # sf_dmd; its checkpoints are streamed with the same window
    long_tuning: LongTuningConfig = field(default_factory=LongTuningConfig)
    gan: GanConfig = field(default_factory=GanConfig)  # self-forced training: a discriminator too
    # largest step count per chunk, last repeats; () = max_simulation_steps_fake
    sf_simulation_steps_per_chunk: tuple[int, ...] = ()
    # RF times per entry above; () = from backward_timesteps
    sf_backward_timestep_schedules: tuple[tuple[float, ...], ...] = ()
    context_from_last_step: bool = False  # noisy context: keep the KV of the last denoising input
    # first chunk index with noisy context
    context_from_last_step_start_chunk: int = within(0, least=0, most=2**20)
    # RF times of trajectory entries 1.. of ODE-pair data (entry 0 is clean)
    kd_timesteps: tuple[float, ...] = (1.0, 15 / 16, 5 / 6, 5 / 8)

    @property
    def stage(self) -> str:
        return self.training_type

    @property
    def has(self) -> Stage:
        return STAGES[self.training_type]

    @property
    def pattern(self) -> BlockPattern | None:
        """None for bidirectional training."""
        if self.training_type == "bidirectional":
            return None
        return BlockPattern(self.first_chunk_t, self.chunk_t)

    @property
    def guided(self) -> bool:
        causal = self.has.consistency and self.causal_guidance > 1
        return causal or (self.has.self_forced and self.bidirectional_guidance > 1)

    @property
    def learns_trajectories(self) -> bool:
        return self.has.trajectories

    @property
    def context(self) -> ContextRule:
        """Which blocks leave noisy context."""
        return ContextRule(self.context_from_last_step, self.context_from_last_step_start_chunk)

    def step_schedule(self) -> StepSchedule:
        """Full step schedule per chunk of a causal student (Causal_rCM.md section 6)."""
        knob, counts = self._step_counts()
        return StepSchedule.from_lists(
            steps=counts,
            schedules=self.sf_backward_timestep_schedules,
            default_mids=self.backward_timesteps,
            knob=knob,
        )

    def _step_counts(self) -> tuple[str, tuple[int, ...]]:
        """Step counts per chunk and the key that gives them."""
        given, schedules = self.sf_simulation_steps_per_chunk, self.sf_backward_timestep_schedules
        if given or schedules:
            return f"{M}.sf_simulation_steps_per_chunk", given
        return f"{M}.max_simulation_steps_fake", (self.max_simulation_steps_fake,)

    def checkpoints(self) -> dict[str, str]:
        kind = f"training_type={self.training_type}"
        needed = {"student_ckpt": f"the weights that {kind} starts from"}
        if self.has.consistency:
            needed["causal_teacher_ckpt"] = f"{kind} distils a causal teacher"
        if self.has.self_forced:
            needed["bidirectional_teacher_ckpt"] = f"{kind} scores with a bidirectional teacher"
        return needed

    def check(self) -> None:
        """`ConfigError` for a pattern that does not fit, networks and terms that the stage lacks or
        has no use for, impossible rollouts (Causal_rCM.md section 6, A13).
        """
        if self.training_type != "bidirectional":
            if self.first_chunk_t == 0 or self.chunk_t == 0:
                raise ConfigError(
                    "this experiment is a template: its block pattern is unset"
                    f" (first_chunk_t={self.first_chunk_t}, chunk_t={self.chunk_t}). Add _c1-1,"
                    f" _c3-3 or _c1-4 to its name, or pattern=c3-3, or set {M}.first_chunk_t and"
                    f" {M}.chunk_t"
                )
            self._num_blocks()
        self._check_stage()
        require_times(f"{M}.backward_timesteps", self.backward_timesteps, first=1.0)
        self._check_steps()
        self._check_context()
        self._check_long_tuning()
        self.gan.check(self)
        super().check()

    def _check_stage(self) -> None:
        kind, has = f"training_type={self.training_type}", self.has
        needs = {
            "net_causal_teacher": has.consistency,
            "net_bidirectional_teacher": has.self_forced,
            "net_fake_score": has.self_forced,
        }
        for key, needed in needs.items():
            if needed and getattr(self, key) is None:
                raise ConfigError(
                    f"{M}.{key} is null, but {kind} uses it; choose one with {key}=NAME"
                )
            if not needed and getattr(self, key) is not None:
                raise ConfigError(
                    f"{M}.{key} is set, but {kind} has no use for it; leave it out or set"
                    f" {key}=null"
                )
        term = "loss_scale_dmd" if has.self_forced else "loss_scale"
        if getattr(self, term) == 0:
            raise ConfigError(
                f"{M}.{term}=0 leaves {kind} nothing to train; give it a positive value"
            )
        if has.self_forced and self.student_update_freq < 2:
            raise ConfigError(
                f"{M}.student_update_freq=1 never trains the fake score; {kind} needs at least 2"
            )
        if self.replayed_training and not has.self_forced:
            raise ConfigError(
                f"{M}.replayed_training=True replays a self-forced rollout; {kind} has none, use it"
                " with sf_dmd"
            )
        times = self.kd_timesteps
        if has.trajectories and not (times and all(0 < t <= 1 for t in times)):
            raise ConfigError(
                f"{M}.kd_timesteps={list(times)} must be times in (0, 1], one per noisy trajectory"
                " entry"
            )

    def _check_steps(self) -> None:
        """Times and step counts of the few-step rollout, and no others."""
        knob, counts = self._step_counts()
        key, schedules = f"{M}.sf_backward_timestep_schedules", self.sf_backward_timestep_schedules
        if not self.has.self_forced:
            if self.sf_simulation_steps_per_chunk or schedules:
                raise ConfigError(
                    f"{knob if counts else key} is read by self-forced training only, not by"
                    f" training_type={self.training_type}"
                )
            return
        if any(later > before for before, later in pairwise(counts)):
            raise ConfigError(
                f"{knob}={list(counts)} increases; step counts must be non-increasing along the"
                " video (chunk 0 sets the cycle)"
            )
        for i, times in enumerate(schedules):
            if i < len(counts) and len(times) != counts[i] - 1:
                raise ConfigError(
                    f"{key}[{i}] has {len(times)} times, expected {counts[i] - 1}:"
                    f" {knob}[{i}]={counts[i]} steps start at t = 1"
                )
            require_times(f"{key}[{i}]", times, first=1.0)
        blocks = self._num_blocks()
        if len(counts) > blocks:
            raise ConfigError(
                f"{knob} has {len(counts)} entries, the video has {blocks} blocks; leave the"
                " surplus out"
            )
        try:
            schedule = self.step_schedule()
        except ConfigError as error:
            raise ConfigError(f"{error}; times stand in {M}.backward_timesteps or {key}") from error
        empty = [i for i in range(blocks) if self.context.applies(i) and not schedule.entry(i)]
        if empty:
            raise ConfigError(
                f"{M}.context_from_last_step with a one-step schedule leaves pure noise (t = 1) as"
                f" the context of block {empty[0]}; give it two steps or more in {knob}, or turn"
                " context_from_last_step off"
            )

    def _check_context(self) -> None:
        if not self.context.noisy:
            return
        if not self.has.context:
            raise ConfigError(
                f"{M}.context_from_last_step has no context to make noisy in"
                f" training_type={self.training_type}"
            )
        if not (self.has.self_forced or self.backward_timesteps):
            raise ConfigError(
                f"{M}.backward_timesteps is empty, which leaves pure noise (t = 1) as the context"
                f" of {M}.context_from_last_step; give it a time, or turn that off"
            )
        if self.context.start_chunk >= (blocks := self._num_blocks()):
            raise ConfigError(
                f"{M}.context_from_last_step_start_chunk={self.context.start_chunk} is beyond the"
                f" last of {blocks} blocks (0 to {blocks - 1})"
            )

    def _check_long_tuning(self) -> None:
        """Longer rollouts fit the pattern, and have a window to be streamed with."""
        long, knob = self.long_tuning, f"{M}.long_tuning"
        if not long.frames:
            return
        if self.training_type != "sf_dmd":
            raise ConfigError(
                f"{knob}.frames={long.frames} makes rollouts of sf_dmd longer;"
                f" training_type={self.training_type} is another"
            )
        if long.frames < self.state_t:
            raise ConfigError(
                f"{knob}.frames={long.frames} must be at least the judged"
                f" {M}.state_t={self.state_t}, or 0: no long tuning"
            )
        if long.window_blocks < 1:
            raise ConfigError(
                f"{knob}.window_blocks={long.window_blocks} must be at least 1, the chunk itself:"
                " it bounds the cache"
            )
        blocks = BlockPattern(self.first_chunk_t, self.chunk_t)
        rest = (long.frames - self.first_chunk_t) % self.chunk_t
        if rest:
            fits = f"{long.frames - rest} or {long.frames - rest + self.chunk_t}"
            raise ConfigError(
                f"{knob}.frames={long.frames} does not split into blocks of {blocks.name};"
                f" nearest that fit: {fits}"
            )

    def _num_blocks(self) -> int:
        return BlockPattern(self.first_chunk_t, self.chunk_t).num_blocks(self.state_t)
