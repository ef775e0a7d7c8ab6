"""The decoder of a stream that several ranks make together: split among them, so that the first
does not decode alone beside its share.
"""

from __future__ import annotations

import torch.distributed as dist

from rcm.encoders.codec import LatentCodec
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_stages import StagedCodec, stages_of
from rcm.parallel.links import chain

MOST_STAGES = 4
"""Of a decoder whose last third is three blocks, more would wait for the longest."""


def shared_decoder(
    codec: LatentCodec | None, *, ranks: int | None, sharing: int
) -> LatentCodec | None:
    """What this rank, one of `sharing` that make a stream together, decodes with: its stage of the
    Wan decoder, which the first `ranks` of them (None: up to four) run as a pipeline; None on the
    others. Rank 0 has the last stage and the pixels.

    Collective over the launch. Every rank keeps what it has where one of those has no Wan codec,
    where the codec works in tiles, and where only a part of the launch makes the stream.
    """
    world = dist.get_world_size()
    count = min(world, MOST_STAGES if ranks is None else ranks)
    if sharing != world:
        return codec
    if count < 2:
        return codec if dist.get_rank() == 0 else None
    told: list[str | None] = [None] * world
    dist.all_gather_object(
        told, codec.device.type if isinstance(codec, WanVAECodec) and codec.tile is None else None
    )
    if not all(told[:count]):
        return codec
    rank = dist.get_rank()
    above, below = chain(count, kind=str(told[0]))
    if rank >= count:
        return None
    assert isinstance(codec, WanVAECodec)  # told
    units = stages_of(codec.vae.decoder, count)[count - 1 - rank]
    return StagedCodec(codec, units, source=above, sink=below)
