"""What a number on a command line may be, by the name of its flag: one table for all commands,
which their parser asks (`rcm.core.arguments`), so that none forgets a check.
"""

from __future__ import annotations

import argparse
import math

from rcm.core.errors import ConfigError
from rcm.core.rng import SEEDS

MAX_SEED = SEEDS - 1
"""torch's CPU generator reads 32 bits: larger seeds would repeat smaller ones, and negative ones
large ones.
"""

MAX_SIDE, MAX_FRAMES = 8192, 100_000
"""Pixels a side, and frames: 104 minutes at 16 a second."""

RANGES: dict[str, tuple[float, float]] = {
    "batch": (1, 100_000),
    "blocks": (1, 4096),
    "boundary": (1e-3, 0.999),
    "budget": (1, 10**6),
    "channels": (1, 65_536),
    "chunk_t": (1, MAX_FRAMES),
    "chunks": (1, MAX_FRAMES),
    "clients": (2, 100_000),
    "context_from_last_step_start_chunk": (0, MAX_FRAMES),
    "context_parallel_size": (1, 4096),
    "cp_size": (1, 4096),
    "dim": (128, 65_536),
    "empty_prompts": (0, 1),
    "first_chunk_t": (1, MAX_FRAMES),
    "first_latents": (1, MAX_FRAMES),
    "fps": (0.01, 1000),
    "frame_stride": (1, MAX_FRAMES),
    "frames": (1, MAX_FRAMES),
    "gpus": (1, 10**6),
    "grid_videos": (0, 1000),
    "guidance": (0, 1000),
    "guidance_scale": (0, 1000),
    "heads": (1, 4096),
    "height": (1, MAX_SIDE),
    "hop": (1, MAX_FRAMES),
    "idle_s": (1, 10**6),
    "index": (1, 10**10),
    "kv_hot_chunks": (0, MAX_FRAMES),
    "layers": (1, 4096),
    "limit": (1, 10**6),
    "lora": (0, 65_536),
    "lora_alpha": (1e-6, 10**6),
    "max_clients": (1, 100_000),
    "max_prompt_chars": (1, 10**6),
    "max_prompts": (1, 10**8),
    "max_sessions": (1, 10_000),
    "max_videos": (1, 10**8),
    "memory_gib": (1e-3, 10**6),
    "minutes": (0.01, 10_000),
    "ngpus": (1, 4096),
    "ntk_h": (0.01, 100),
    "ntk_t": (0.01, 100),
    "ntk_w": (0.01, 100),
    "num": (1, 10**8),
    "num_frames": (1, MAX_FRAMES),
    "num_runs": (1, 10_000),
    "num_samples": (1, 4096),
    "num_shapes": (1, 64),
    "num_steps": (1, 10_000),
    "port": (0, 65_535),
    "prefetch_factor": (1, 10_000),
    "prompt_blend": (0, MAX_FRAMES),
    "quality": (1, 100),
    "repeats": (1, 10_000),
    "rows": (0, 10**6),
    "samples": (1, 10**8),
    "scale": (1e-6, 1000),
    "seconds": (1e-3, 10**6),
    "seed": (0, MAX_SEED),
    "send_kib": (1, 10**6),
    "session_s": (1, 10**9),
    "shard_size": (1, 10**7),
    "shards": (1, 10**7),
    "shift": (0.01, 1000),
    "sigma_max": (1e-3, 1e9),
    "sinks": (0, 10_000),
    "slow": (0, 100_000),
    "spatial_stride": (1, 64),
    "step_seconds": (1e-6, 10**6),
    "steps": (1, 10_000),
    "steps_per_chunk": (1, 10_000),
    "temporal_stride": (1, 64),
    "text_dim": (1, 2**16),
    "text_len": (1, 4096),
    "timestep_shift": (0.01, 1000),
    "tokens": (1, 10**8),
    "turns": (0, 1000),
    "upscale": (1, 256),
    "vae_tile": (64, MAX_SIDE),
    "vanish": (0, 100_000),
    "videos": (8, 10_000),
    "warmup_iters": (0, 10_000),
    "width": (1, MAX_SIDE),
    "window": (1, 10_000),
    "workers": (0, 10_000),
}
"""Destination of a flag -> least and most of it. A number under any other name is finite, and none
is beyond 63 bits.
"""


def check_numbers(flags: argparse.Namespace) -> None:
    """`ConfigError` naming the first flag whose number, or one of whose numbers, is out of
    range.
    """
    for name, value in vars(flags).items():
        least, most = RANGES.get(name, (-(2**63), 2**63))
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(
                    f"--{name} {number:g} must be a finite number, from {_told(least)} to"
                    f" {_told(most)}"
                )
            if not least <= number <= most:
                bound = f"at least {_told(least)}" if number < least else f"at most {_told(most)}"
                if least > 0 >= number and isinstance(number, float):
                    bound = f"positive, {bound}"
                raise ConfigError(
                    f"--{name} {_told(number)} must be {bound}{_REASONS.get(name, '')}"
                )


_REASONS = {
    "timestep_shift": " (1: no shift)",
    "shift": " (1: no shift)",
    "guidance_scale": " (1: none)",
    "guidance": " (1: none)",
}


def _told(number: float) -> str:
    words = str(number) if isinstance(number, int) else f"{number:g}"
    return words if len(words) <= 24 else f"{words[:20]}... ({len(words)} digits)"
