"""Several GPUs for one video: which numbers of ranks fit a network and a frame size, and sharing a
loaded network's tokens among them.
"""

from __future__ import annotations

import torch.distributed as dist

from rcm.core.errors import ConfigError
from rcm.nets.denoiser import Denoiser
from rcm.parallel.ulysses import shard_sequence


def num_ranks() -> int:
    """Ranks of this launch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this rank reads, prints and writes for the launch."""
    return not dist.is_initialized() or dist.get_rank() == 0


def fitting_ranks(*, num_heads: int, tokens_per_frame: int) -> tuple[int, ...]:
    """Numbers of ranks that divide both the heads and the tokens of a frame."""
    return tuple(
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and tokens_per_frame % n == 0
    )


def check_ranks(ranks: int, *, num_heads: int, tokens_per_frame: int) -> None:
    """`ConfigError`, with the numbers that would do, unless `ranks` can share each frame and each
    attention.
    """
    fitting = fitting_ranks(num_heads=num_heads, tokens_per_frame=tokens_per_frame)
    if ranks not in fitting:
        raise ConfigError(
            f"{ranks} ranks cannot share a video of {tokens_per_frame} tokens per frame in a"
            f" network of {num_heads} heads: the number of ranks must divide both; choose"
            f" --nproc_per_node from {', '.join(map(str, fitting))}"
        )


def share_tokens(denoiser: Denoiser, *, tokens_per_frame: int) -> Denoiser:
    """Let all ranks of the launch compute each forward together (Ulysses; weights whole on every
    rank); alone, nothing changes.
    """
    check_ranks(
        num_ranks(), num_heads=denoiser.net.config.num_heads, tokens_per_frame=tokens_per_frame
    )
    if num_ranks() > 1:
        shard_sequence(denoiser.net, group=dist.distributed_c10d._get_default_group())
    return denoiser
