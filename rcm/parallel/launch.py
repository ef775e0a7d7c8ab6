"""What a launcher such as torchrun says of this process, in variables of the environment. The one
place that reads them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from rcm.core.errors import ConfigError

_ADVICE = "start several ranks with torchrun"


@dataclass(frozen=True)
class Launch:
    """This process is number `rank` of `world_size` and number `local_rank` on its machine;
    `launched` by a launcher, or alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False

    def device(self, kind: str) -> torch.device:
        """This rank's own device of a kind, with its number on a GPU; `ConfigError` for a GPU that
        the machine does not have, and for one by number that is another rank's.
        """
        if kind != "cuda":
            device = torch.device(kind)
            alone = self.world_size == 1 or not self.launched
            if device.type == "cuda" and not alone and device.index != self.local_rank:
                raise ConfigError(
                    f"{kind} is not the GPU of LOCAL_RANK={self.local_rank}: every rank of a launch"
                    " takes its own; write --device cuda"
                )
            return device
        cards = torch.cuda.device_count()
        if torch.cuda.is_available() and self.local_rank >= cards:
            raise ConfigError(
                f"LOCAL_RANK={self.local_rank} has no GPU of its own: this machine has {cards};"
                f" start at most {cards} ranks on it (--nproc_per_node)"
            )
        return torch.device(kind, self.local_rank)


def this_launch() -> Launch:
    """The launch of this process; alone without RANK and WORLD_SIZE. `ConfigError` for what no
    launcher leaves: a value that is no whole number, one of the two without the other, or a rank
    that the world does not have.
    """
    launch = stated_launch()
    if launch.world_size > 1 and not launch.launched:
        raise ConfigError(
            f"WORLD_SIZE={launch.world_size} is set in the environment, RANK is not; {_ADVICE}"
        )
    return launch


def stated_launch() -> Launch:
    """As `this_launch`; a WORLD_SIZE alone is what a run is to be composed for."""
    rank, world = launch_number("RANK", 0), launched_world()
    launched = bool(os.environ.get("RANK"))
    if launched and not os.environ.get("WORLD_SIZE"):
        raise ConfigError(f"RANK is set in the environment, WORLD_SIZE is not; {_ADVICE}")
    if not rank < world:
        raise ConfigError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={world}; {_ADVICE}")
    return Launch(rank, world, launch_number("LOCAL_RANK", 0), launched)


def launched_world() -> int:
    """Ranks of this launch, as its launcher says; 1 without one. `ConfigError` unless it is a
    number above 0.
    """
    world = launch_number("WORLD_SIZE", 1)
    if world < 1:
        raise ConfigError(f"WORLD_SIZE={world} must be at least 1; {_ADVICE}")
    return world


def told_rank() -> int | str:
    """RANK for messages: also one that is no number; 0 without a launcher."""
    text = os.environ.get("RANK") or "0"
    return int(text) if text.isdecimal() else text


def is_first() -> bool:
    """Whether this process is to tell what all ranks know: rank 0, one without a launcher, and one
    whose RANK is no number, for nobody else would say so.
    """
    return told_rank() == 0 or isinstance(told_rank(), str)


def launch_number(name: str, default: int) -> int:
    """The whole number in a variable of the launcher; `default` where it is not set or empty."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number; {_ADVICE}")
    return int(text)
