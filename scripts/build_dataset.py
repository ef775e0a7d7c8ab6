"""Build training shards (webdataset layout: latent.pt, embed.pt, prompt.txt) from the toy world,
from a folder of mp4 files, or by sampling a teacher over a list of prompts.

    python -m scripts.build_dataset --source toy --num 2048 --out DIR
    python -m scripts.build_dataset --source videos --input FOLDER --size 32x32 --frames 17 --out \\
        DIR
    python -m scripts.build_dataset --source videos --codec wan_vae --input FOLDER --size 480x832 \\
        --frames 81 --out DIR
    torchrun --nproc_per_node=8 -m scripts.build_dataset --source teacher --prompts prompts.txt \\
        --num_samples 250000 --out DIR
    python -m scripts.build_dataset --source teacher --teacher outputs/.../toy_bidirectional \\
        --prompts prompts.txt --out DIR

The same command continues a stopped build, on any number of ranks. A clip's caption is the text
file beside it, else its file name. Words in a flag may be joined by - or by _.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rcm.core.arguments import Arguments, one_of
from rcm.core.errors import CheckpointError, ConfigError, PeerGone
from rcm.core.output_file import require_folder
from rcm.data.latents import LatentShards
from rcm.data.shard_writer import ShardSample, build_shards
from rcm.data.tar_index import ShardError
from rcm.encoders.codec import LatentCodec, latent_frames
from rcm.encoders.text_protocol import TextEncoder
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_weights import WAN_VAE_FILE
from rcm.inference.flag_table import add_flags, both_spellings
from rcm.inference.outcome import check_device, command
from rcm.parallel.agree import sentence
from rcm.pipelines.clip_folder import find_clips, plan_windows, read_windows
from rcm.pipelines.video_io import VideoError
from rcm.pipelines.wan_sizes import written_size
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_text import ToyTextEncoder
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig
from scripts.teacher_source import (
    WAN_TEMPORAL_STRIDE,
    add_teacher_flags,
    build_from_teacher,
    umt5_of,
)
from scripts.view_shards import CODECS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ENCODE_BATCH = 64
_TOY_NUM, _TOY_SIZE, _TOY_FRAMES = 2048, (8, 8), 17
_MOST_TOY_PIXELS = 1 << 22


# torchrun takes --num for its own --numa-binding, wherever it stands
_FLAGS = f"""
source toy|videos|teacher = toy  where videos come from [%(default)s]
out str                 folder of the shards
num,num-samples int     toy: number of videos [2048]; teacher: number of samples, repeating prompts
  with other noise [one per prompt]
shard-size int = 256    samples per shard [%(default)s]
seed int = 0            toy: seed of the scenes; teacher: seed of sample 0, sample i has seed + i
size HxW                pixels of a frame [8x8; teacher: the checkpoint's, or --resolution]
frames int              pixel frames of a sample [17; teacher: the checkpoint's, or 81]
num-shapes int = 1      toy: shapes per video [%(default)s]
turns int = 0           toy: changes of direction per video [%(default)s]
boundary wrap|bounce = wrap  toy: what shapes do at the border [%(default)s]
empty-prompts FRACTION = 0.0  toy: share of samples stored with an empty caption
input str               videos: folder of mp4 files
frame-stride int = 1    videos: take every N-th frame of a clip [%(default)s]
hop int                 videos: frames between the starts of two samples of a clip [end to end]
skip-bad-clips          videos: skip unreadable or short clips with a warning
codec {"|".join((*CODECS, "wan_vae"))}  toy, natural: scalings of the toy codec; wan_vae: Wan's VAE
  and umT5 [toy for toy videos, natural for real ones]
temporal-stride int = 2  toy codec: frames per latent frame, as model.config.tokenizer
spatial-stride int = 2  toy codec: pixels per latent cell, as model.config.tokenizer
text-len int = 8        rows of a text embedding, end token included
text-dim int = 64       width of a text embedding
dtype {"|".join(DTYPES)} = bf16  stored number format
vae-path str            weights of Wan's VAE [assets/checkpoints/Wan2.1_VAE.pth]
"""


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "HEIGHTxWIDTH"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 16x16")
    return int(parts[0]), int(parts[1])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="scripts.build_dataset", description=__doc__)

    paths = {name: {"type": Path} for name in ("out", "input", "vae_path")}
    add_flags(
        parser,
        both_spellings(_FLAGS),
        size={"type": parse_size},
        empty_prompts={"type": float},
        **paths,
    )
    add_teacher_flags(parser)
    _refuse_idle(parser)
    return parser.parse_args(argv)


_TOY_ONLY = ("num_shapes", "turns", "boundary", "empty_prompts")
_CLIPS_ONLY = ("input", "frame_stride", "hop", "skip_bad_clips")
_TEACHER_ONLY = (
    "prompts",
    "skip_bad_prompts",
    "max_prompt_chars",
    "teacher",
    "weights",
    "dit_path",
)
_TEACHER_ONLY += ("model_size", "resolution", "aspect_ratio", "num_steps", "timestep_shift")
_TEACHER_ONLY += ("guidance_scale", "sigma_max", "batch", "precision", "attention")
_TEACHER_ONLY += ("context_parallel_size", "write_negative_embedding")
_TOY_CODEC = ("temporal_stride", "spatial_stride", "text_len", "text_dim")
_UMT5 = ("text_encoder_path", "tokenizer_path", "text_cache", "random_weights")


def _refuse_idle(parser: Arguments) -> None:
    """What belongs to another source."""
    for source, flags in {
        "toy": (*_CLIPS_ONLY, *_TEACHER_ONLY, *_UMT5, "device"),
        "videos": (*_TOY_ONLY, *_TEACHER_ONLY, "seed"),
        "teacher": (*_TOY_ONLY, *_CLIPS_ONLY, *_TOY_CODEC, "codec"),
    }.items():
        parser.idle(*flags, beside="source", when=one_of("source", source))

    def encodes_itself(flags: argparse.Namespace) -> bool:
        return flags.source == "videos" and flags.codec != "wan_vae"

    parser.idle(*_UMT5, "device", "vae_path", beside="codec", when=encodes_itself)
    parser.idle(*_TOY_CODEC, beside="codec", when=one_of("codec", "wan_vae"))
    read = ("dit_path", "weights", "text_encoder_path", "tokenizer_path", "text_cache")
    parser.idle(
        *read,
        beside="random_weights",
        # a size is asked for first
        when=lambda flags: flags.random_weights and flags.model_size != "auto",
    )


def toy_samples(
    options: argparse.Namespace, codec: ToyCodec, text: ToyTextEncoder, start: int, stop: int
) -> Iterator[ShardSample]:
    """Scenes `start` .. `stop - 1` as samples; sample i is captionless when i's place in the stride
    of FRACTION says so.
    """
    world, dtype = toy_world(options), DTYPES[options.dtype]
    for first in range(start, stop, _ENCODE_BATCH):
        scenes = world.scenes(min(_ENCODE_BATCH, stop - first), seed=options.seed, first=first)
        prompts = [
            "" if int((i + 1) * options.empty_prompts) > int(i * options.empty_prompts) else caption
            for i, caption in enumerate(world.captions(scenes), first)
        ]
        latents, embeddings = (
            codec.encode(world.render(scenes)).to(dtype),
            text.encode(prompts).to(dtype),
        )
        yield from map(ShardSample, latents, embeddings, prompts)


def toy_world(options: argparse.Namespace) -> ToyWorld:
    """The world the options describe."""
    height, width = options.size
    if options.frames * height * width > _MOST_TOY_PIXELS:
        most = f"the toy world makes {_MOST_TOY_PIXELS} pixels a video at most"
        raise ConfigError(f"--frames {options.frames} of --size {height}x{width}: {most}")
    config = ToyWorldConfig.at_size(height, width, num_frames=options.frames)
    return ToyWorld(
        replace(
            config, num_shapes=options.num_shapes, turns=options.turns, boundary=options.boundary
        )
    )


def codec_name(options: argparse.Namespace) -> str:
    """The codec asked for, else the one that fits the source."""
    return options.codec or ("natural" if options.source == "videos" else "toy")


def toy_codec(options: argparse.Namespace) -> ToyCodec:
    """The codec of the options' strides."""
    return ToyCodec(temporal_stride=options.temporal_stride, spatial_stride=options.spatial_stride)


def build(options: argparse.Namespace) -> list[Path]:
    """Build the shards the options ask for; returns their paths."""
    if options.out is None and not (
        options.source == "teacher" and options.write_negative_embedding
    ):
        raise ConfigError("--out FOLDER is needed to build a data set")
    if options.out is not None:
        require_folder(options.out, f"--out {options.out}")
    if options.source == "teacher":
        return build_from_teacher(options, dtype=DTYPES[options.dtype])
    options.size, options.frames = (
        options.size or _TOY_SIZE,
        (options.frames if options.frames is not None else _TOY_FRAMES),
    )
    if options.codec == "wan_vae" and options.source == "toy":
        raise ConfigError(
            "--codec wan_vae is for real videos (--source videos); the toy world has the codecs"
            " toy and natural"
        )
    return _build_toy(options) if options.source == "toy" else _build_clips(options)


@dataclass(frozen=True)
class Pieces:
    """Codec and text encoder of a build, the device the codec works on, and the manifest's words
    for all of them.
    """

    codec: LatentCodec
    text: TextEncoder
    device: torch.device
    recipe: dict[str, object]


def _pieces(options: argparse.Namespace) -> Pieces:
    """What the options ask for, seen to fit the frames. Wan's VAE is read only then."""
    if codec_name(options) == "wan_vae":
        latent_frames(options.frames, stride=WAN_TEMPORAL_STRIDE)
        written_size(f"{options.size[0]}x{options.size[1]}")
        name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(name)
        device = torch.device(name)
        codec: LatentCodec = WanVAECodec.from_file(options.vae_path or WAN_VAE_FILE, device=device)
        recipe: dict[str, object] = {"codec": {"name": "wan_vae"}, "text": {"name": "umt5"}}
        pieces = Pieces(codec, umt5_of(options, device), device, recipe)
    else:
        toy, words = (
            CODECS[codec_name(options)],
            ToyTextEncoder(text_len=options.text_len, text_dim=options.text_dim),
        )
        toy.latent_frames_for(options.frames)
        toy.latent_size(*options.size)
        recipe = {"codec": {"name": codec_name(options), **asdict(toy)}, "text": asdict(words)}
        pieces = Pieces(toy, words, torch.device("cpu"), recipe)
    pieces.recipe.update(source=options.source, dtype=options.dtype)
    return pieces


def _build_toy(options: argparse.Namespace) -> list[Path]:
    world, pieces = toy_world(options), _pieces(options)
    recipe = pieces.recipe | {
        "world": asdict(world.config),
        "seed": options.seed,
        "empty_prompts": options.empty_prompts,
    }
    return build_shards(
        options.out,
        num_samples=_TOY_NUM if options.num is None else options.num,
        shard_size=options.shard_size,
        recipe=recipe,
        make=lambda start, stop: toy_samples(options, pieces.codec, pieces.text, start, stop),
    )


def _build_clips(options: argparse.Namespace) -> list[Path]:
    if options.input is None:
        raise ConfigError("--source videos needs --input FOLDER of mp4 files")
    pieces = _pieces(options)
    windows = plan_windows(
        find_clips(options.input),
        num_frames=options.frames,
        stride=options.frame_stride,
        hop=options.hop,
        skip_bad=options.skip_bad_clips,
    )
    if options.num is not None:
        raise ConfigError(
            f"--num {options.num} has no effect with --source videos, which makes {len(windows)}"
            " samples of these clips; leave it out, or choose them by --hop and --frame-stride"
        )
    # the toy encoder refuses captions: hear of it before the first shard
    if not isinstance(pieces.text, UMT5TextEncoder):
        _embeddings(pieces.text, sorted({w.prompt for w in windows}))
    height, width = options.size
    places = [f"{w.clip.relative_to(options.input)}:{w.start}" for w in windows]
    recipe = pieces.recipe | {
        "windows": places,
        "size": [height, width],
        "frames": options.frames,
        "frame_stride": options.frame_stride,
    }

    def clip_samples(start: int, stop: int) -> Iterator[ShardSample]:
        chosen, dtype = windows[start:stop], DTYPES[options.dtype]
        embeddings = _embeddings(pieces.text, sorted({w.prompt for w in chosen}))
        for window, video in zip(
            chosen, read_windows(chosen, height=height, width=width), strict=True
        ):
            latents = pieces.codec.encode(video.unsqueeze(0).to(pieces.device))[0].to("cpu", dtype)
            yield ShardSample(latents, embeddings[window.prompt].to(dtype), window.prompt)

    return build_shards(
        options.out,
        num_samples=len(windows),
        shard_size=options.shard_size,
        recipe=recipe,
        make=clip_samples,
    )


def _embeddings(text: TextEncoder, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Rows of every prompt on the CPU; umT5 is freed before the videos of a shard are encoded."""
    found = {prompt: text.encode([prompt])[0].cpu() for prompt in prompts}
    if isinstance(text, UMT5TextEncoder):
        text.unload()
    return found


@command(log="INFO")
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    try:
        if paths := build(options):
            print(
                f"{len(LatentShards(paths))} samples in {len(paths)} shards:"
                f" {options.out}/shard-*.tar"
            )
    except (ConfigError, CheckpointError, ShardError, VideoError, PeerGone, OSError) as error:
        print(sentence(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
