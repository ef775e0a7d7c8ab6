"""A composed run, executed: the only place where all layers meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from loguru import logger

from rcm.configs.build_data import build_loader, known_words, negative_condition
from rcm.configs.build_method import build_method
from rcm.configs.build_nets import NetBuilder, kept_gathered
from rcm.configs.build_samples import sample_observers
from rcm.configs.compose import Run
from rcm.configs.console import told
from rcm.configs.continuity import continued_settings, shared_by_ranks
from rcm.configs.description import description
from rcm.configs.memory import require_here
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.core.determinism import repeatable
from rcm.core.errors import ConfigError
from rcm.core.files import discard
from rcm.core.output_file import place_for
from rcm.data.loader import Loader
from rcm.methods.adversary import HEAD
from rcm.methods.base import Method
from rcm.nets.denoiser import Denoiser
from rcm.parallel.agree import on_first, require_same, together
from rcm.parallel.launch import this_launch
from rcm.parallel.mesh import ParallelDims, launch_group
from rcm.parallel.threads import settle_threads
from rcm.pipelines.described import description_at, stream_command
from rcm.train.checkpoint import Checkpointer
from rcm.train.describe import write_atomically
from rcm.train.export import find_model_directory
from rcm.train.job_lock import job_lock
from rcm.train.metrics import JsonLines, Sink, Wandb, require_wandb
from rcm.train.monitor import DeviceMonitor, HeartBeat
from rcm.train.observers import KernelRecord, LogLines, Memory, Observer, Profiler, Progress
from rcm.train.offload import IdleRoles
from rcm.train.resume import Taken
from rcm.train.state import TrainState
from rcm.train.step import StepConfig
from rcm.train.stragglers import OwnTime, Stragglers
from rcm.train.trainer import Outcome, Trainer

UNCHECKED = ".config.yaml"
"""Name of a run's record until all is loaded: a refused launch leaves the earlier record."""


def job_folder(run: Run) -> Path:
    """`<output_root>/<project>/<group>/<name>` of a run; empty parts are left out."""
    job = run.config.job
    parts = (job.project, job.group, job.name or run.experiment or "unnamed")
    return Path(job.output_root or "outputs").joinpath(*(part for part in parts if part))


def run(run: Run) -> Outcome:
    """Train until `trainer.max_iter` in `job_folder(run)`, from its newest checkpoint on.

    Raises what composing missed: `CheckpointError`, `ConfigError` of data, ranks or a folder in
    use, `NonFinite` (nothing updated), `OSError` with the path, `PeerGone`.
    """
    this_launch()
    with (
        repeatable(run.config.trainer.deterministic),
        launch_group() as device,
        ExitStack() as held,
    ):
        replicate, shard, cp = run.mesh
        dims = ParallelDims(dp_replicate=replicate, dp_shard=shard, cp=cp, device_type=device.type)
        require_same(
            "their configuration",
            shared_by_ranks(run.config),
            knob="give every rank the same command and environment",
        )
        if run.config.job.wandb_mode in ("online", "offline"):
            on_first(lambda: require_wandb(run.config.job.wandb_mode))
        on_first(lambda: held.enter_context(_claimed(job_folder(run), run)))
        held.enter_context(told(job_folder(run), rank=dims.rank, world_size=dims.world_size))
        trainer = build_trainer(run, dims=dims, device=device)
        settle_threads(trainer.method.trainable["student"], device=device)
        outcome = trainer.run()
        if dims.rank == 0:
            _tell_how_to_go_on(outcome, run)
        return outcome


def _tell_how_to_go_on(outcome: Outcome, run: Run) -> None:
    folder = job_folder(run)
    if outcome == "interrupted":
        left = Taken.all_but(run.config.checkpoint.keys_not_to_resume).left
        logger.info(
            "the same command continues it{}", f", again without {', '.join(left)}" if left else ""
        )
    elif line := stream_command(folder, description_at(folder)):
        logger.info("stream it: {}", line)


def build_trainer(run: Run, *, dims: ParallelDims, device: torch.device) -> Trainer:
    """Everything of a run whose folder is claimed, at the state where it continues. Collective."""
    config = run.config
    folder = job_folder(run)
    allow_tf32()
    if dims.rank == 0:
        for sentence in run.unread:
            logger.warning("{}", sentence)
    loader = together(lambda: build_loader(config, dims=dims, device=device))
    fingerprint, samples = loader.source.fingerprint(), len(loader.source)
    require_same(
        "their data",
        {"fingerprint": fingerprint, "samples": samples},
        knob="dataloader_train.tar_path_pattern must name the same files for every rank",
    )
    resumes = bool(config.checkpoint.load_path) or find_model_directory(folder) is not None
    resumes &= "model" in Taken.all_but(config.checkpoint.keys_not_to_resume).parts
    require_here(config, device=device)
    idle = IdleRoles() if config.trainer.offload.idle_roles else None
    nets = NetBuilder(
        config.model.config,
        dims=dims,
        device=device,
        seed=config.trainer.seed,
        resumes=resumes,
        idle=idle,
        host=config.trainer.offload.parameters,
    )
    method = build_method(config, nets, negative=lambda: negative_condition(config, device=device))
    state = train_state(config, method)
    own = OwnTime()
    checkpointer = Checkpointer(
        folder,
        dims=dims,
        description=description(
            run,
            data_hash=fingerprint,
            words=known_words(config.model.config, loader.source),
            adapters=nets.adapters(),
        ),
        settings=continued_settings(config),
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.dcp_async_mode_enabled,
        own=own,
    )
    _resume(config, checkpointer, state, loader)
    student = Denoiser(method.trainable["student"], nets.precision)
    sinks = on_first(lambda: _begin_record(run, folder, resumed_at=state.iteration))
    return Trainer(
        method,
        loader,
        state=state,
        dims=dims,
        config=config.trainer,
        step=step_config(config),
        save_iter=config.checkpoint.save_iter,
        device=device,
        checkpointer=checkpointer,
        sinks=sinks or (),
        idle=idle,
        own=own,
        observers=_observers(run, folder, student, device=device, own=own),
    )


@contextmanager
def _claimed(folder: Path, run: Run) -> Iterator[None]:
    """The job's folder for this run alone, with its record as `UNCHECKED`. `OSError` names the
    folder, `ConfigError` the run that has it.
    """
    with ExitStack() as held:
        try:
            place_for(folder)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(job_lock(folder))
            discard(folder / UNCHECKED)
            write_atomically(folder / UNCHECKED, run.to_yaml())
        except OSError as error:
            raise OSError(
                f"cannot write to the job folder {folder}: {error.strerror or error}; set"
                " job.output_root or IMAGINAIRE_OUTPUT_ROOT"
            ) from error
        for use in run.environment:
            logger.info("environment: {}", use)
        yield


def _begin_record(run: Run, folder: Path, *, resumed_at: int) -> list[Sink]:
    """The run fits the folder: its record takes the place, its numbers follow `resumed_at`."""
    record = folder / "config.yaml"
    if record.is_dir():
        discard(record)
    (folder / UNCHECKED).replace(record)
    return _sinks(run, folder, resumed_at=resumed_at)


def allow_tf32() -> None:
    """float32 products on tensor cores, as the release (docs/reference/wan.md#precision)."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def train_state(config: TrainConfig, method: Method) -> TrainState:
    """What training changes: optimisers, schedules and average of the networks of `method`."""
    model = config.model.config
    optim = {"student": config.optimizer, "fake_score": model.optimizer_fake_score}
    schedule = {"student": config.scheduler, "fake_score": model.scheduler_fake_score}
    if HEAD in method.trainable and isinstance(model, CausalConfig):
        optim[HEAD], schedule[HEAD] = model.gan.optimizer, model.gan.scheduler
    return TrainState.create(
        method.trainable,
        optim=optim,
        schedule=schedule,
        ema=model.ema if model.ema.enabled else None,
        host=config.trainer.offload.states,
    )


def _resume(
    config: TrainConfig, checkpointer: Checkpointer, state: TrainState, loader: Loader
) -> None:
    """Continue this job's newest checkpoint, else `checkpoint.load_path`, else start at 0."""
    keys = config.checkpoint
    taken = Taken.all_but(keys.keys_not_to_resume)
    found = checkpointer.load(state, loader=loader, taken=taken)
    if found is None and keys.load_path:
        taken = keys.taken_from_load_path()
        found = checkpointer.load(state, loader=loader, path=keys.load_path, taken=taken)
        if state.iteration >= config.trainer.max_iter:
            raise ConfigError(
                f"checkpoint.load_path={keys.load_path} has {state.iteration} iterations, which"
                f" leaves nothing to train up to trainer.max_iter={config.trainer.max_iter}; raise"
                " it, or set checkpoint.load_training_state=False to start at 0"
            )
    if found is not None:
        less = f", without {', '.join(taken.left)}" if taken.left else ""
        averaged = ", the student from averaged weights" if taken.averaged else ""
        logger.info("resumed at iteration {} from {}{}{}", state.iteration, found, less, averaged)


def step_config(config: TrainConfig) -> StepConfig:
    """How gradients of a run are treated."""
    model = config.model.config
    return StepConfig(
        grad_clip=model.grad_clip,
        clip_norm=model.grad_clip_norm,
        gradient_sync=config.trainer.gradient_sync,
        keep_gathered=kept_gathered(config),
    )


def _sinks(run: Run, folder: Path, *, resumed_at: int) -> list[Sink]:
    job = run.config.job
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", resumed_at=resumed_at), LogLines()]
    if job.wandb_mode in ("online", "offline"):
        place = {"project": job.wandb_project or job.project, "entity": job.wandb_entity}
        names = {**place, "group": job.group, "name": job.name}
        sinks.append(Wandb(**names, directory=folder, mode=job.wandb_mode, config=run.record()))
    return sinks


def _observers(
    run: Run, folder: Path, student: Denoiser, *, device: torch.device, own: OwnTime
) -> list[Observer]:
    trainer = run.config.trainer
    observers: list[Observer] = [KernelRecord(folder / "kernels.json")]
    if device.type == "cuda":
        observers.append(Memory())
    if trainer.progress_bar:
        observers.append(Progress(max_iter=trainer.max_iter))
    beat, figures = trainer.callbacks.heart_beat, trainer.callbacks.device_monitor
    slow = trainer.callbacks.stragglers
    if beat.every_n:
        minutes = beat.update_interval_in_minute
        observers.append(HeartBeat(folder / "heartbeat.json", every=beat.every_n, minutes=minutes))
    if figures.every_n:
        detail = figures.log_memory_detail
        observers.append(DeviceMonitor(every=figures.every_n, device=device, detail=detail))
    if slow.every_n:
        often, share, runs = slow.every_n, slow.percent, slow.intervals
        observers.append(Stragglers(own, every=often, device=device, percent=share, intervals=runs))
    if trainer.profile_iter:
        observers.append(Profiler(folder=folder / "profile", skip=trainer.profile_iter))
    return observers + sample_observers(run, folder, student, device=device)
