"""Flags of the commands that sample Wan's bidirectional networks; what differs between them is
passed in. docs/reference/sampling.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.inference.flag_table import add_flags
from rcm.nets.attention import BACKENDS
from rcm.pipelines.adapted_weights import LoRA
from rcm.pipelines.residency import POLICIES
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_sizes import SIZES

FOLDER = "assets/checkpoints"
VAE_PATH = f"{FOLDER}/Wan2.1_VAE.pth"
TEXT_ENCODER_PATH = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"

PROMPT = (
    "A stylish woman walks down a Tokyo street filled with warm glowing neon and animated city"
    " signage. She wears a black leather jacket, a long red dress, and black boots, and carries a"
    " black purse. She wears sunglasses and red lipstick. She walks confidently and casually. The"
    " street is damp and reflective, creating a mirror effect of the colorful lights. Many"
    " pedestrians walk about."
)
"""The prompt of the released scripts."""

PUBLISHED = {
    "--vae_path": "Wan2.1_VAE.pth (0.5 GB) of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B",
    "--tiny_decoder": "taew2_1.pth of github.com/madebyollin/taehv",
    "--text_encoder_path": (
        "models_t5_umt5-xxl-enc-bf16.pth (11.4 GB) of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B"
    ),
    "rcm --dit_path": (
        "rCM_Wan2.1_T2V_1.3B_480p.pt and its 14B and 720p relatives,"
        " huggingface.co/worstcoder/rcm-Wan"
    ),
    "diffusion --dit_path": (
        "Wan2.1-T2V-1.3B.pth and Wan2.1-T2V-14B.pth, huggingface.co/worstcoder/Wan, or the folder"
        " of huggingface.co/Wan-AI/Wan2.1-T2V-14B"
    ),
    "causal --dit_path": (
        "Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-sCM-init_SF-DMD_c3-3_step4.pt and its relatives, "
        "huggingface.co/worstcoder/rcm-Wan"
    ),
    "diffusion i2v --dit_path": (
        "the folder of huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P (or -720P, or"
        " Wan2.1-FLF2V-14B-720P)"
    ),
    "--clip_path": (
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (4.8 GB) of"
        " huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P"
    ),
    "rcm --high_noise_model_path": (
        "Wan2.2-I2V-A14B-high-rCM-merged.pth, huggingface.co/worstcoder/rcm-Wan"
    ),
    "rcm --low_noise_model_path": (
        "Wan2.2-I2V-A14B-low-rCM-merged.pth, huggingface.co/worstcoder/rcm-Wan"
    ),
    "diffusion --high_noise_model_path": (
        "Wan2.2-I2V-A14B-high.pth, huggingface.co/worstcoder/Wan, or high_noise_model of "
        "huggingface.co/Wan-AI/Wan2.2-I2V-A14B"
    ),
    "diffusion --low_noise_model_path": (
        "Wan2.2-I2V-A14B-low.pth, huggingface.co/worstcoder/Wan, or low_noise_model of "
        "huggingface.co/Wan-AI/Wan2.2-I2V-A14B"
    ),
}
"""Where the files that a flag names are published."""


@dataclass(frozen=True)
class Numerics:
    """A choice of --precision: a preset of `Precision`, and where the fused elementwise kernels
    run.
    """

    precision: str
    fused: str = "auto"


PRECISIONS = {
    "bf16": Numerics("bf16"),
    "bf16_exact": Numerics("bf16", fused="off"),
    "bf16_fp32_time": Numerics("bf16_fp32_time"),
    "fp32": Numerics("fp32", fused="off"),
    "fast": Numerics("bf16"),
    "exact": Numerics("bf16", fused="off"),
}
"""The names of `Precision.preset`, as in every command, and two of fused kernels. bf16 (or fast):
bf16 weights and activations, float32 time, modulation and head, timestep rounded to bf16 as in
training; fused kernels on CUDA round less often. bf16_exact (or exact): the same, every rounding
where the release has it. bf16_fp32_time: bf16, the timestep not rounded. fp32: everything in
float32.
"""


@dataclass(frozen=True)
class NetworkFile:
    """A network that a command needs: the flag that names it, its path, the RF time down to which
    it is in charge, low-rank updates.
    """

    flag: str
    path: str
    down_to: float = 0.0
    loras: tuple[LoRA, ...] = ()

    @property
    def name(self) -> str:
        """dit, high_noise_model or low_noise_model."""
        return self.flag.removeprefix("--").removesuffix("_path")


def wan_parser(name: str, *, about: str | None) -> Arguments:
    """An empty parser for `python -m rcm.inference.NAME`."""
    return Arguments(
        prog=f"python -m rcm.inference.{name}",
        allow_abbrev=False,
        description=about,
        epilog=(
            "docs/inference.md says which files to fetch, and what to do on small cards and with"
            " several GPUs."
        ),
    )


_VIDEO = """
model_size str      auto (an addition): whatever the file holds [%(default)s]
prompt TEXT
allow_empty_prompt   sample an empty prompt, the unconditional one
num_samples N        videos of the prompt, side by side [%(default)s]
num_frames N         pixel frames, 4n + 1 [%(default)s]
resolution NAME
aspect_ratio W:H = 16:9
size HxW             pixels, multiples of 16, instead of the table (an addition)
seed int = 0         of the noise [%(default)s]
save_path FILE.mp4 = outputs/generated_video.mp4  [%(default)s]
fps float = 16.0     frames per second of the file [%(default)g]
preview_grid FILE.png  also a contact sheet of frames
report FILE.json     settings, seconds and peak memory per part as JSON
"""
_FEW_STEPS = """
num_steps int = 4  sampling steps [%(default)s]
sigma_max float   noise level of the first step; 1600: less diverse, perhaps better [%(default)g]
"""
_MANY_STEPS = """
num_steps N = 50              sampling steps [%(default)s]
sigma_max int = 5000          noise level of the first step [%(default)s]
sampler Euler|UniPC = UniPC   [%(default)s]
guidance_scale float = 5.0    classifier-free guidance; 1 or less: none, and half the work
  [%(default)g]
timestep_shift float
negative_prompt TEXT          [Wan's own, in Chinese]
"""
_IMAGE = """
image_path FILE       the first frame [required]
adaptive_resolution   keep the image's shape, with about the pixels of the table's size
"""
_BOUNDARY = """
boundary float = 0.9  time at which the low-noise expert takes over [%(default)g]
"""
_MERGED = "merge a low-rank update; may be repeated"
_FILES = f"""
vae_path PATH = {VAE_PATH}                    [%(default)s]
text_encoder_path PATH = {TEXT_ENCODER_PATH}  [%(default)s]
tokenizer_path DIR         folder of google/umt5-xxl's files [beside the text encoder]
text_cache DIR             folder that keeps prompt embeddings; if it has every prompt, the text
  encoder is not read
weights ema|live = ema     averaged weights (the only ones in most files) or live ones [%(default)s]
"""
_MACHINE = """
device str = cuda              cuda or cpu [%(default)s]
precision str = bf16           of the networks; see docs/inference.md [%(default)s]
vae_precision bf16|fp32 = bf16  of the VAE [%(default)s]
attention str = auto           attention back end; see docs/extending.md [%(default)s]
compile                        compile the blocks (one GPU): slow first step, faster later ones
offload str = idle             which models leave the GPU when done; see docs/inference.md
  [%(default)s]
low_memory                     the same as --offload low
vae_tile N                     decode in tiles of N x N pixels [whole frames]
warmup_iters N = 0             untimed videos before the one that is written [%(default)s]
random_weights                 RANDOM weights instead of files, to measure time and memory; the
  video is meaningless
"""


READ: tuple[str, ...] = (
    "dit_path",
    "lora",
    "weights",
    "vae_path",
    "text_encoder_path",
    "tokenizer_path",
)
READ += ("text_cache", "clip_path", "high_noise_model_path", "high_noise_lora")
READ += ("low_noise_model_path", "low_noise_lora")
"""Flags of files, which random weights leave unread."""


def add_video_flags(
    parser: Arguments,
    *,
    sizes: Sequence[str] = ("1.3B", "14B"),
    size: str | None = None,
    num_samples: int = 1,
    num_frames: int = 81,
    resolution: str = "480p",
    prompt: str | None = PROMPT,
) -> None:
    """What to make, of what; `size` None: the first of `sizes`; `prompt` None makes it required."""
    needed = {"required": True, "help": "[required]"}
    add_flags(
        parser.add_argument_group("video"),
        _VIDEO,
        model_size={"choices": (*sizes, "auto"), "default": size or sizes[0]},
        prompt=needed if prompt is None else {"default": prompt, "help": "[a walk in Tokyo]"},
        num_samples={"default": num_samples},
        num_frames={"default": num_frames},
        resolution={"default": resolution, "help": f"{', '.join(SIZES)} [%(default)s]"},
        aspect_ratio={"help": f"{', '.join(SIZES['480p'])} [16:9]"},
    )
    parser.idle("resolution", "aspect_ratio", beside="size", refuse=False)


def add_few_step_flags(parser: argparse.ArgumentParser, *, sigma_max: float) -> None:
    """Few-step sampling."""
    add_flags(
        parser.add_argument_group("sampling"),
        _FEW_STEPS,
        num_steps={"choices": (1, 2, 3, 4)},
        sigma_max={"default": sigma_max},
    )


def add_many_step_flags(
    parser: Arguments,
    *,
    negative_prompt: str | None = NEGATIVE_PROMPT,
    timestep_shift: float | None = 5.0,
) -> None:
    """Many-step sampling with guidance; a default of None is chosen by the command."""
    told = "Wan's own" if timestep_shift is None else f"{timestep_shift:g}"
    add_flags(
        parser.add_argument_group("sampling"),
        _MANY_STEPS,
        timestep_shift={"default": timestep_shift, "help": f"[{told}]"},
        negative_prompt={"default": negative_prompt},
    )
    unguided(parser)


def unguided(parser: Arguments) -> None:
    """A negative prompt belongs to guidance."""
    parser.idle(
        "negative_prompt",
        beside="guidance_scale",
        when=lambda flags: flags.guidance_scale is not None and flags.guidance_scale <= 1,
        refuse=False,
    )


def add_image_flags(parser: argparse.ArgumentParser, *, experts: bool = True) -> None:
    """The first frame, and with two `experts` (Wan2.2) when the second takes over."""
    table = _IMAGE + (_BOUNDARY if experts else "")
    add_flags(parser.add_argument_group("image"), table, image_path={"required": True})


def add_single_network_flags(parser: argparse.ArgumentParser, *, dit_path: str) -> None:
    """One network."""
    told = f"any format that scripts.checkpoint understands [{dit_path or 'required'}]"
    add_flags(
        parser.add_argument_group("networks"),
        "dit_path PATH\nlora PATH[=SCALE]",
        dit_path={"default": dit_path, "help": told},
        lora={"action": "append", "default": [], "help": _MERGED},
    )


def add_expert_flags(parser: argparse.ArgumentParser, *, high: str, low: str) -> None:
    """Two experts."""
    group = parser.add_argument_group("networks")
    for name, path in (("high", high), ("low", low)):
        model, lora = f"{name}_noise_model_path", f"{name}_noise_lora"
        changes: dict[str, dict[str, Any]] = {
            model: {"default": path, "help": f"[{path}]"},
            lora: {"action": "append", "default": [], "help": _MERGED},
        }
        add_flags(group, f"{model} PATH\n{lora} PATH[=SCALE]", **changes)


def add_machine_flags(parser: Arguments) -> None:
    """Files that all commands share, and how to use the machine; after the flags of networks."""
    add_flags(parser.add_argument_group("other files"), _FILES)
    add_flags(
        parser.add_argument_group("machine"),
        _MACHINE,
        precision={"choices": tuple(PRECISIONS)},
        attention={"choices": tuple(BACKENDS)},
        offload={"choices": tuple(POLICIES)},
        low_memory={"dest": "offload", "action": "store_const", "const": "low"},
    )
    parser.idle("offload", beside="low_memory", refuse=False)
    parser.idle(
        *(name for name in READ if name in parser.names),
        beside="random_weights",
        # without a size nothing can be made, which is said first
        when=lambda flags: flags.random_weights and flags.model_size != "auto",
        refuse=False,
    )


def many_step_recipe(flags: argparse.Namespace) -> WholeVideoRecipe:
    """How a many-step command samples; its numbers are checked."""
    return WholeVideoRecipe(
        "ode",
        sigma_max=flags.sigma_max,
        steps=flags.num_steps,
        shift=flags.timestep_shift,
        guidance=flags.guidance_scale,
        solver=flags.sampler.lower(),
    )


def lora_of(text: str) -> LoRA:
    """A low-rank update from "PATH" or "PATH=SCALE"; `ConfigError` for a scale that is no
    number.
    """
    path, sign, scale = text.rpartition("=")
    if not sign or Path(text).exists():
        return LoRA(text)
    try:
        return LoRA(path, scale=float(scale))
    except ValueError as error:
        raise ConfigError(
            f"--lora {text}: {scale!r} after = is no number; write PATH or PATH=SCALE"
        ) from error


def single_network(flags: argparse.Namespace) -> tuple[NetworkFile, ...]:
    """The network of a text-to-video command."""
    return (NetworkFile("--dit_path", flags.dit_path, loras=tuple(map(lora_of, flags.lora))),)


def experts(flags: argparse.Namespace) -> tuple[NetworkFile, ...]:
    """The experts of an image-to-video command."""
    return tuple(
        NetworkFile(
            f"--{name}_noise_model_path",
            getattr(flags, f"{name}_noise_model_path"),
            down_to,
            tuple(map(lora_of, getattr(flags, f"{name}_noise_lora"))),
        )
        for name, down_to in (("high", flags.boundary), ("low", 0.0))
    )
