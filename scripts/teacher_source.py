"""`scripts.build_dataset --source teacher`: its flags, and the way from them to shards."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.core.output_file import OutputFile
from rcm.core.rng import require_seed
from rcm.data.prompt_list import MAX_PROMPT_CHARS, read_prompt_list
from rcm.encoders.codec import latent_frames, latent_grid
from rcm.encoders.text_protocol import TextEncoder
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.umt5_weights import UMT5_FILE
from rcm.inference.flag_table import add_flags, both_spellings
from rcm.inference.outcome import check_device, sparing
from rcm.parallel.agree import naming_lost_peers, on_first
from rcm.parallel.launch import launched_world, this_launch
from rcm.parallel.mesh import ParallelDims, process_group
from rcm.pipelines.described import PieceFiles, description_at, text_of
from rcm.pipelines.teacher_dataset import (
    Teacher,
    TeacherSampler,
    build_teacher_shards,
    described_teacher,
    wan_teacher,
    write_negative_embedding,
)
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_files import load_wan, random_wan
from rcm.pipelines.wan_sizes import SIZES, table_size, written_size
from rcm.worlds.toy_text import ToyTextEncoder

WAN_FRAMES, WAN_CHANNELS = 81, 16
WAN_TEMPORAL_STRIDE, WAN_SPATIAL_STRIDE = 4, 8
PROGRESS_SECONDS = 10.0


_FLAGS = f"""
prompts FILE            a prompt per line, or .csv / .jsonl with a prompt, caption or text column
skip_bad_prompts        skip empty or too long prompts with a warning
max_prompt_chars int = {MAX_PROMPT_CHARS}  longer prompts are refused [%(default)s]
teacher PATH            a self-describing checkpoint: job folder, iter_* folder or exported file
weights ema|reg = ema   averaged or last weights, where a file has both [%(default)s]
dit_path FILE           original or converted Wan weights
  [assets/checkpoints/Wan2.1-T2V-<model_size>.pth]
model_size 1.3B|14B|auto  network of --dit_path; auto: what the file holds [14B]
text_encoder_path FILE  umT5 weights [assets/checkpoints/models_t5_umt5-xxl-enc-bf16.pth]
tokenizer_path FOLDER   umT5's tokenizer [beside its weights]
text_cache FOLDER       folder that keeps text embeddings for later builds
random_weights          RANDOM network and text encoder of full size, to measure speed; the samples
  are useless as data
resolution {"|".join(SIZES)}  with --aspect_ratio: pixels [480p]
aspect_ratio {"|".join(SIZES["480p"])}  width to height [16:9]
num_steps int           Euler steps [100; the checkpoint's]
timestep_shift float    shift of the time grid [3; the checkpoint's]
guidance_scale float    classifier-free guidance; 1 or less: none [5; the checkpoint's]
sigma_max float         noise level of the first step [5000; the checkpoint's]
batch int = 1           samples computed together [%(default)s]
precision bf16|fp32|bf16_fp32_time|fp64  of the network [bf16; the checkpoint's]
attention str = auto    attention back end [%(default)s]
context_parallel_size int = 1  ranks that share each sample [%(default)s]
device str              cpu or cuda [cuda where there is one]
write_negative_embedding FILE  write the negative prompt's embedding [L, E]; without --out, only
  that
"""


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `--source teacher`, under both spellings."""
    group = parser.add_argument_group(
        "teacher",
        "Without --teacher: Wan2.1-14B at 480p, 81 frames, as the released data were made; with it,"
        " as the checkpoint says.",
    )

    files = ("prompts", "dit_path", "text_encoder_path", "text_cache", "write_negative_embedding")
    paths = {name: {"type": Path} for name in files}
    tokenizer = {"dest": "tokenizer", "type": Path}
    add_flags(group, both_spellings(_FLAGS), tokenizer_path=tokenizer, **paths)


def build_from_teacher(options: argparse.Namespace, *, dtype: torch.dtype) -> list[Path]:
    """Shards of the teacher's samples; returns those of this rank (none where only the negative
    embedding was asked for).
    """
    if options.teacher == "":
        raise ConfigError("--teacher names nothing; give a folder or a file, or leave it out")
    if options.write_negative_embedding is not None:
        knob = "--write_negative_embedding"
        sparing(OutputFile.claim(options.write_negative_embedding, knob=knob), options, knob=knob)
    if options.out is not None and options.prompts is None:
        raise ConfigError("--source teacher needs --prompts FILE")
    prompts = []
    if options.out is not None:
        prompts = read_prompt_list(
            options.prompts, skip_bad=options.skip_bad_prompts, max_chars=options.max_prompt_chars
        )
    num = len(prompts) if options.num is None else options.num
    require_seed(options.seed, knob="--seed", draws=num)
    with ExitStack() as stack:
        dims, device = _ranks(options, stack)
        if options.write_negative_embedding and dims.rank == 0:
            print(
                write_negative_embedding(
                    options.write_negative_embedding, _text_alone(options, device)
                ),
                flush=True,
            )
        if options.out is None:
            return []
        teacher = _teacher(options, device)
        _refuse_unencodable(teacher.text, prompts)
        sampler = TeacherSampler(
            teacher.over(dims),
            _recipe(options, teacher),
            prompts=prompts,
            seed=options.seed,
            dtype=dtype,
        )
        return build_teacher_shards(
            options.out,
            sampler,
            num=num,
            shard_size=options.shard_size,
            batch=options.batch,
            part=(dims.data_rank, dims.num_data_ranks),
            told=(
                Progress(label=f"rank {dims.rank}: " if dims.world_size > 1 else "")
                if dims.cp_rank == 0
                else lambda done, total: None
            ),
        )


class Progress:
    """A line of progress with the time left, at most every `every` seconds and at the end."""

    def __init__(self, *, label: str = "", every: float = PROGRESS_SECONDS) -> None:
        self.label, self.every = label, every
        self._begin = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` samples are made."""
        now = time.monotonic()
        if done < total and now - self._told < self.every:
            return
        self._told, each = now, (now - self._begin) / done
        left = each * (total - done)
        words = (
            f"{left / 3600:.1f} h"
            if left > 5400
            else f"{left / 60:.1f} min"
            if left > 90
            else f"{left:.0f} s"
        )
        print(f"{self.label}{done} of {total} samples, {each:.2f} s each, {words} left", flush=True)


def _ranks(options: argparse.Namespace, stack: ExitStack) -> tuple[_Ranks, torch.device]:
    """The launch's ranks and this rank's device. Without context parallelism ranks work alone, in
    no process group.
    """
    world, cp = launched_world(), options.context_parallel_size
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world % cp:
        raise ConfigError(
            f"--context_parallel_size={cp} must divide the {world} ranks of this launch"
        )
    check_device(kind)
    if cp == 1:
        device = this_launch().device(kind)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return _Ranks(dp_replicate=world, device_type=device.type), device
    device = stack.enter_context(process_group(kind))
    stack.enter_context(naming_lost_peers())
    return _Ranks(dp_replicate=world // cp, cp=cp, device_type=kind), device


class _Ranks(ParallelDims):
    """Dims that know their rank from the launcher, also where no process group exists."""

    @property
    def rank(self) -> int:
        """RANK of the environment; 0 without a launcher."""
        return this_launch().rank


def _recipe(options: argparse.Namespace, teacher: Teacher) -> WholeVideoRecipe:
    given = {
        "steps": options.num_steps,
        "shift": options.timestep_shift,
        "guidance": options.guidance_scale,
        "sigma_max": options.sigma_max,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return replace(teacher.recipe, **given)


def _teacher(options: argparse.Namespace, device: torch.device) -> Teacher:
    if options.teacher is not None:
        for flag in (
            "dit_path",
            "random_weights",
            "model_size",
            "size",
            "frames",
            "resolution",
            "aspect_ratio",
        ):
            if getattr(options, flag):
                raise ConfigError(
                    "--teacher describes its network and the shape of its samples; leave out"
                    f" --{flag}"
                )
        return described_teacher(
            options.teacher,
            weights=options.weights,
            device=device,
            precision=options.precision,
            attention=options.attention,
            files=_files(options),
        )
    asked, model_size = _size(options), options.model_size or "14B"
    height, width = written_size(f"{asked[0]}x{asked[1]}")
    frames = latent_frames(
        WAN_FRAMES if options.frames is None else options.frames, stride=WAN_TEMPORAL_STRIDE
    )
    shape = (WAN_CHANNELS, frames, *latent_grid(height, width, stride=WAN_SPATIAL_STRIDE))
    precision = Precision.preset(options.precision or "bf16")
    if model_size == "auto" and (options.dit_path is None or options.random_weights):
        raise ConfigError("--model_size auto reads the size off a file; give --dit_path FILE")
    if options.random_weights:
        print(
            "RANDOM WEIGHTS: these samples are noise, good for measuring speed only",
            file=sys.stderr,
            flush=True,
        )
        net = random_wan(
            model_size, device=device, precision=precision, attention=options.attention
        )
        return wan_teacher(
            net,
            umt5_of(options, device),
            latent_shape=shape,
            identity={"random_weights": model_size},
            device=device,
        )
    path = options.dit_path or Path(f"assets/checkpoints/Wan2.1-T2V-{model_size}.pth")
    on_first(lambda: _require_file(path))
    expect = None if model_size == "auto" else model_size
    net = load_wan(
        path,
        expect=expect,
        weights=options.weights,
        device=device,
        precision=precision,
        attention=options.attention,
    )
    identity = {"path": str(path.resolve()), "weights": options.weights, "model_size": model_size}
    return wan_teacher(
        net, umt5_of(options, device), latent_shape=shape, identity=identity, device=device
    )


def _require_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; name the teacher's file with --dit_path, or a checkpoint that"
            " describes itself with --teacher"
        )


def _size(options: argparse.Namespace) -> tuple[int, int]:
    """(height, width) by hand or from the table; `ConfigError` for both."""
    if options.size is None:
        return table_size(options.resolution or "480p", options.aspect_ratio or "16:9")
    if options.resolution or options.aspect_ratio:
        raise ConfigError(
            "--size and --resolution / --aspect_ratio both set the size; give one of them"
        )
    return options.size


def umt5_of(options: argparse.Namespace, device: torch.device) -> TextEncoder:
    """umT5 of the options, or rows of noise with --random_weights."""
    if options.random_weights:
        return UMT5TextEncoder.random(device=device)
    path = options.text_encoder_path or Path(UMT5_FILE)
    return UMT5TextEncoder.from_files(
        path, tokenizer=options.tokenizer, device=device, cache=options.text_cache
    )


def _text_alone(options: argparse.Namespace, device: torch.device) -> TextEncoder:
    """The text encoder without its network: of the described checkpoint, or umT5."""
    if options.teacher is None:
        return umt5_of(options, device)
    path = Path(options.teacher)
    return text_of(
        description_at(path).extra.get("text"), path, files=_files(options), device=device
    )


def _files(options: argparse.Namespace) -> PieceFiles:
    """Where the pieces of a described checkpoint of Wan latents are."""
    return PieceFiles(
        options.vae_path, options.text_encoder_path, options.tokenizer, options.text_cache
    )


def _refuse_unencodable(text: TextEncoder, prompts: list[str]) -> None:
    """Ask an encoder that refuses prompts (the toy world's) about all of them now, not in the
    middle of the work; umT5 cuts and warns.
    """
    if isinstance(text, ToyTextEncoder):
        for number, prompt in enumerate(prompts):
            try:
                text.encode([prompt])
            except ConfigError as error:
                raise ConfigError(f"prompt {number}: {error}") from error
