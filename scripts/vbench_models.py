"""Which model `scripts.vbench_sample` samples: its flags, and a `VideoSampler` made from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.codec import latent_frames
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.wan_vae import WanVAECodec
from rcm.evaluation.vbench_samplers import CausalSampler, DescribedSampler, WanSampler
from rcm.evaluation.vbench_sampling import VideoSampler
from rcm.inference.stream_recipe import chosen_recipe
from rcm.inference.wan_command import frame_size
from rcm.inference.wan_flags import PRECISIONS, TEXT_ENCODER_PATH, VAE_PATH, NetworkFile
from rcm.inference.wan_models import VAE_DTYPES, Task, build_pipeline, check_files
from rcm.nets.attention import BACKENDS
from rcm.pipelines.described import PieceFiles
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.text_to_video import WholeVideoRecipe, check_guided
from rcm.pipelines.wan_files import load_wan
from rcm.pipelines.wan_pipeline import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE
from rcm.pipelines.wan_ranks import num_ranks, share_tokens
from rcm.pipelines.wan_sizes import SIZES
from rcm.rollout.plan import StepSchedule
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.schedule import CAUSAL_MID_TIMES, parse_schedules, parse_times
from rcm.train.export import describe

FEW_STEPS, MANY_STEPS = 4, 50
_CAUSAL_ONLY = (
    "steps_per_chunk",
    "mid_t",
    "mid_t_schedules",
    "first_chunk_t",
    "chunk_t",
    "context_from_last_step",
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the model and of its sampling, under the names of the release. None: as trained, or
    the release's default.
    """
    add = parser.add_argument_group("model").add_argument
    add(
        "--dit_path",
        required=True,
        metavar="PATH",
        help="job folder, iter_* folder or exported file of this package, or a Wan file",
    )
    add(
        "--arch",
        choices=("bidirectional", "causal"),
        help="of a Wan file [told by the checkpoint where it describes itself]",
    )
    add(
        "--model_size",
        choices=("1.3B", "14B", "auto"),
        default="1.3B",
        help="of a Wan file [%(default)s]",
    )
    add(
        "--weights",
        choices=("ema", "reg"),
        default="ema",
        help="averaged or last weights [%(default)s]",
    )
    add("--vae_path", metavar="PATH", help=f"[where the checkpoint says, else {VAE_PATH}]")
    add(
        "--text_encoder_path",
        metavar="PATH",
        help=f"[where the checkpoint says, else {TEXT_ENCODER_PATH}]",
    )
    add("--tokenizer_path", metavar="DIR", help="[beside the text encoder]")
    add("--text_cache", metavar="DIR", help="keep umT5's embeddings there")
    add = parser.add_argument_group("video").add_argument
    add("--num_frames", type=int, metavar="N", help="pixel frames [as trained; Wan 81]")
    add("--resolution", default="480p", help=f"of a Wan file: {', '.join(SIZES)} [%(default)s]")
    add("--aspect_ratio", default="16:9", metavar="W:H", help="[%(default)s]")
    add("--size", metavar="HxW", help="pixels instead of the table (an addition)")
    add(
        "--fps",
        type=float,
        help="frames per second of the files; dynamic_degree looks at it [as trained; Wan 16]",
    )
    add = parser.add_argument_group("sampling").add_argument
    add("--distilled", action="store_true", help="Wan file: few steps, no guidance")
    add(
        "--num_steps",
        type=int,
        metavar="N",
        help=f"[as trained; Wan {FEW_STEPS} distilled, else {MANY_STEPS}]",
    )
    add("--sigma_max", type=float, help="noise level of the first step [as trained; Wan 1600]")
    add(
        "--mid_t",
        nargs="+",
        metavar="T",
        help="causal: mid times, fractions allowed [15/16 5/6 5/8]",
    )
    add(
        "--steps_per_chunk",
        type=int,
        nargs="+",
        metavar="N",
        help="causal: steps of each chunk, the last number repeats",
    )
    add(
        "--mid_t_schedules",
        metavar="T,T;T",
        help="causal: mid times per entry of --steps_per_chunk",
    )
    add("--guidance_scale", type=float, help="without --distilled [as trained; Wan 5]")
    add("--negative_prompt", metavar="TEXT", help="[Wan's own]")
    add("--timestep_shift", type=float, help="without --distilled [as trained; Wan 5]")
    add(
        "--first_chunk_t",
        type=int,
        metavar="N",
        help="causal Wan file: latent frames of the first chunk [1]",
    )
    add("--chunk_t", type=int, metavar="N", help="causal Wan file: of later chunks [1]")
    add(
        "--context_from_last_step",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="causal: noisy context",
    )
    add(
        "--context_from_last_step_start_chunk",
        type=int,
        metavar="N",
        help="causal: first chunk that leaves it [0]",
    )
    add(
        "--ignore_recipe",
        action="store_true",
        help="sample even where the checkpoint was not trained for it",
    )
    add = parser.add_argument_group("machine").add_argument
    add(
        "--cp_size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that make one video together; other groups take other prompts [1]",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--precision", help=f"[that of the training run; Wan fast of {', '.join(PRECISIONS)}]")
    add("--vae_precision", choices=tuple(VAE_DTYPES), default="bf16", help="[%(default)s]")
    add("--attention", choices=tuple(BACKENDS), default="auto", help="[%(default)s]")


def output_name(flags: argparse.Namespace) -> str:
    """Name of the folder of videos when none is given. Step schedules are not in it; runs that
    differ in them need --output_dir.
    """
    stem = (
        Path(flags.dit_path).stem if Path(flags.dit_path).is_file() else Path(flags.dit_path).name
    )
    if _describes_itself(flags.dit_path):
        how = "as_trained" if flags.num_steps is None else f"{flags.num_steps}steps"
    elif flags.distilled:
        how = f"distilled_{_or(flags.num_steps, FEW_STEPS)}steps"
    else:
        shift, steps = _or(flags.timestep_shift, 5.0), _or(flags.num_steps, MANY_STEPS)
        how = f"cfg{_or(flags.guidance_scale, 5.0)}_shift{shift}_{steps}steps"
    arch = "i2v" if flags.suite == "i2v" else flags.arch or "described"
    return f"videos_{arch}_{how}_{stem}_seed{flags.seed}"


def open_sampler(flags: argparse.Namespace, *, device: torch.device) -> VideoSampler:
    """The sampler of the flags. Collective over the ranks that make a video together. Raises
    `ConfigError` and `CheckpointError` for flags that the model has no use for, and files that are
    missing or do not fit.
    """
    if flags.fps is not None and not 0 < flags.fps < math.inf:
        raise ConfigError(f"--fps {flags.fps:g} must be positive and finite")
    if not Path(flags.dit_path).exists():
        raise CheckpointError(f"--dit_path {flags.dit_path} does not exist")
    if _describes_itself(flags.dit_path):
        return _described(flags, device)
    if flags.arch is None and flags.suite == "t2v":
        raise ConfigError(
            f"{flags.dit_path} does not describe itself; say --arch bidirectional or --arch causal"
        )
    return (
        _bidirectional(flags, device) if flags.arch == "bidirectional" else _causal(flags, device)
    )


def _describes_itself(path: str) -> bool:
    found = describe(path) if Path(path).exists() else None
    return found is not None and bool(found.extra.get("recipe") or found.extra.get("sampler"))


def _described(flags: argparse.Namespace, device: torch.device) -> DescribedSampler:
    without_use = ("distilled", "mid_t", "negative_prompt", "first_chunk_t", "chunk_t", "size")
    used = [f"--{name}" for name in without_use if getattr(flags, name)]
    if used:
        raise ConfigError(
            f"{flags.dit_path} describes itself, so {', '.join(used)} would have no effect; leave"
            " out what is not needed"
        )
    if flags.cp_size > 1:
        raise ConfigError(
            f"--cp_size {flags.cp_size}: a checkpoint that describes itself is sampled on one rank;"
            " leave it out"
        )
    files = PieceFiles(
        vae=flags.vae_path,
        text_encoder=flags.text_encoder_path,
        tokenizer=flags.tokenizer_path,
        text_cache=flags.text_cache,
    )
    model = open_checkpoint(
        flags.dit_path,
        weights=flags.weights,
        device=device,
        precision=flags.precision,
        attention=flags.attention,
        files=files,
    )
    kind = "bidirectional" if model.recipe is None else "causal"
    if flags.arch not in (None, kind):
        raise ConfigError(
            f"--arch {flags.arch}: {flags.dit_path} is {kind} (stage {model.description.stage});"
            " leave --arch out"
        )
    return DescribedSampler(
        model,
        weights=flags.weights,
        recipe=chosen_recipe(flags, model.trained_recipe),
        num_frames=flags.num_frames,
        fps=flags.fps,
        ignore_recipe=flags.ignore_recipe,
    )


def _bidirectional(flags: argparse.Namespace, device: torch.device) -> WanSampler:
    used = [
        f"--{name}"
        for name in (*_CAUSAL_ONLY, "context_from_last_step_start_chunk")
        if getattr(flags, name) is not None
    ]
    if used:
        raise ConfigError(f"{', '.join(used)} belong to --arch causal; leave them out")
    if flags.suite == "i2v":
        raise ConfigError(
            "the image-to-video suite is sampled from causal networks and checkpoints that describe"
            " themselves"
        )
    size, frames = frame_size(flags, None), _or(flags.num_frames, 81)
    latent_frames(frames, stride=TEMPORAL_STRIDE)
    numerics = _wan_flags(flags, device)
    networks = (NetworkFile("--dit_path", flags.dit_path),)
    check_files(
        numerics,
        networks,
        family="rcm" if flags.distilled else "diffusion",
        task=Task(LATENT_CHANNELS),
    )
    pipeline = build_pipeline(numerics, networks, clock=PartClock(device), size=size)
    return WanSampler(
        pipeline,
        recipe=_whole_recipe(flags),
        size=size,
        num_frames=frames,
        files={"--dit_path": flags.dit_path},
        about={
            "precision": numerics.precision,
            "vae_precision": flags.vae_precision,
            "weights": flags.weights,
        },
        fps=_or(flags.fps, 16.0),
        negative_prompt=flags.negative_prompt,
    )


def _causal(flags: argparse.Namespace, device: torch.device) -> CausalSampler:
    size, frames = (
        frame_size(flags, None),
        latent_frames(_or(flags.num_frames, 81), stride=TEMPORAL_STRIDE),
    )
    recipe = _causal_recipe(flags)
    numerics = _wan_flags(flags, device)
    check_files(
        numerics,
        (NetworkFile("--dit_path", flags.dit_path),),
        family="rcm",
        task=Task(LATENT_CHANNELS),
    )
    choice = PRECISIONS[numerics.precision]
    denoiser = load_wan(
        flags.dit_path,
        expect=None if flags.model_size == "auto" else flags.model_size,
        weights=numerics.weights,
        device=device,
        precision=Precision.preset(choice.precision),
        attention=flags.attention,
    )
    denoiser.net.set_fused(choice.fused)
    return CausalSampler(
        share_tokens(denoiser, tokens_per_frame=size.height * size.width // 256),
        text=UMT5TextEncoder.from_files(
            numerics.text_encoder_path,
            tokenizer=flags.tokenizer_path,
            device=device,
            cache=flags.text_cache,
        ),
        codec=WanVAECodec.from_file(
            numerics.vae_path, device=device, dtype=VAE_DTYPES[flags.vae_precision]
        ),
        recipe=recipe,
        latent_shape=(
            LATENT_CHANNELS,
            frames,
            size.height // SPATIAL_STRIDE,
            size.width // SPATIAL_STRIDE,
        ),
        negative_prompt=flags.negative_prompt,
        file=flags.dit_path,
        about={
            "precision": numerics.precision,
            "vae_precision": flags.vae_precision,
            "weights": flags.weights,
        },
        device=device,
        fps=_or(flags.fps, 16.0),
    )


def _wan_flags(flags: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The flags as the Wan commands know them."""
    if flags.precision is not None and flags.precision not in PRECISIONS:
        raise ConfigError(
            f"--precision {flags.precision} is not one of a Wan file's, which are"
            f" {', '.join(PRECISIONS)}"
        )
    if flags.cp_size > 1 and num_ranks() != flags.cp_size:
        raise ConfigError(
            f"--cp_size {flags.cp_size} needs torchrun with a multiple of {flags.cp_size} ranks"
        )
    known = vars(flags) | {
        "precision": flags.precision or "fast",
        "vae_path": flags.vae_path or VAE_PATH,
        "text_encoder_path": flags.text_encoder_path or TEXT_ENCODER_PATH,
        "weights": "live" if flags.weights == "reg" else flags.weights,
        "device": str(device),
        "compile": False,
        "offload": "idle",
        "warmup_iters": 0,
        "vae_tile": None,
        "random_weights": False,
    }
    return argparse.Namespace(**known)


def _whole_recipe(flags: argparse.Namespace) -> WholeVideoRecipe:
    sigma = _or(flags.sigma_max, 1600.0)
    if flags.distilled:
        _refuse_guidance(flags)
        return WholeVideoRecipe(
            "rcm_few_step", sigma_max=sigma, steps=_or(flags.num_steps, FEW_STEPS)
        )
    shift, guidance = _or(flags.timestep_shift, 5.0), _or(flags.guidance_scale, 5.0)
    check_guided(shift=shift, guidance=guidance)
    return WholeVideoRecipe(
        "ode",
        sigma_max=sigma,
        steps=_or(flags.num_steps, MANY_STEPS),
        shift=shift,
        guidance=guidance,
        solver="euler",
    )


def _causal_recipe(flags: argparse.Namespace) -> SamplingRecipe:
    first, later = _or(flags.first_chunk_t, 1), _or(flags.chunk_t, 1)
    pattern, sigma = f"c{first}-{later}", _or(flags.sigma_max, 1600.0)
    if not flags.distilled:
        few = (
            "steps_per_chunk",
            "mid_t",
            "mid_t_schedules",
            "context_from_last_step",
            "context_from_last_step_start_chunk",
        )
        used = [f"--{name}" for name in few if getattr(flags, name) is not None]
        if used:
            raise ConfigError(f"{', '.join(used)} belong to few-step sampling; add --distilled")
        shift, guidance = _or(flags.timestep_shift, 5.0), _or(flags.guidance_scale, 5.0)
        check_guided(shift=shift, guidance=guidance)
        steps = _or(flags.num_steps, MANY_STEPS)
        return SamplingRecipe(
            "ode", pattern, sigma_max=sigma, ode_steps=steps, shift=shift, guidance=guidance
        )
    _refuse_guidance(flags)
    if flags.mid_t_schedules is not None and flags.steps_per_chunk is None:
        raise ConfigError(
            "--mid_t_schedules needs --steps_per_chunk with one step count per schedule"
        )
    if flags.num_steps is not None and flags.steps_per_chunk is not None:
        raise ConfigError(
            "--num_steps and --steps_per_chunk both set the number of steps; give one of them"
        )
    start = flags.context_from_last_step_start_chunk
    if start is not None and not flags.context_from_last_step:
        raise ConfigError(
            "--context_from_last_step_start_chunk has no effect with clean context; add"
            " --context_from_last_step"
        )
    steps: Sequence[int] = flags.steps_per_chunk or [_or(flags.num_steps, FEW_STEPS)]
    schedule = StepSchedule.from_lists(
        steps=steps,
        schedules=() if flags.mid_t_schedules is None else parse_schedules(flags.mid_t_schedules),
        default_mids=CAUSAL_MID_TIMES if flags.mid_t is None else parse_times(flags.mid_t),
        knob="--steps_per_chunk" if flags.steps_per_chunk else "--num_steps",
    )
    return SamplingRecipe(
        "few_step",
        pattern,
        mids=schedule.mids,
        sigma_max=sigma,
        noisy_context=bool(flags.context_from_last_step),
        noisy_context_start_chunk=start or 0,
    )


def _refuse_guidance(flags: argparse.Namespace) -> None:
    used = [
        f"--{name}"
        for name in ("guidance_scale", "timestep_shift", "negative_prompt")
        if getattr(flags, name) is not None
    ]
    if used:
        raise ConfigError(
            f"{', '.join(used)} belong to sampling without --distilled; leave them out"
        )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
