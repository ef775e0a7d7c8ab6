"""What a launcher such as torchrun says of this process, in variables of the environment. The one
place that reads them.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

import torch

from rcm.core.errors import ConfigError

_ADVICE = "start several ranks with torchrun"
KNOWN_WITHIN = 60.0
"""Seconds in which the name of the machine where ranks meet must be found: a container's name
is there when it has started, which may be after this one, and servers of names remember for up to
half a minute that there was none.
"""
_TOLD_AFTER = 5.0
"""Seconds after which it is told that it is not."""


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
        the machine does not have, and for one by number that is another rank's. A rank that sees
        its own GPU alone takes it.
        """
        place = 0 if self.sees_its_own() else self.local_rank
        if kind != "cuda":
            device = torch.device(kind)
            alone = self.world_size == 1 or not self.launched
            if device.type == "cuda" and not alone and device.index != place:
                raise ConfigError(
                    f"{kind} is not the GPU of LOCAL_RANK={self.local_rank}: every rank of a launch"
                    " takes its own; write --device cuda"
                )
            return device
        cards = torch.cuda.device_count()
        if self.world_size > 1 and self.launched and cards > 1 and not os.environ.get("LOCAL_RANK"):
            raise ConfigError(
                "RANK is set in the environment, LOCAL_RANK is not, which says which of the"
                f" {cards} GPUs of this machine is this rank's; {_ADVICE}"
            )
        if torch.cuda.is_available() and place >= cards:
            raise ConfigError(
                f"LOCAL_RANK={place} has no GPU of its own: this process sees {cards}; start at"
                f" most {cards} ranks on this machine (--nproc_per_node), or set LOCAL_RANK=0 in"
                " every rank where each sees its own GPU alone"
            )
        return torch.device(kind, place)

    def sees_its_own(self) -> bool:
        """Whether this rank is shown one GPU that the others are not, as `srun --gpus-per-task=1`
        has it: the ranks of one torchrun are all shown the same.
        """
        shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return self.launched and len(shown) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def this_launch() -> Launch:
    """The launch of this process; alone without RANK and WORLD_SIZE. `ConfigError` for what no
    launcher leaves: a value that is no whole number, one of the two without the other, or a rank
    that the world or the machine does not have.
    """
    launch = stated_launch()
    if launch.world_size > 1 and not launch.launched:
        raise ConfigError(
            f"WORLD_SIZE={launch.world_size} is set in the environment, RANK is not; {_ADVICE}"
        )
    return launch


def stated_launch() -> Launch:
    """As `this_launch`; a WORLD_SIZE alone is what a run is to be composed for. What is said of the
    machine of a launch of one rank is its parent's: such a rank is alone there.
    """
    rank, world = launch_number("RANK", 0), launched_world()
    launched = bool(os.environ.get("RANK"))
    if launched and not os.environ.get("WORLD_SIZE"):
        raise ConfigError(f"RANK is set in the environment, WORLD_SIZE is not; {_ADVICE}")
    if not rank < world:
        raise ConfigError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={world}; {_ADVICE}")
    place, here = launch_number("LOCAL_RANK", 0), launch_number("LOCAL_WORLD_SIZE", world)
    if launched and world > 1 and not 0 < here <= world:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={here} must be from 1 to WORLD_SIZE={world}; {_ADVICE}"
        )
    if launched and world > 1 and not place < here:
        raise ConfigError(
            f"LOCAL_RANK={place} must be at least 0 and below {here}, the ranks of its machine;"
            f" {_ADVICE}"
        )
    return Launch(rank, world, place, launched)


def meeting_place() -> tuple[str, int]:
    """Address and port where the ranks of this launch meet. `ConfigError` unless both are set, the
    port is one, and the address that of a machine: torch looks for it for half an hour.
    """
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        raise ConfigError(
            f"RANK is set in the environment, {' and '.join(lacking)} is not; {_ADVICE}"
        )
    address, port = os.environ["MASTER_ADDR"], launch_number("MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT={port} must be a port, from 1 to {2**16 - 1}; {_ADVICE}")
    begun, told = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(address, port)
            return address, port
        except (OSError, UnicodeError) as error:
            waited, reason = time.monotonic() - begun, getattr(error, "strerror", None) or error
            # neither a name with a colon nor one that cannot be asked for will ever be known
            if waited >= KNOWN_WITHIN or ":" in address or isinstance(error, UnicodeError):
                raise ConfigError(
                    f"environment variable MASTER_ADDR={address!r} is no address of a machine that"
                    f" this one can find ({reason}); give the name or number of the machine of"
                    " rank 0, without a port"
                ) from error
            if waited >= _TOLD_AFTER and not told:
                from loguru import logger  # which not all have that import this

                told = True
                logger.warning(
                    "MASTER_ADDR={} is not known here yet ({}); waiting {:g} s for its machine",
                    address, reason, KNOWN_WITHIN,
                )  # fmt: skip
        time.sleep(0.5)


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
    return int(text) if _is_number(text) else text


def is_first() -> bool:
    """Whether this process is to tell what all ranks know: rank 0, one without a launcher, and one
    whose RANK is no number, for nobody else would say so.
    """
    return told_rank() == 0 or isinstance(told_rank(), str)


def launch_number(name: str, default: int) -> int:
    """The whole number in a variable of the launcher; `default` where it is not set or empty."""
    text = os.environ.get(name) or str(default)
    if not _is_number(text):
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number; {_ADVICE}")
    return int(text)


def _is_number(text: str) -> bool:
    """Whether it is a whole number that torch can hold."""
    return text.isdecimal() and len(text) < 10
