"""Building late, moving, and freeing, also of modules that refer to themselves."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from rcm.encoders.lazy_module import LazyModule


def cyclic(device: torch.device) -> nn.Module:
    net = nn.Linear(3, 3, device=device)
    net.register_forward_hook(lambda *_: net.weight)
    return net


def test_a_module_is_built_once_where_it_is_needed() -> None:
    places: list[torch.device] = []

    def build(device: torch.device) -> nn.Module:
        places.append(device)
        return nn.Linear(2, 2, device=device)

    lazy = LazyModule(build, device="cpu")
    assert not lazy.is_loaded
    lazy.to("meta")
    assert lazy.load() is lazy.load()
    assert places == [torch.device("meta")]
    lazy.unload()
    lazy.unload()
    assert not lazy.is_loaded and len(places) == 1


def test_nothing_survives_unloading() -> None:
    lazy = LazyModule(cyclic, device="cpu")
    weight = weakref.ref(lazy.load().weight)
    assert weight() is not None
    lazy.unload()
    assert weight() is None


def test_a_move_that_fails_leaves_nothing_half_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    lazy = LazyModule(cyclic, device="cpu")
    monkeypatch.setattr(lazy.load(), "to", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        lazy.to("meta")
    assert not lazy.is_loaded
    assert lazy.device == torch.device("cpu")
