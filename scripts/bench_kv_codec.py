"""Measure the codec of cached keys and values on one GPU: python -m scripts.bench_kv_codec --out
kv_codec.json

Correctness first: fused encode and restore against plain torch, bit for bit, in bf16. Then, for
keys and values of one layer and chunk: bytes, compression, milliseconds to encode and to restore,
squared error, and the error of attention to coded chunks and a plain one, with and without the
correction of the keys' bias. `--tiny` runs the same on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rcm.inference.outcome import command
from rcm.kernels.kv_codec import fused
from rcm.kernels.kv_codec.codec import KVCodec, reference
from rcm.kernels.kv_codec.codes import Codes
from rcm.kernels.kv_codec.spec import SIDES, KVCodecSpec, SideSpec, kivi
from scripts.bench_kv_bias import Seen, corrected_errors
from scripts.bench_measure import (
    alone,
    bench_flags,
    drawn,
    in_words,
    machine,
    require_card,
    require_match,
    write,
)

LAYERS, FORWARDS = 30, 5
"""Layers of the 1.3B network; forwards per chunk (4 steps and the append), each of which restores
all cold chunks.
"""


def cases(clusters: int) -> dict[str, KVCodecSpec]:
    """Codecs by name."""

    def both(
        dtype: str, smoothing: str = "none", scale_fit: str = "none", **settings: object
    ) -> KVCodecSpec:
        side = SideSpec(dtype, smoothing, scale_fit=scale_fit)
        return KVCodecSpec(side, side, qvg_clusters=clusters, **settings)

    return {
        "bf16": both("bf16"),
        "fp8": both("fp8"),
        "int8": both("int8"),
        "fp4": both("fp4"),
        "int4": both("int4"),
        "int2": both("int2"),
        "int2 search": both("int2", scale_fit="search"),
        "int2 kivi": kivi("int2"),
        "int2 hadamard": both("int2", "hadamard"),
        "int4 qvg": both("int4", "qvg"),
        "int2 qvg": both("int2", "qvg"),
        "int2 qvg, 2 iterations": both("int2", "qvg", qvg_iters=2),
        "int2 qvg release": both("int2", "qvg", mode="release"),
        "int2 qvg official": both("int2", "qvg", mode="official"),
    }


def timed(call: Callable[[], object], *, repeats: int, device: str) -> float:
    """Milliseconds of a call."""
    if device == "cuda":
        return alone(call, repeats=repeats)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def equal_to_plain(codec: KVCodec, blob: object, x: Tensor, side: str) -> list[str]:
    """What of a blob and its restoring is not equal to plain torch, bit for bit, on the same
    device.
    """
    wrong = []
    if not torch.equal(codec.decode(blob, side=side), reference(blob).to(x.dtype)):
        wrong.append("restore")
    how = codec.spec.side(side)
    if isinstance(blob.codes, Codes) and how.smoothing in ("none", "qvg"):
        slow = KVCodec(KVCodecSpec(**{**vars(codec.spec), "triton_restore": False})).encode(
            x, side=side, layer=0
        )
        if blob.clusters is not None and not torch.equal(
            blob.clusters.centroids, slow.clusters.centroids
        ):
            # sums of k-means are taken in another order, and what is coded is the residual
            return wrong
        for name in ("data", "scales"):
            mine, theirs = (getattr(b.codes, name).view(torch.uint8) for b in (blob, slow))
            if not torch.equal(mine, theirs):
                wrong.append(
                    f"{name} of the codes ({float((mine != theirs).float().mean()):.1e} of the"
                    " bytes)"
                )
    return wrong


def measure(
    name: str, spec: KVCodecSpec, data: tuple[Tensor, Tensor, Tensor], args: argparse.Namespace
) -> dict:
    """One row."""
    q, k, v = data
    codec = KVCodec(spec)
    row: dict = {"codec": name, "encode_ms": 0.0, "restore_ms": 0.0, "bytes": 0}
    hats, blobs = {}, {}
    for side, x in zip(SIDES, (k, v), strict=True):
        blobs[side] = KVCodec(spec).encode(x, side=side, layer=0)
        row[f"{side}s differ from plain torch"] = equal_to_plain(codec, blobs[side], x, side)
        codec.encode(x, side=side, layer=0)
        row["encode_ms"] += timed(
            lambda x=x, side=side: codec.encode(x, side=side, layer=0),
            repeats=args.repeats,
            device=args.device,
        )
        hats[side] = torch.empty_like(x)
        row["restore_ms"] += timed(
            lambda side=side: codec.decode_into(blobs[side], hats[side], side=side),
            repeats=args.repeats,
            device=args.device,
        )
        row["bytes"] += codec.blob_bytes(blobs[side])
        row[f"{side} error"] = float(
            ((hats[side].float() - x.float()).norm() / x.float().norm()) ** 2
        )
    row["compression"] = (k.nbytes + v.nbytes) / row["bytes"]
    row["encode of a chunk, all layers, ms"] = row["encode_ms"] * LAYERS
    row["restores of a chunk's forwards, all layers, ms"] = (
        row["restore_ms"] * LAYERS * FORWARDS * args.chunks
    )
    own = tuple(x.roll(7, 1) for x in (k, v))  # the chunk that is being made: never coded
    some = q[:, :: max(1, q.shape[1] // 512)].contiguous()
    names = {"as coded": "attention error", "possible": "without the bias"}
    errors = corrected_errors([Seen(some, (k, v), own, None)], spec)
    return row | {names.get(name, name): error for name, error in errors.items()}


@command
def main(argv: list[str] | None = None) -> None:
    parser = bench_flags(__doc__, file="--out")
    add = parser.add_argument
    add("--tokens", type=int, default=4680, help="tokens of a chunk")
    add("--heads", type=int, default=12)
    add("--channels", type=int, default=128, help="channels of a head")
    add("--chunks", type=int, default=6, help="cold chunks that every forward restores")
    add("--repeats", type=int, default=20)
    add("--only", default="", help="part of a codec's name")
    add(
        "--tiny",
        action="store_true",
        help="256 tokens, 2 heads, on the CPU: a check of this script",
    )
    parser.idle("tokens", "heads", beside="tiny")
    args = parser.parse_args(argv)
    require_match(args.only, cases(1))
    args.device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        args.tokens, args.heads = 256, 2
    else:
        require_card("bench_kv_codec", instead="--tiny runs on the CPU")
    on = machine(args.device)
    print(f"{in_words(on)}  chunk {args.tokens} x {args.heads} x {args.channels}")
    rows, wrong = [], 0
    for kind in ("random", "real-like"):
        size = {"width": args.channels, "kind": kind, "device": args.device}
        data = drawn(args.tokens, args.tokens, args.heads, **size)
        for name, spec in cases(min(256, max(1, args.tokens // 16))).items():
            if args.only not in name:
                continue
            row = {"data": kind, **measure(name, spec, data, args)}
            rows.append(row)
            differ = row["keys differ from plain torch"] + row["values differ from plain torch"]
            wrong += bool(differ)
            print(
                f"{kind:9s} {name:22s} {row['bytes'] / 2**20:6.2f} MiB {row['compression']:5.2f}x "
                f" encode {row['encode_ms']:7.3f}  restore {row['restore_ms']:7.4f} ms  error k"
                f" {row['key error']:.1e} v {row['value error']:.1e}  attention"
                f" {row['attention error']:.2e} corrected {row['corrected']:.2e} without bias"
                f" {row['without the bias']:.2e}  gain {row['gain']:.3f} left"
                f" {row['gain left']:.3f}  {'DIFFERS: ' + ', '.join(differ) if differ else 'ok'}",
                flush=True,
            )
    if args.out:
        write(args.out, {"machine": on, "arguments": vars(args), "rows": rows})
    fused_used = fused.runs_on(torch.empty(1, device=args.device))
    print(
        f"fused kernels {'ran' if fused_used else 'did not run'}; {wrong} rows differ from plain"
        " torch"
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
