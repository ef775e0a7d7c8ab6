"""One stream over several cards, random weights at full size: Ulysses on 1, 2 and 4 ranks, and the
decoder on a second card.

    torchrun --nproc_per_node=4 -m scripts.bench_stream_ranks --out ranks.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from rcm.encoders.wan_vae import WanVAECodec
from rcm.inference.outcome import command
from rcm.nets.denoiser import Denoiser
from rcm.parallel.mesh import process_group
from rcm.parallel.ulysses import shard_sequence
from scripts.bench_measure import bench_flags, chosen_parts, machine, relative, require_card, write
from scripts.bench_stream_runs import RECIPES, build, opened, steady


def on_several(size: str, name: str, *, chunks: int) -> dict[str, Any]:
    """One stream over 1, 2 and 4 ranks (Ulysses): time per chunk with the decoder on the first of
    them and, where all ranks of the launch make the stream, in stages on two and on all; latents
    and pixels against those of one rank. Collective.
    """
    rank, world, found, alone_latents = dist.get_rank(), dist.get_world_size(), {}, None
    for count in (n for n in (1, 2, 4) if n <= world):
        group = dist.new_group(list(range(count)))
        if rank < count:
            denoiser = build(size)
            if count > 1:
                shard_sequence(denoiser.net, group=group)
            codec = WanVAECodec.random(device="cuda") if rank == 0 or count == world else None
            with opened(denoiser, None, name, num_frames=9) as session:
                latents = torch.cat([chunk.latents for chunk in session], dim=2)
            alone_latents = latents if alone_latents is None else alone_latents
            for decode in sorted({1, 2, count} if count == world > 1 else {1}):
                row = steady(
                    denoiser, codec, RECIPES[name], chunks=chunks, idle=False, decode_ranks=decode
                )
                row["latents_error"] = relative(latents, alone_latents)
                row["fps"] = 1e3 * 4 * RECIPES[name].blocks.chunk / row["chunk_ms"]
                found[f"{count} ranks, {decode} of them decode"] = row
            if count == world > 1:
                found["pixels of stages, largest difference"] = staged_difference(
                    denoiser, codec, name
                )
            del denoiser, codec
        torch.cuda.empty_cache()
        dist.barrier()
    return found


def staged_difference(denoiser: Denoiser, codec: WanVAECodec, name: str) -> float:
    """Pixels of a short stream decoded in stages against those of its latents decoded on one card;
    0 on the ranks without pixels.
    """
    with opened(denoiser, codec, name, num_frames=9) as session:
        chunks = list(session)
    if chunks[0].images is None:
        return 0.0
    whole = codec.stream()
    return max(
        float((whole.decode_chunk(chunk.latents) - chunk.frames).abs().max()) for chunk in chunks
    )


def apart(denoiser: Denoiser, *, chunks: int) -> dict[str, Any]:
    """Time per chunk with the decoder on the same card and on a second one."""
    found = {}
    for where in ("cuda:0", "cuda:1"):
        with torch.cuda.device(where):
            codec = WanVAECodec.random(device=where)
        found[where] = steady(denoiser, codec, RECIPES["c3-3 [4,2]"], chunks=chunks, idle=False)
    found["ratio"] = found["cuda:1"]["chunk_ms"] / found["cuda:0"]["chunk_ms"]
    return found


@command
def main(argv: list[str] | None = None) -> None:
    """Run the rows and print them on the first rank."""
    parser = bench_flags(__doc__, file="--out", default="stream_ranks.json")
    parser.add_argument("--chunks", type=int, default=12, help="steady chunks that are timed")
    parser.add_argument("--sizes", default="1.3B,14B", help="comma-separated")
    options = parser.parse_args(argv)
    sizes = chosen_parts(options.sizes, ("1.3B", "14B"), flag="--sizes")
    require_card("bench_stream_ranks")
    with process_group("cuda"):
        report: dict[str, Any] = {**machine(), "world": dist.get_world_size()}
        first = dist.get_rank() == 0

        def keep(name: str, found: dict[str, Any]) -> None:
            report[name] = found
            if first:
                print(name, json.dumps(found), flush=True)
                write(options.out, report)

        rows = [("1.3B", "c3-3 [4,2]"), ("1.3B", "c1-1 [4,1]"), ("14B", "c3-3 [4,2]")]
        for size, name in (row for row in rows if row[0] in sizes):
            keep(f"{size} {name}", on_several(size, name, chunks=options.chunks))
        if first and torch.cuda.device_count() > 1:
            keep("decoder", apart(build("1.3B"), chunks=options.chunks))
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main())
