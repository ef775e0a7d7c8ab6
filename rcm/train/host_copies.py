"""Copies of a state in host memory, for writing while training goes on."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.staging import AsyncStager


class HostCopies(AsyncStager):
    """Copies whose memory is kept for the next one: the system takes longer to hand out new pages
    than a copy does.

    Around the part of torch's `DefaultStager` that copies: that one itself cannot be used twice
    in torch 2.11, it closes its copier after every copy.
    """

    should_synchronize_after_execute = False  # `stage` returns when all is copied

    def __init__(self) -> None:
        self.copier = StateDictStager()

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict` with every tensor on the host."""
        return self.copier.stage(state_dict)

    def close(self) -> None:
        """Give the memory back."""
        self.copier.close()
