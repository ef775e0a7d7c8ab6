"""Streams over quantised caches, random weights at full size: memory, time per chunk with and
without graphs, what the time is spent on.

    python -m scripts.bench_stream_cache --out stream_cache.json

1.3B, 480x832, chunks of three frames, steps [4,2], a window of 21 frames in its steady state,
decoder left out; coded keys are kept before rotation, as the commands do. Memory is what the cache
holds between two chunks (codes, scratch), counted and allocated, and the most that was allocated
while chunks were made, weights, and what graphs work in, apart. Encode, restore and attention are
timed alone, as graphs, for as many calls as a chunk makes. Errors, relative: of attention to a
coded chunk and a plain one (keys and values of uneven channels and 64 kinds of token), and of the
latents of the chunks against bf16 on the same noise; with random weights these say little of
pictures.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rcm.inference.outcome import command
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import SIDES, KVCodecSpec
from rcm.kernels.persistent_attention.api import attend, obstacle
from rcm.kernels.split_attention.api import split_attention
from rcm.nets.attention_auto import parts_of
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from scripts.bench_kv_codec import cases
from scripts.bench_measure import (
    GIB,
    bench_flags,
    captured,
    drawn,
    forget,
    relative,
    require_match,
    this_card,
    write,
)
from scripts.bench_stream_runs import RECIPES, build, engine, prompt

WINDOW, PASSES = 7, 3
"""Chunks of the window, the newest included; passes of a chunk in the steady state: two denoising
ones and its context.
"""


CACHES = {"bf16": None} | {
    name.replace(" qvg", "+qvg"): cases(256)[name]
    for name in ("fp8", "int4", "int2", "int2 search", "int2 qvg", "int2 qvg release")
}


def stream(spec: KVCodecSpec | None, **options: Any) -> StreamSpec:
    """The stream over such a cache."""
    coded = {} if spec is None else {"kv_codec": KVCodec(spec), "keys": "pre_rope"}
    given = {
        "look_ahead": False,
        "first_alone": False,
        "to_host": False,
        "policy": SlidingWindow(WINDOW),
        **coded,
        **options,
    }
    return engine(RECIPES["c3-3 [4,2]"], **given)


def chunk_ms(session: Session, count: int) -> tuple[float, Tensor]:
    """Median milliseconds of a chunk, its context pass included, and the latents of `count`
    chunks.
    """
    times, parts = [], []
    for _ in range(count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        parts.append(session.step().latents)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times), torch.cat(parts, dim=2)


def streamed(denoiser: Any, spec: KVCodecSpec | None, *, chunks: int) -> dict[str, Any]:
    """Fill the window eagerly, time chunks; take the same state up with graphs, time the same
    chunks.
    """
    forget()
    weights, cond = torch.cuda.memory_allocated(), prompt(denoiser)
    found: dict[str, Any] = {}
    with Session(denoiser, None, cond, stream(spec, graphs="off"), device="cuda") as session:
        for _ in range(WINDOW + 1):
            session.step()
        state = session.snapshot()
        found["eager_ms"], found["latents"] = chunk_ms(session, chunks)
    with Session(denoiser, None, cond, stream(spec, graphs="on"), device="cuda") as session:
        session.restore(state)
        del state
        torch.cuda.empty_cache()
        same = [session.step().latents for _ in range(2)]
        torch.cuda.reset_peak_memory_stats()
        found["graph_ms"], rest = chunk_ms(session, chunks - 2 if chunks > 4 else chunks)
        both = torch.cat([*same, rest], dim=2)
        length = min(both.shape[2], found["latents"].shape[2])
        found["graph_differs"] = relative(both[:, :, :length], found["latents"][:, :, :length])
        found["cache_gib"] = session.loop.cache.num_bytes() / GIB
        found["allocated_gib"] = (torch.cuda.memory_allocated() - weights) / GIB
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - weights) / GIB
        found["passes"] = dict(session.loop.counts)
    return found


def parts(spec: KVCodecSpec | None, layers: int) -> dict[str, float]:
    """Encode, restore and attention of a chunk, as captured passes take it, and the relative error
    of attention.
    """
    q, k, v = drawn(4680, 4680, 12, width=128)
    total, scale = WINDOW * k.shape[1], q.shape[3] ** -0.5
    room = [x.repeat(1, WINDOW, 1, 1) for x in (k, v)]  # zeros would run faster
    by_parts = partial(split_attention, parts=parts_of(q, room[0]))
    dense = partial(by_parts if obstacle(q, *room) else attend, q, *room, scale=scale)
    found = {"attention": captured(dense) * layers * PASSES}
    if spec is None:
        return found
    codec, blobs, restored = KVCodec(spec), {}, []
    for side, x in zip(SIDES, (k, v), strict=True):
        codec.encode(x, side=side, layer=0)
        blobs[side] = [codec.encode(x, side=side, layer=0) for _ in range(WINDOW)]
        restored.append(codec.decode(blobs[side][0], side=side))
    tables = {side: codec.addresses(blobs[side]).cuda() for side in SIDES}
    starts = torch.arange(WINDOW, device="cuda") * k.shape[1]
    angle = torch.rand(total, q.shape[3] // 2, device="cuda")

    def encode() -> None:
        for side, x in zip(SIDES, (k, v), strict=True):
            codec.encode_to(tables[side][-1], x, side=side, layer=0)

    def restore(count: int) -> None:
        for side, out in zip(SIDES, room, strict=True):
            turn = (angle.cos(), angle.sin()) if side == "key" else None
            codec.restore(
                blobs[side][0], tables[side][:count], starts[:count], out, side=side, turn=turn
            )

    found["encode"] = captured(encode) * layers
    found["restore"] = layers * (
        captured(lambda: restore(WINDOW)) + (PASSES - 1) * captured(lambda: restore(WINDOW - 1))
    )
    own = [x.roll(7, 1) for x in (k, v)]

    def output(keys: Tensor, values: Tensor) -> Tensor:
        pair = [torch.cat([x, y], dim=1) for x, y in zip((keys, values), own, strict=True)]
        return split_attention(q[:, ::9].contiguous(), *pair, scale=scale, parts=1).float()

    found["attention_error"] = relative(output(*restored), output(k, v))
    return found


@command
def main(argv: list[str] | None = None) -> None:
    """Run the caches, compare them with the plain one, print one table."""
    parser = bench_flags(__doc__, file="--out", default="stream_cache.json")
    parser.add_argument("--chunks", type=int, default=6, help="chunks that are timed")
    parser.add_argument("--only", default="", help="part of a cache's name; bf16 always runs")
    options = parser.parse_args(argv)
    require_match(options.only, CACHES)
    report: dict[str, Any] = this_card("bench_stream_cache")
    begin, denoiser = time.perf_counter(), build("1.3B")
    print(
        "| cache | held GiB | x | allocated | most | graph ms | over | eager ms | over | encode |"
        " restore | attention | attention error | latents error | graph differs |\n|" + "---|" * 15,
        flush=True,
    )
    plain: dict[str, Any] = {}
    for name, spec in CACHES.items():
        if spec is not None and options.only not in name:
            continue
        found = streamed(denoiser, spec, chunks=options.chunks) | parts(
            spec, denoiser.net.config.num_layers
        )
        latents = found.pop("latents")
        plain = plain or {**found, "latents": latents}
        found["latents_error"] = relative(latents, plain["latents"])
        report[name] = found
        spent = [
            f"{found.get(part, 0):.1f} ({found.get(part, 0) / found['graph_ms']:.0%})"
            for part in ("encode", "restore", "attention")
        ]
        cells = [
            name, f"{found['cache_gib']:.2f}", f"{plain['cache_gib'] / found['cache_gib']:.2f}",
            f"{found['allocated_gib']:.2f}",
            f"{found['peak_gib']:.2f}", f"{found['graph_ms']:.1f}",
            f"{found['graph_ms'] / plain['graph_ms'] - 1:+.1%}",
            f"{found['eager_ms']:.1f}", f"{found['eager_ms'] / plain['eager_ms'] - 1:+.1%}", *spent,
            f"{found.get('attention_error', 0):.3g}", f"{found['latents_error']:.2g}",
            f"{found['graph_differs']:.2g}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
        write(options.out, report)
    passes = {name: row["passes"] for name, row in report.items() if isinstance(row, dict)}
    print(f"{time.perf_counter() - begin:.0f} s; passes {passes}")


if __name__ == "__main__":
    sys.exit(main())
