"""A composed run in the planner's vocabulary: which networks, which phases, which passes (`rcm.train.planner_job`).

Follows `rcm.configs.build_method` and the methods it builds; sampling and checkpoints in between are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args, get_type_hints

from rcm.configs.build_data import latent_shape
from rcm.configs.build_method import step_schedule
from rcm.configs.build_nets import precision_of
from rcm.configs.compose import Run
from rcm.configs.network import networks, wan_config
from rcm.configs.schema_model import CausalConfig, CommonModelConfig, RCMConfig, SACConfig
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.layout import TokenLayout
from rcm.rollout.plan import ContextRule, training_plan
from rcm.train.planner import ALL_MODES
from rcm.train.planner_job import Held, Job, NetPlan, Pass, PhasePlan, Recompute

ROLE_OF = {
    "net": "student",
    "net_teacher": "teacher",
    "net_causal_teacher": "causal_teacher",
    "net_bidirectional_teacher": "bidirectional_teacher",
    "net_fake_score": "fake_score",
}


Rollouts = Literal["mean", "longest"]
"""Step counts of rollouts: the mean over their cycle (for the time of a run), or the longest (for one measured iteration)."""


def plan_job(run: Run, *, ranks: int, fused: bool = True, rollouts: Rollouts = "mean") -> Job:
    """The job of `run` on `ranks` ranks, laid out as its config says. `fused`: as on CUDA."""
    config, model = run.config, run.config.model.config
    precision = precision_of(model)
    channels, frames, height, width = latent_shape(model)
    plans = _causal_phases(model, frames, rollouts) if isinstance(model, CausalConfig) else _rcm_phases(model, frames, rollouts)
    return Job(
        name=run.experiment or config.job.name,
        nets=_nets(model),
        phases=plans,
        latent_elements=channels * frames * height * width,
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
    )


def recompute_modes() -> tuple[Recompute, ...]:
    """Modes of activation checkpointing that a config may ask for."""
    return tuple(mode for mode in ALL_MODES if mode in get_args(get_type_hints(SACConfig)["mode"]))


def _nets(model: CommonModelConfig) -> tuple[NetPlan, ...]:
    found = []
    for key, net in networks(model).items():
        trained = key in ("net", "net_fake_score")
        recompute, every = (net.sac_config.mode, net.sac_config.every_n_blocks) if trained else ("none", 1)
        averaged = key == "net" and model.ema.enabled
        found.append(NetPlan(ROLE_OF[key], wan_config(net), trained, averaged, recompute, every))
    return tuple(found)


def _grid(model: CommonModelConfig) -> tuple[int, int]:
    return wan_config(model.net).token_grid(*model.latent_size())


def _guided(scale: float) -> float:
    """Forwards of a guided teacher per evaluation."""
    return 2.0 if scale > 1 else 1.0


def _trained(*layouts: TokenLayout) -> Pass:
    return Pass("student", "student", "train", layouts)


class _Causal:
    """Passes of the causal stages. `whole`, `packed`, `masked`, `noisy`, `chunks`: the layouts of `rcm.methods`."""

    def __init__(self, model: CausalConfig, frames: int, rollouts: Rollouts) -> None:
        self.model, self.frames, self.rollouts = model, frames, rollouts
        self.pattern = BlockPattern(model.first_chunk_t, model.chunk_t)
        grid = _grid(model)
        structure = {"grid": grid, "pattern": self.pattern}
        self.whole = TokenLayout.bidirectional(frames, grid=grid)
        self.packed = TokenLayout.teacher_forcing(frames, **structure)
        self.masked = TokenLayout.block_causal(frames, **structure)
        self.noisy = TokenLayout.noisy_over_context(frames, **structure)
        blocks = range(self.pattern.num_blocks(frames))
        self.chunks = tuple(TokenLayout.cached_chunk(block, num_frames=frames, **structure) for block in blocks)
        self.cache = Held("student", frames=frames)

    def discrete(self) -> tuple[Pass, ...]:
        evaluations = self.model.dcm_skipping_interval_steps * _guided(self.model.causal_guidance)
        return (
            Pass("causal teacher", "causal_teacher", "infer", (self.packed,), (evaluations,)),
            Pass("student's target", "student", "infer", (self.packed,)),
            _trained(self.packed),
        )

    def continuous(self) -> tuple[Pass, ...]:
        return (
            Pass("causal teacher", "causal_teacher", "infer", (self.packed,), (_guided(self.model.causal_guidance),)),
            Pass("student's clean context", "student", "infer", (self.masked,), held=(self.cache,)),
            Pass("student's tangent", "student", "tangent", (self.noisy,), held=(self.cache,)),
            _trained(self.packed),
        )

    def rollout(self, *, last_with_gradient: bool) -> tuple[float, ...]:
        """Forwards without gradient per chunk, context passes among them."""
        schedule, model = step_schedule(self.model), self.model
        rule = ContextRule(model.context_from_last_step, model.context_from_last_step_start_chunk)
        indices = range(schedule.steps(0)) if self.rollouts == "mean" else (schedule.steps(0) - 1,)
        counts = [0.0] * len(self.chunks)
        for index in indices:
            for plan in training_plan(self.pattern, self.frames, schedule, index=index, context=rule):
                free = plan.commit == "last_input" and not last_with_gradient
                commits = 0 if plan.block == len(counts) - 1 or free else 1
                counts[plan.block] += (plan.num_steps - last_with_gradient + commits) / len(indices)
        return tuple(counts)

    def scores(self, held: tuple[Held, ...]) -> tuple[Pass, ...]:
        guided = (_guided(self.model.bidirectional_guidance),)
        return (
            Pass("fake score", "fake_score", "infer", (self.whole,), held=held),
            Pass("bidirectional teacher", "bidirectional_teacher", "infer", (self.whole,), guided, held=held),
        )

    def self_forced(self) -> tuple[Pass, ...]:
        """A student phase: the rollout, its judgement, and the gradient of every chunk's last step, together or one chunk at a time."""
        cache, chunks = self.cache, self.chunks
        if self.model.replayed_training:
            unkept = Pass("rollout", "student", "infer", chunks, self.rollout(last_with_gradient=False), (cache,))
            replays = (Pass("replayed chunk", "student", "train", (chunk,), held=(cache,)) for chunk in chunks)
            return (unkept, *self.scores((cache,)), *replays)
        last = Pass("rollout's last steps", "student", "train", chunks, held=(cache,))
        held = (cache, Held("student", of=last))
        return (Pass("rollout", "student", "infer", chunks, self.rollout(last_with_gradient=True), held), *self.scores(held), last)

    def critic(self) -> PhasePlan:
        passes = (
            Pass("rollout", "student", "infer", self.chunks, self.rollout(last_with_gradient=False), (self.cache,)),
            Pass("fake score", "fake_score", "train", (self.whole,)),
        )
        frequency = self.model.student_update_freq
        return PhasePlan("fake_score", passes, share=(frequency - 1) / frequency)


def _causal_phases(model: CausalConfig, frames: int, rollouts: Rollouts) -> tuple[PhasePlan, ...]:
    if model.training_type == "bidirectional":
        return (PhasePlan("student", (_trained(TokenLayout.bidirectional(frames, grid=_grid(model))),)),)
    parts = _Causal(model, frames, rollouts)
    match model.training_type:
        case "tf" | "tf_kd":
            return (PhasePlan("student", (_trained(parts.packed),)),)
        case "df" | "df_kd":
            return (PhasePlan("student", (_trained(parts.masked),)),)
        case "tf_dcm":
            return (PhasePlan("student", parts.discrete()),)
        case "tf_scm":
            return (PhasePlan("student", parts.continuous()),)
        case "tf_dscm":
            return (PhasePlan("student", (*parts.discrete(), *parts.continuous()), terms=2),)
    joint = parts.continuous() if model.training_type == "tf_scm_sf_dmd" else ()
    terms = (len(parts.chunks) if model.replayed_training else 1) + bool(joint)
    student = PhasePlan("student", (*joint, *parts.self_forced()), share=1 / model.student_update_freq, terms=terms)
    return student, parts.critic()


def _rcm_phases(model: RCMConfig, frames: int, rollouts: Rollouts) -> tuple[PhasePlan, ...]:
    whole = (TokenLayout.bidirectional(frames, grid=_grid(model)),)
    guided = _guided(model.teacher_guidance)
    student = _consistency(model, whole, guided) if model.loss_scale > 0 else ()
    if model.net_fake_score is None or model.loss_scale_dmd <= 0:
        return (PhasePlan("student", student),)
    steps = (model.max_simulation_steps_fake + 1) / 2 if rollouts == "mean" else model.max_simulation_steps_fake
    last = Pass("simulation's last step", "student", "train", whole)
    held = (Held("student", of=last),)
    matching = (
        Pass("simulation", "student", "infer", whole, (steps - 1,)),
        Pass("fake score", "fake_score", "infer", whole, held=held),
        Pass("teacher", "teacher", "infer", whole, (guided,), held=held),
        last,
    )
    frequency = model.student_update_freq
    critic = (Pass("simulation", "student", "infer", whole, (steps,)), Pass("fake score", "fake_score", "train", whole))
    return (
        PhasePlan("student", (*student, *matching), share=1 / frequency, terms=1 + bool(student)),
        PhasePlan("fake_score", critic, share=(frequency - 1) / frequency),
    )


def _consistency(model: RCMConfig, whole: tuple[TokenLayout, ...], guided: float) -> tuple[Pass, ...]:
    if model.cm_type == "dcm":
        evaluations = model.dcm_skipping_interval_steps * guided
        target = Pass("student's target", "student", "infer", whole)
        return Pass("teacher", "teacher", "infer", whole, (evaluations,)), target, _trained(*whole)
    exact = Pass("student's tangent", "student", "tangent", whole)
    plain = Pass("student's difference", "student", "infer", whole)
    tangent = {0: (exact,), 1: (exact, plain), 2: (replace(plain, repeats=(2.0,)),)}[model.fd_type]
    return (Pass("teacher", "teacher", "infer", whole, (guided,)), *tangent, _trained(*whole))
