"""Show keys, shapes, dtypes and captions of the first samples in training shards, and with --sheet
a picture of them.

    python -m scripts.view_shards outputs/data/toy/shard-000000.tar
    python -m scripts.view_shards 'outputs/data/wan14b_480p/*.tar' --rows 2
    python -m scripts.view_shards outputs/data/toy/shard-000000.tar --rows 4 --sheet sheet.png

Nothing in a shard is executed. The picture is decoded one sample at a time, with the codec that the
set's `dataset.json` names (Wan's VAE from --vae_path); without that file with Wan's VAE for 16
channels, else with the toy codec.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from rcm.core.arguments import Arguments, one_of
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.data.latents import LatentShards
from rcm.data.shard_writer import MANIFEST, read_manifest
from rcm.data.stored_sample import StoredSample
from rcm.data.tar_index import ShardIndex, index_shard
from rcm.encoders.codec import LatentCodec
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_weights import WAN_VAE_FILE
from rcm.inference.outcome import command, sparing
from rcm.pipelines.video_io import contact_sheet
from rcm.worlds.toy_codec import NATURAL, ToyCodec
from scripts.shards import add_patterns, named_shards

CODECS = {"toy": ToyCodec(), "natural": NATURAL}
_WAN_CHANNELS = 16
_THUMBNAIL = 208
_CAPTION = 100


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the process with status 2 for a wrong one."""
    parser = Arguments(description=__doc__, allow_abbrev=False)
    add_patterns(parser)
    parser.add_argument(
        "--rows", type=int, default=8, help="samples per shard; 0: how many there are [%(default)s]"
    )
    parser.add_argument(
        "--sheet", metavar="PNG", help="draw the first --rows samples of the first shard"
    )
    parser.add_argument(
        "--codec",
        choices=(*CODECS, "wan_vae"),
        help="another codec for the picture than the set's own",
    )
    parser.add_argument(
        "--vae_path", "--vae-path", type=Path, help=f"weights of Wan's VAE [{WAN_VAE_FILE}]"
    )
    parser.idle("vae_path", beside="codec", when=one_of("codec", *CODECS))
    return parser.parse_args(argv)


def listed(shard: ShardIndex, *, rows: int) -> Iterator[str]:
    """Lines on a shard: how much it holds, then its first samples, all members read."""
    count, size = len(shard.keys), shard.size / 2**20
    yield (
        f"{shard.path}: {count} sample{'s' * (count != 1)}, {size:.1f} MiB, each"
        f" {', '.join(shard.fields)}"
    )
    for place in range(min(rows, count)):
        sample = StoredSample.read(shard, place)
        yield (
            f"  {_plain(sample.key)} "
            f" {'  '.join(f'{field} {shape}' for field, shape in sample.shapes.items())} "
            f" {_quoted(sample.prompt)}"
        )


def _quoted(text: str) -> str:
    """A caption in quotes, cut; what a terminal would obey is spelled out."""
    return f'"{_plain(text[:_CAPTION])}{"..." if len(text) > _CAPTION else ""}"'


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def draw(
    shard: Path, sheet: OutputFile | Path, *, rows: int, codec: str | None, vae_path: Path | None
) -> Path:
    """Decode the first samples of a shard into a contact sheet, one at a time; returns its path."""
    if rows < 1:
        raise ConfigError(f"--rows {rows} must be at least 1 for a picture")
    shards = LatentShards([shard])
    batch = shards.fetch(range(min(rows, len(shards))))
    decoder = codec_of(shard, codec, channels=batch.latents.shape[1], vae_path=vae_path)
    pixels = torch.cat([_thumbnail(decoder, latents.unsqueeze(0)) for latents in batch.latents])
    labels = [f"{key}: {prompt}" for key, prompt in zip(batch.keys, batch.prompts, strict=True)]
    return contact_sheet(sheet, pixels, labels=labels, scale=max(1, 64 // pixels.shape[-1]))


def codec_of(shard: Path, name: str | None, *, channels: int, vae_path: Path | None) -> LatentCodec:
    """The codec asked for, else that of the shard's `dataset.json`; without one, Wan's VAE for 16
    channels and else the toy's.
    """
    manifest = shard.with_name(MANIFEST)
    guess = {"name": "wan_vae" if channels == _WAN_CHANNELS else "toy"}
    stored = read_manifest(manifest.parent).get("codec", guess)
    if not isinstance(stored, dict) or not isinstance(stored.get("name"), str):
        raise ConfigError(f"{manifest} names no codec but {stored!r:.80}; choose one with --codec")
    chosen = name or stored["name"]
    if chosen in ("wan_vae", "wan"):
        return WanVAECodec.from_file(
            vae_path or WAN_VAE_FILE, device="cuda" if torch.cuda.is_available() else "cpu"
        )
    if chosen not in CODECS:
        raise ConfigError(
            f"{manifest} names the codec {chosen!r}; choose --codec from {', '.join(CODECS)},"
            " wan_vae"
        )
    if name or set(stored) == {"name"}:
        return CODECS[chosen]
    try:
        return ToyCodec(**{key: value for key, value in stored.items() if key != "name"})
    except TypeError as error:
        raise ConfigError(
            f"{manifest} describes no codec of this version ({error}); choose one with --codec"
        ) from error


@torch.no_grad()
def _thumbnail(codec: LatentCodec, latents: torch.Tensor) -> torch.Tensor:
    """Decoded frames [1, 3, F, H, W] on the CPU, at most `_THUMBNAIL` pixels wide."""
    video = codec.decode(latents.to(getattr(codec, "device", "cpu"))).float().cpu()
    if video.shape[-1] <= _THUMBNAIL:
        return video
    size = (round(video.shape[-2] * _THUMBNAIL / video.shape[-1]), _THUMBNAIL)
    frames = torch.nn.functional.interpolate(video[0].transpose(0, 1), size=size, mode="area")
    return frames.transpose(0, 1).unsqueeze(0)


@command(failure=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    how = {"codec": options.codec, "vae_path": options.vae_path}
    sheet = None
    if options.sheet is not None:
        sheet = OutputFile.claim(options.sheet, suffix=".png", knob="--sheet")
    elif given := [name for name, value in how.items() if value is not None]:
        raise ConfigError(
            f"--{given[0]} is for the picture and has no effect without one; add --sheet"
        )
    paths, count = named_shards(options.shards), 0
    options.shards = paths
    if sheet is not None:
        sparing(sheet, options, knob="--sheet")
    for shard in map(index_shard, paths):
        count += len(shard.keys)
        for line in listed(shard, rows=options.rows):
            print(line)
    if len(paths) > 1:
        print(f"{count} samples in {len(paths)} shards")
    if sheet is not None:
        print(draw(paths[0], sheet, rows=options.rows, **how))


if __name__ == "__main__":
    raise SystemExit(main())
