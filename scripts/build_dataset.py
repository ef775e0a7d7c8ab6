"""Build training shards (webdataset layout: latent.pt, embed.pt, prompt.txt) from the toy world or from a folder of mp4 files, or look
into a shard.

    python -m scripts.build_dataset --source toy --num 2048 --out DIR
    python -m scripts.build_dataset --source videos --input FOLDER --size 32x32 --frames 17 --out DIR
    python -m scripts.build_dataset --view DIR/shard-000000.tar --sheet sheet.png

A build that was stopped goes on where it was when the same command is given again. A clip's caption is the text file beside it, else its
file name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rcm.core.errors import ConfigError
from rcm.data.latents import LatentShards
from rcm.data.shard_writer import MANIFEST, ShardSample, build_shards
from rcm.data.tar_index import ShardError
from rcm.pipelines.clip_folder import find_clips, plan_windows, read_windows
from rcm.pipelines.video_io import VideoError, contact_sheet
from rcm.worlds.toy_codec import NATURAL, ToyCodec
from rcm.worlds.toy_text import ToyTextEncoder
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig

CODECS = {"toy": ToyCodec(), "natural": NATURAL}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ENCODE_BATCH = 64


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "HEIGHTxWIDTH"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 16x16")
    return int(parts[0]), int(parts[1])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts.build_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=("toy", "videos", "teacher"), default="toy", help="where videos come from")
    parser.add_argument("--out", type=Path, help="folder of the shards")
    parser.add_argument("--num", type=int, default=2048, help="toy: number of videos")
    parser.add_argument("--shard-size", type=int, default=256, help="samples per shard")
    parser.add_argument("--seed", type=int, default=0, help="toy: seed of the scenes")
    parser.add_argument("--size", type=parse_size, default=(8, 8), metavar="HxW", help="pixels of a frame")
    parser.add_argument("--frames", type=int, default=17, help="pixel frames of a sample")
    parser.add_argument("--num-shapes", type=int, default=1, help="toy: shapes per video")
    parser.add_argument("--turns", type=int, default=0, help="toy: changes of direction per video")
    parser.add_argument("--boundary", choices=("wrap", "bounce"), default="wrap", help="toy: what happens at the border")
    parser.add_argument(
        "--empty-prompts", type=float, default=0.0, metavar="FRACTION", help="toy: share of samples stored with an empty caption"
    )
    parser.add_argument("--input", type=Path, help="videos: folder of mp4 files")
    parser.add_argument("--frame-stride", type=int, default=1, help="videos: distance of the frames of a sample")
    parser.add_argument("--hop", type=int, help="videos: distance of two samples of a clip in frames (default: end to end)")
    parser.add_argument("--skip-bad-clips", action="store_true", help="videos: warn about unreadable or short clips and go on")
    parser.add_argument("--codec", choices=tuple(CODECS), help="latent scaling (default: toy for toy videos, natural for real ones)")
    parser.add_argument("--temporal-stride", type=int, default=2, help="toy codec: frames per latent frame, as model.config.tokenizer")
    parser.add_argument("--spatial-stride", type=int, default=2, help="toy codec: pixels per latent cell, as model.config.tokenizer")
    parser.add_argument("--text-len", type=int, default=8, help="rows of a text embedding, end token included")
    parser.add_argument("--text-dim", type=int, default=64, help="width of a text embedding")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="stored number format")
    parser.add_argument("--view", type=Path, metavar="SHARD", help="instead of building: draw the first samples of a shard")
    parser.add_argument("--sheet", type=Path, help="view: PNG to write")
    parser.add_argument("--rows", type=int, default=12, help="view: number of samples")
    return parser.parse_args(argv)


def toy_samples(options: argparse.Namespace, codec: ToyCodec, text: ToyTextEncoder, start: int, stop: int) -> Iterator[ShardSample]:
    """Scenes `start` .. `stop - 1` as samples; sample i is captionless when i's place in the stride of FRACTION says so."""
    world, dtype = toy_world(options), DTYPES[options.dtype]
    for first in range(start, stop, _ENCODE_BATCH):
        scenes = world.scenes(min(_ENCODE_BATCH, stop - first), seed=options.seed, first=first)
        prompts = [
            "" if int((i + 1) * options.empty_prompts) > int(i * options.empty_prompts) else caption
            for i, caption in enumerate(world.captions(scenes), first)
        ]
        latents, embeddings = codec.encode(world.render(scenes)).to(dtype), text.encode(prompts).to(dtype)
        yield from map(ShardSample, latents, embeddings, prompts)


def toy_world(options: argparse.Namespace) -> ToyWorld:
    """The world the options describe."""
    if not 0 <= options.empty_prompts <= 1:
        raise ConfigError(f"--empty-prompts={options.empty_prompts} is a share, choose it in [0, 1]")
    height, width = options.size
    config = ToyWorldConfig.at_size(height, width, num_frames=options.frames)
    return ToyWorld(replace(config, num_shapes=options.num_shapes, turns=options.turns, boundary=options.boundary))


def codec_name(options: argparse.Namespace) -> str:
    """The codec asked for, else the one that fits the source."""
    return options.codec or ("natural" if options.source == "videos" else "toy")


def toy_codec(options: argparse.Namespace) -> ToyCodec:
    """The codec of the options' strides."""
    return ToyCodec(temporal_stride=options.temporal_stride, spatial_stride=options.spatial_stride)


def build(options: argparse.Namespace) -> list[Path]:
    """Build the shards the options ask for; returns their paths."""
    if options.out is None:
        raise ConfigError("--out FOLDER is needed to build a data set")
    if options.source == "teacher":
        raise ConfigError("--source teacher (videos sampled from a teacher network) is not built yet; choose --source toy or videos")
    codec = CODECS[codec_name(options)]
    text = ToyTextEncoder(text_len=options.text_len, text_dim=options.text_dim)
    codec.latent_frames_for(options.frames)
    codec.latent_size(*options.size)
    recipe: dict[str, object] = {
        "source": options.source,
        "codec": {"name": codec_name(options), **asdict(codec)},
        "text": asdict(text),
        "dtype": options.dtype,
    }
    if options.source == "toy":
        recipe |= {"world": asdict(toy_world(options).config), "seed": options.seed, "empty_prompts": options.empty_prompts}
        return build_shards(
            options.out,
            num_samples=options.num,
            shard_size=options.shard_size,
            recipe=recipe,
            make=lambda start, stop: toy_samples(options, codec, text, start, stop),
        )
    if options.input is None:
        raise ConfigError("--source videos needs --input FOLDER of mp4 files")
    windows = plan_windows(
        find_clips(options.input), num_frames=options.frames, stride=options.frame_stride, hop=options.hop, skip_bad=options.skip_bad_clips
    )
    embeddings = dict(zip(prompts := sorted({w.prompt for w in windows}), text.encode(prompts), strict=True))
    height, width = options.size
    places = [f"{w.clip.relative_to(options.input)}:{w.start}" for w in windows]
    recipe |= {"windows": places, "size": [height, width], "frames": options.frames, "frame_stride": options.frame_stride}

    def clip_samples(start: int, stop: int) -> Iterator[ShardSample]:
        chosen, dtype = windows[start:stop], DTYPES[options.dtype]
        for window, video in zip(chosen, read_windows(chosen, height=height, width=width), strict=True):
            yield ShardSample(codec.encode(video.unsqueeze(0))[0].to(dtype), embeddings[window.prompt].to(dtype), window.prompt)

    return build_shards(options.out, num_samples=len(windows), shard_size=options.shard_size, recipe=recipe, make=clip_samples)


def view(options: argparse.Namespace) -> Path:
    """Decode the first samples of a shard into a contact sheet, with the codec its folder's `dataset.json` names; returns its path."""
    shards = LatentShards(str(options.view))
    batch = shards.fetch(range(min(options.rows, len(shards))))
    manifest = options.view.with_name(MANIFEST)
    stored = json.loads(manifest.read_text())["codec"]["name"] if manifest.is_file() else "toy"
    pixels = CODECS[options.codec or stored].decode(batch.latents)
    labels = [f"{key}: {prompt}" for key, prompt in zip(batch.keys, batch.prompts, strict=True)]
    scale = max(1, 64 // pixels.shape[-1])
    return contact_sheet(options.sheet or options.view.with_suffix(".png"), pixels, labels=labels, scale=scale)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    try:
        if options.view:
            print(view(options))
        else:
            paths = build(options)
            print(f"{len(LatentShards(str(options.out / 'shard-*.tar')))} samples in {len(paths)} shards: {options.out}/shard-*.tar")
    except (ConfigError, ShardError, VideoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
