"""Pinned host memory: to the page, each piece on pages of its own, given back with its tensor."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
from torch import nn

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.parallel import host
from rcm.parallel.fsdp import local, shard_parameters
from rcm.parallel.host import PAGE, REGISTERED, host_memory, zeros_on_host
from rcm.parallel.init import materialise, on_meta
from rcm.parallel.mesh import ParallelDims, process_group


@pytest.fixture
def registered(monkeypatch) -> dict[int, int]:
    """What the driver was told and has not been told to forget: bytes by address."""
    told: dict[int, int] = {}
    monkeypatch.setattr(host, "_register", lambda address, length: told.update({address: length}))
    monkeypatch.setattr(host, "_unregister", lambda address: told.pop(address))
    return told


def test_pieces_cover_their_bytes_on_pages_of_their_own(registered) -> None:
    sizes = [REGISTERED, REGISTERED + 1, 5 * REGISTERED // 3, 3 * REGISTERED]
    pieces = [host_memory(size, pinned=True) for size in sizes]
    taken = []
    for piece, size in zip(pieces, sizes, strict=True):
        address = piece.data_ptr()
        assert (piece.dtype, piece.numel()) == (torch.uint8, size)
        assert address % PAGE == 0 and size <= registered[address] < size + PAGE and registered[address] % PAGE == 0
        taken.append((address, address + registered[address]))
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))


def test_a_piece_is_forgotten_with_the_last_tensor_that_shows_it(registered) -> None:
    shown = zeros_on_host(torch.empty(3, 7, 50_000, device="meta", dtype=torch.float32), pinned=True)
    assert shown.shape == (3, 7, 50_000) and not shown.any() and shown.data_ptr() in registered
    part = shown[1]
    del shown
    gc.collect()
    assert len(registered) == 1 and not part.any()
    del part
    gc.collect()
    assert not registered


def test_small_and_plain_memory_needs_no_driver(registered) -> None:
    assert host_memory(3 * REGISTERED, pinned=False).numel() == 3 * REGISTERED
    assert zeros_on_host(torch.empty((), device="meta", dtype=torch.bfloat16), pinned=False).shape == ()
    assert zeros_on_host(torch.empty(0, 4, device="meta"), pinned=False).shape == (0, 4)
    assert not registered


def test_too_little_memory_is_told_in_bytes_with_the_knob(monkeypatch) -> None:
    class Runtime:
        def cudaHostRegister(self, address: int, length: int, flags: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(ConfigError, match=r"1\.00 GiB of host memory could not be pinned .*trainer\.offload"):
        host_memory(1 << 30, pinned=True)
    with pytest.raises(ConfigError, match=r"GiB of host memory could not be pinned \(out of memory\)"):
        host_memory(1 << 62, pinned=True)


class Wide(nn.Module):
    """Sizes of which powers of two take half as much again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1536, 1500) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_weights_that_live_on_the_host_are_pinned_where_they_lie() -> None:
    """FSDP2 takes them as they are, and torch's own pinned memory holds none of them."""
    with process_group("cuda"):
        before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        net = on_meta(Wide)
        shard_parameters(net, dims=ParallelDims(device_type="cuda"), precision=Precision.preset("bf16"), host=True)
        materialise(net, device="cpu", pinned=True)
        shards = [local(p.detach()) for p in net.parameters()]
        assert all(shard.is_pinned() for shard in shards)
        large = sum(shard.nbytes for shard in shards if shard.nbytes >= REGISTERED)
        assert large > 0 and torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) - before < large / 10
        there = shards[0].to("cuda", non_blocking=True)
        shards[0].normal_()
        there.copy_(shards[0], non_blocking=True)
        torch.testing.assert_close(there.cpu(), shards[0])
