"""The world of the demo and its data set."""

from __future__ import annotations

from rcm.worlds.toy_world import ToyWorldConfig

WORLD = ToyWorldConfig()
"""17 frames of 8x8 pixels: one of three shapes in one of four colours, moving in one of four
directions on a torus.
"""

DATA_ARGUMENTS = (
    "--size",
    "8x8",
    "--frames",
    "17",
    "--num",
    "2048",
    "--shard-size",
    "512",
    "--seed",
    "0",
)
"""Arguments of scripts.build_dataset."""
