"""A composed run as a planner's job: networks, phases, passes (`rcm.train.planner_job`).

Follows `rcm.configs.build_method`, without sampling and checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from rcm.configs.bases import base_of, roles_on
from rcm.configs.build_data import latent_shape
from rcm.configs.build_gan import head_elements
from rcm.configs.build_nets import kept_gathered, precision_of
from rcm.configs.compose import Run
from rcm.configs.network import networks, wan_config
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig, NetConfig
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import ConfigError
from rcm.nets.layout import TokenLayout
from rcm.rollout.plan import training_plan
from rcm.train.planner_job import Job, NetPlan, Pass, PhasePlan

Rollouts = Literal["mean", "longest"]
"""Rollout steps: the mean of their cycle (time of a run) or the longest (of an iteration)."""


def plan_job(run: Run, *, ranks: int, fused: bool = True, rollouts: Rollouts = "mean") -> Job:
    """The job of `run` on `ranks` ranks, laid out as its config says. `fused`: as on CUDA."""
    config, model = run.config, run.config.model.config
    precision = precision_of(model)
    return Job(
        name=run.experiment or config.job.name,
        nets=tuple(_net(key, net, config) for key, net in networks(model).items()),
        phases=_phases(model, rollouts),
        latent_elements=math.prod(latent_shape(model)),
        batch=config.dataloader_train.batch_size,
        accumulation=config.trainer.grad_accum_iter,
        ranks=ranks,
        shard=model.fsdp_shard_size,
        context=config.model_parallel.context_parallel_size,
        param_bytes=precision.params.itemsize,
        compute_bytes=precision.compute.itemsize,
        reduce_bytes=precision.reduce.itemsize,
        fused=fused and precision.compute.itemsize < 8,
        gradient_sync=config.trainer.gradient_sync,
        frozen_weights=model.frozen_weights,
        host_states=config.trainer.offload.states,
        idle_roles=config.trainer.offload.idle_roles,
        host_parameters=config.trainer.offload.parameters,
        keep_gathered=kept_gathered(config),
    )


def _net(key: str, net: NetConfig, config: TrainConfig) -> NetPlan:
    model = config.model.config
    role = key.removeprefix("net_") if key != "net" else "student"
    # whose network carries the adapters, or none
    carrier = next(iter(roles_on(model, base_of(model, key))), role)
    base = "" if carrier == role else carrier
    if role not in ("student", "fake_score"):
        return NetPlan(role, wan_config(net), trained=False, base=base)
    sac, averaged = net.sac_config, role == "student" and model.ema.enabled
    layers = model.lora.layers
    return NetPlan(
        role,
        wan_config(net),
        True,
        averaged,
        sac.mode,
        sac.every_n_blocks,
        sac.keep_last_blocks,
        model.lora.rank,
        layers,
        base,
        (config.optimizer if role == "student" else model.optimizer_fake_score).states,
        head_elements(model, wan_config(net)) if role == "fake_score" else 0,
    )


def _grid(model: CommonModelConfig) -> tuple[int, int]:
    return wan_config(model.net).token_grid(*model.latent_size())


def _whole(model: CommonModelConfig) -> tuple[TokenLayout]:
    return (TokenLayout.bidirectional(model.state_t, grid=_grid(model)),)


def _guided(scale: float) -> float:
    """Forwards of a guided teacher per evaluation."""
    return 2.0 if scale > 1 else 1.0


def _trained(*layouts: TokenLayout) -> Pass:
    return Pass("student", "student", "train", layouts)


def _alternating(
    student: PhasePlan, critic: tuple[Pass, ...], *, frequency: int
) -> tuple[PhasePlan, PhasePlan]:
    """One student iteration, then `frequency` - 1 of the fake score."""
    rest = (frequency - 1) / frequency
    return (
        replace(student, share=1 / frequency),
        PhasePlan("fake_score", critic, share=rest, rollout=student.rollout),
    )


class _Causal:
    """Passes of the causal stages, over the layouts that `rcm.methods` use."""

    def __init__(self, model: CausalConfig, rollouts: Rollouts) -> None:
        self.model, self.frames, self.rollouts = model, model.state_t, rollouts
        assert model.pattern is not None  # a bidirectional run has phases of its own
        self.pattern = model.pattern
        structure: dict[str, Any] = {"grid": _grid(model), "pattern": self.pattern}
        self.whole = _whole(model)
        self.packed = TokenLayout.teacher_forcing(self.frames, **structure)
        self.masked = TokenLayout.block_causal(self.frames, **structure)
        self.noisy = TokenLayout.noisy_over_context(self.frames, **structure)
        long, sinks = model.long_tuning, model.long_tuning.sink_blocks
        total, window = long.frames or self.frames, long.window_blocks or None
        seen: dict[str, Any] = {"num_frames": total, "window": window, "sinks": sinks}
        self.bounds = self.pattern.bounds(total)
        self.chunks = tuple(
            TokenLayout.cached_chunk(block, **seen, **structure)
            for block in range(len(self.bounds))
        )
        self.ends = [
            block + 1 for block, (_, stop) in enumerate(self.bounds) if stop >= self.frames
        ]
        if rollouts == "longest":
            self.ends = self.ends[-1:]
        self.judged = tuple(
            chunk
            for chunk, (_, stop) in zip(self.chunks, self.bounds, strict=True)
            if stop > total - self.frames
        )
        if window is not None:  # what a streamed chunk sees, and the judged chunks
            seen_frames = (window + sinks) * max(self.pattern.first, self.pattern.chunk)
            total = min(total, seen_frames + sum(chunk.num_frames for chunk in self.judged))
        self.cached = total

    def teacher(self, evaluations: int = 1) -> Pass:
        count = evaluations * _guided(self.model.causal_guidance)
        return Pass("causal teacher", "causal_teacher", "infer", (self.packed,), (count,))

    def discrete(self) -> tuple[Pass, ...]:
        target = Pass("student's target", "student", "infer", (self.packed,))
        return self.teacher(self.model.dcm_skipping_interval_steps), target, _trained(self.packed)

    def continuous(self) -> tuple[Pass, ...]:
        return (
            self.teacher(),
            Pass("student's clean context", "student", "infer", (self.masked,), cached=self.frames),
            Pass("student's tangent", "student", "tangent", (self.noisy,), cached=self.frames),
            _trained(self.packed),
        )

    def rollout(self, *, last_with_gradient: bool, beside: Pass | None = None) -> Pass:
        """Forwards without gradient per chunk, context passes among them."""
        schedule, rule = self.model.step_schedule(), self.model.context
        indices = range(schedule.steps(0)) if self.rollouts == "mean" else (schedule.steps(0) - 1,)
        counts, cases = [0.0] * len(self.chunks), len(indices) * len(self.ends)
        for index, end in product(indices, self.ends):
            plans = training_plan(
                self.pattern, self.bounds[-1][1], schedule, index=index, context=rule
            )[:end]
            for plan in plans:
                graded = last_with_gradient and plan.stop > plans[-1].stop - self.frames
                free = plan.commit == "last_input" and not graded
                commits = 0 if plan.block == end - 1 or free else 1
                counts[plan.block] += (plan.num_steps - graded + commits) / cases
        return Pass("rollout", "student", "infer", self.chunks, tuple(counts), self.cached, beside)

    def self_forced(self) -> tuple[Pass, ...]:
        """A student phase: rollout, judgement, and the gradient of every chunk's last step."""
        cached, replayed = self.cached, self.model.replayed_training
        last = Pass("rollout's last steps", "student", "train", self.judged, cached=cached)
        beside = None if replayed else last
        role, guided = "bidirectional_teacher", (_guided(self.model.bidirectional_guidance),)
        judged = (
            self.rollout(last_with_gradient=not replayed, beside=beside),
            self.asked(cached, beside),
            Pass("bidirectional teacher", role, "infer", self.whole, guided, cached, beside),
        )
        replays = (
            Pass("replayed chunk", "student", "train", (chunk,), cached=cached)
            for chunk in self.judged
        )
        return (*judged, *replays) if replayed else (*judged, last)

    def asked(self, cached: int, beside: Pass | None) -> Pass:
        """The fake score in a student phase; a discriminator's gradient comes back through it."""
        step = Pass("fake score", "fake_score", "infer", self.whole, (), cached, beside)
        return replace(step, mode="train", inputs=True) if self.model.gan.loss_scale else step

    def fitted(self) -> Pass:
        """The fake score in its own phase, with the looks of a discriminator at real videos."""
        step, gan = Pass("fake score", "fake_score", "train", self.whole), self.model.gan
        if not gan.loss_scale:
            return step
        assert self.model.net_fake_score is not None  # checked with the loss
        layers = wan_config(self.model.net_fake_score).num_layers
        looks = 2 if gan.r1 == "approximate" else 1
        reach = (layers, *looks * (gan.read_blocks(layers)[-1] + 1,))
        return replace(step, layouts=self.whole * len(reach), reach=reach)

    def phases(self) -> tuple[PhasePlan, ...]:
        """Those of the training type."""
        kind, model = self.model.training_type, self.model
        alone = {
            "tf": lambda: (_trained(self.packed),),
            "df": lambda: (_trained(self.masked),),
            "tf_dcm": self.discrete,
            "tf_scm": self.continuous,
            "tf_meanflow": self.continuous,
            "tf_dscm": lambda: (*self.discrete(), *self.continuous()),
        }
        if (passes := alone.get(kind.removesuffix("_kd"))) is not None:
            return (PhasePlan("student", passes(), terms=2 if kind == "tf_dscm" else 1),)
        if not model.has.self_forced:
            raise ConfigError(f"the planner does not know the passes of training_type={kind}")
        joint = self.continuous() if model.has.consistency else ()
        terms = (len(self.judged) if model.replayed_training else 1) + bool(joint)
        critic = (self.rollout(last_with_gradient=False), self.fitted())
        both = (*joint, *self.self_forced())
        student = PhasePlan("student", both, terms=terms, rollout=True)
        return _alternating(student, critic, frequency=model.student_update_freq)


def _phases(model: CausalConfig | RCMConfig, rollouts: Rollouts) -> tuple[PhasePlan, ...]:
    if isinstance(model, RCMConfig):
        return _rcm_phases(model, rollouts)
    if model.pattern is None:
        return (PhasePlan("student", (_trained(*_whole(model)),)),)
    return _Causal(model, rollouts).phases()


def _rcm_phases(model: RCMConfig, rollouts: Rollouts) -> tuple[PhasePlan, ...]:
    whole = _whole(model)
    guided = _guided(model.teacher_guidance)
    student = _consistency(model, whole, guided) if model.loss_scale > 0 else ()
    if "net_fake_score" not in networks(model):
        return (PhasePlan("student", student),)
    most = model.max_simulation_steps_fake
    steps = (most + 1) / 2 if rollouts == "mean" else most
    last = Pass("simulation's last step", "student", "train", whole)
    matching = (
        Pass("simulation", "student", "infer", whole, (steps - 1,)),
        Pass("fake score", "fake_score", "infer", whole, beside=last),
        Pass("teacher", "teacher", "infer", whole, (guided,), beside=last),
        last,
    )
    critic = (
        Pass("simulation", "student", "infer", whole, (steps,)),
        Pass("fake score", "fake_score", "train", whole),
    )
    both = PhasePlan("student", (*student, *matching), terms=1 + bool(student))
    return _alternating(both, critic, frequency=model.student_update_freq)


def _consistency(
    model: RCMConfig, whole: tuple[TokenLayout, ...], guided: float
) -> tuple[Pass, ...]:
    exact = Pass("student's tangent", "student", "tangent", whole)
    plain = Pass("student's difference", "student", "infer", whole)
    schemes = {0: (exact,), 1: (exact, plain), 2: (replace(plain, repeats=(2.0,)),)}
    evaluations, own = 1, schemes[model.fd_type]
    if model.cm_type == "dcm":
        evaluations = model.dcm_skipping_interval_steps
        own = (Pass("student's target", "student", "infer", whole),)
    return (
        Pass("teacher", "teacher", "infer", whole, (evaluations * guided,)),
        *own,
        _trained(*whole),
    )
