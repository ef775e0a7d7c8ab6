"""What the bias correction of coded keys recovers, and what searched scales do, as error of
attention's output: on keys of a trained network, and on random ones.

    python -m scripts.bench_kv_bias
    python -m scripts.bench_kv_bias --ckpt outputs/demo/runs/sf_dmd_c3-3 --frames 9 --batch 24 \\
        --out bias.json

Keys and queries are those of the denoising passes of a stream over a plain cache: a pass's past is
coded as one chunk, before rotation, and its own tokens stay plain, as in a quantised cache.
Columns: squared relative error of the output as coded, corrected, and with the true mean gain of
every head taken off ("possible"); how many logits coded keys gain on average, and how many are
left; for types of 4 and 2 bits the error with searched scales (`SideSpec.scale_fit`), the share of
the error as coded that they recover, and the logits gained with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.text_file import read_text
from rcm.inference.outcome import command
from rcm.kernels.kv_codec import bias
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.segments import Segment, attend_segments, plain
from rcm.kernels.kv_codec.spec import BITS, SIDES, KVCodecSpec, SideSpec, kivi
from rcm.nets.kv_store import pieces_of
from rcm.nets.rope import RopeTable, rotate
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from scripts.bench_measure import bench_flags, in_words, machine, write

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "toy" / "sf_dmd_c1-1.safetensors"
PROMPTS = Path(__file__).resolve().parents[1] / "assets" / "prompts" / "toy.txt"


class Seen(NamedTuple):
    """One layer of one pass: rotated queries; keys before rotation and values, of the past and of
    the pass itself [B, L, N, D]; the table that rotates all keys, None for keys that are not
    rotated.
    """

    q: Tensor
    past: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    table: RopeTable | None


def keys_of_a_stream(ckpt: Path, *, frames: int, batch: int) -> list[Seen]:
    """What the layers of a network attended to while it streamed `frames` latent frames of `batch`
    prompts of the toy world.
    """
    model = open_checkpoint(ckpt, device="cpu")
    if model.recipe is None:
        raise ConfigError(f"--ckpt {ckpt} makes videos whole; give a causal one, which streams")
    lines = [line for line in read_text(PROMPTS).splitlines() if line.strip()]
    channels, _, height, width = model.latent_shape
    spec = StreamSpec(
        model.recipe, (channels, height, width), batch=batch, num_frames=frames, keys="pre_rope"
    )
    found: list[Seen] = []

    def look(core: Any, given: tuple[Any, ...]) -> None:
        q, k, v, _, rope, cached = given[:6]
        view = cached._view
        if view.mode != "append" and view.visible:
            past = [
                piece for chunk in view.visible for piece in pieces_of(chunk.spans, chunk=chunk.id)
            ]
            keys, values = view.store.read(cached._index, past)
            found.append(
                Seen(core.rotate(q, rope.query), (keys.clone(), values.clone()), (k, v), rope.key)
            )

    hooks = [
        block.self_attn.core.register_forward_pre_hook(look) for block in model.denoiser.net.blocks
    ]
    for _ in Session(model.denoiser, None, model.condition((lines * batch)[:batch]), spec):
        pass
    for hook in hooks:
        hook.remove()
    return found


def random_keys(*, tokens: int = 256, heads: int = 2, channels: int = 128) -> list[Seen]:
    """Normal queries, keys and values: a coded chunk and a plain one of the same length."""
    generator = torch.Generator().manual_seed(0)
    q, *others = (torch.randn(1, tokens, heads, channels, generator=generator) for _ in range(5))
    return [Seen(q, (others[0], others[1]), (others[2], others[3]), None)]


@torch.no_grad()
def corrected_errors(
    seen: Sequence[Seen], spec: KVCodecSpec, *, least: int = 16
) -> dict[str, float]:
    """The columns for one codec, over passes with at least so many tokens in the past; float64 from
    the restored keys on.
    """
    total = dict.fromkeys(("as coded", "corrected", "possible"), 0.0)
    size, gains, left = 0.0, [], []
    for q, (k, v), (own_k, own_v), table in seen:
        tokens, scale = k.shape[1], q.shape[3] ** -0.5
        if tokens < least:
            continue
        codec, q = KVCodec(spec), q.double()
        blobs = codec.encode(k, side="key", layer=0), codec.encode(v, side="value", layer=0)
        hats = codec.decode(blobs[0], side="key"), codec.decode(blobs[1], side="value")

        def turned(keys: Tensor, own_k: Tensor = own_k, table: RopeTable | None = table) -> Tensor:
            whole = torch.cat([keys, own_k], dim=1)
            return (whole if table is None else rotate(whole, table)).double()

        plain_keys, coded_keys = turned(k), turned(hats[0])

        def output(
            keys: Tensor,
            values: Tensor,
            gain: Tensor | None = None,
            q=q,
            own_v=own_v,
            tokens=tokens,
            scale=scale,
        ) -> Tensor:
            segments = [
                Segment(keys[:, :tokens], values.double(), gain),
                Segment(keys[:, tokens:], own_v.double()),
            ]
            return attend_segments(q, segments, scale=scale)

        exact = output(plain_keys, v)
        gain = bias.segment_gain(q, blobs[0], scale=scale, rotated=table is not None)
        sums = [
            plain(q, keys[:, :tokens], v.double(), scale)[1] for keys in (coded_keys, plain_keys)
        ]
        mean = (sums[0] - sums[1]).mean((0, 2), keepdim=True)
        for name, taken in (
            ("as coded", None),
            ("corrected", gain),
            ("possible", mean.expand_as(gain)),
        ):
            total[name] += float((output(coded_keys, hats[1], taken) - exact).square().sum())
        size += float(exact.square().sum())
        gains.append(float(mean.mean()))
        left.append(float((sums[0] - sums[1] - gain).mean()))
    if not gains:
        raise ConfigError(f"no pass has {least} tokens in its past; give more --frames")
    errors = {name: value / size for name, value in total.items()}
    return {**errors, "gain": sum(gains) / len(gains), "gain left": sum(left) / len(left)}


def searched(spec: KVCodecSpec) -> KVCodecSpec | None:
    """The codec with searched scales; None where there are none to search."""
    sides = {
        side: replace(spec.side(side), scale_fit="search")
        for side in SIDES
        if BITS[spec.side(side).dtype] <= 4
    }
    return replace(spec, **sides) if sides else None


def row_of(seen: Sequence[Seen], spec: KVCodecSpec, *, least: int = 16) -> dict[str, float]:
    """All columns."""
    row, other = corrected_errors(seen, spec, least=least), searched(spec)
    if other is None:
        return row
    fit = corrected_errors(seen, other, least=least)
    recovered = 1 - fit["as coded"] / row["as coded"]
    return {**row, "searched": fit["as coded"], "recovered": recovered, "then gain": fit["gain"]}


def cases() -> dict[str, KVCodecSpec]:
    """Codecs by name."""
    int2, int4 = SideSpec("int2"), SideSpec("int4")
    qvg = SideSpec("int2", "qvg")
    return {
        "int2": KVCodecSpec(int2, int2),
        "int2, keys alone": KVCodecSpec(int2, SideSpec()),
        "int2 asymmetric (KIVI)": kivi("int2"),
        "int2 qvg, 4 clusters": KVCodecSpec(qvg, qvg, qvg_clusters=4),
        "int4": KVCodecSpec(int4, int4),
        "int4 asymmetric (KIVI)": kivi("int4"),
        "fp4": KVCodecSpec(SideSpec("fp4"), SideSpec("fp4")),
        "fp8": KVCodecSpec(SideSpec("fp8"), SideSpec("fp8")),
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on standard error for what cannot be streamed."""
    parser = bench_flags(__doc__, file="--out")
    add = parser.add_argument
    add(
        "--ckpt",
        type=Path,
        default=SHIPPED,
        help="a causal checkpoint of the toy world [the shipped one]",
    )
    add("--frames", type=int, default=9, help="latent frames to stream [%(default)s]")
    add("--batch", type=int, default=24, help="prompts at once [%(default)s]")
    args = parser.parse_args(argv)
    rows, on = [], machine("cpu")
    print(in_words(on))
    for data, seen in (
        (args.ckpt.name, keys_of_a_stream(args.ckpt, frames=args.frames, batch=args.batch)),
        ("random", random_keys()),
    ):
        for name, spec in cases().items():
            row = row_of(seen, spec)
            rows.append({"keys": data, "codec": name, **row})
            print(f"{data:28s} {name:24s} {in_words(row)}", flush=True)
    if args.out:
        write(args.out, {"machine": on, "arguments": vars(args), "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
