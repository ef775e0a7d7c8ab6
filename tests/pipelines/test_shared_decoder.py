"""A decoder in stages: cut anywhere, over several ranks of a stream, and refused or left alone
where it cannot be.
"""

from __future__ import annotations

import itertools
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.encoders.wan_vae_net import WanVAE
from rcm.encoders.wan_vae_stages import StagedCodec, boundary_before, stages_of
from rcm.nets.denoiser import Denoiser
from rcm.parallel import links
from rcm.parallel.ulysses import shard_sequence
from rcm.pipelines import decode_lane
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.dist import run_ranks
from tests.support.tiny_nets import condition, tiny_config, tiny_net
from tests.support.wan_vae_cases import small_codec, small_latents

RECIPE = SamplingRecipe("few_step", "c1-2", mids=((0.5,), ()))
CELLS = (4, 8)


class Pipe(deque):
    """A link within one process: what was sent is there when it is expected."""

    def send(self, x):
        self.append(x)

    def release(self):
        self.released = True

    def expect(self, shape, *, dtype, device):
        self.wanted = (*getattr(self, "wanted", ()), (shape, dtype))

    def take(self):
        x, (shape, dtype) = self.popleft(), self.wanted[0]
        self.wanted = self.wanted[1:]
        assert (tuple(x.shape), x.dtype) == (shape, dtype)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_do_not_depend_on_where_the_decoder_is_cut(dtype):
    """At every place, through the first frame and steady ones, bit by bit; and what the stages
    remember together is what one remembers.
    """
    codec, latents = small_codec(dtype=dtype), small_latents(3, cells=(2, 2))
    whole = codec.stream()
    expected = [whole.decode_chunk(part) for part in latents.split([1, 2], dim=2)]
    count = len(codec.vae.decoder.units)
    for cut in range(1, count):
        pipe = Pipe()
        first = StagedCodec(codec, range(cut), source=None, sink=pipe).stream()
        second = StagedCodec(codec, range(cut, count), source=pipe, sink=None).stream()
        found = []
        for part in latents.split([1, 2], dim=2):
            assert first.decode_chunk(part) is None
            found.append(second.decode_chunk(part))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), cut
        assert first.num_bytes() + second.num_bytes() == whole.num_bytes()
        first.close()
        second.close()
        assert pipe.released


def test_stages_of_the_published_decoder_take_alike():
    """Two stages part where 192 channels of half the image are turned into 96 of the whole."""
    with torch.device("meta"):
        decoder = WanVAE().decoder
    assert stages_of(decoder, 1) == [range(18)] and stages_of(decoder, 2) == [range(14), range(14, 18)]
    at = boundary_before(decoder, 14)
    assert (at.channels, at.frames, at.scale) == (192, 4, 4)
    for count in (3, 4):
        parts = stages_of(decoder, count)
        assert [i for part in parts for i in part] == list(range(18)) and all(parts)
    with pytest.raises(ValueError, match="1 to 18 stages, not 19"):
        stages_of(decoder, 19)


def stream(decode_ranks: int | None, have: str, device_type: str) -> dict:
    """Six chunks, with a snapshot after three of which the last three are made again; on all ranks
    together.
    """
    device = f"cuda:{dist.get_rank()}" if device_type == "cuda" else "cpu"
    graphs = "on" if device_type == "cuda" else "off"
    net = tiny_net(dtype=torch.float32, in_dim=16, out_dim=16).to(device)
    shard_sequence(net, group=dist.group.WORLD)
    denoiser = Denoiser(net, Precision.preset("fp32")).eval_params()
    codec = small_codec().to(device) if have == "all" or dist.get_rank() == 0 else None
    policy = SlidingWindow(2)
    spec = StreamSpec(RECIPE, (16, *CELLS), policy=policy, look_ahead=True, to_host=True, graphs=graphs, decode_ranks=decode_ranks)
    with Session(denoiser, codec, denoiser.prepare(condition(tiny_config(), batch=1)), spec, device=device) as session:
        chunks = list(itertools.islice(session, 3))
        held = session.snapshot()
        later = list(itertools.islice(session, 3))
        session.restore(held)
        again = list(itertools.islice(session, 3))
        decoder = 0 if session._lane is None else session._lane.num_bytes()
    return {
        "latents": torch.cat([c.latents for c in chunks + later], dim=2).cpu(),
        "frames": torch.cat([c.frames for c in chunks + later], dim=2).cpu(),
        "again": torch.cat([c.frames for c in again], dim=2).cpu(),
        "images": [c.images is not None for c in chunks],
        "bytes": decoder,
    }


def check(found: list[dict], *, split: bool, device: str = "cpu") -> None:
    first = found[0]
    whole = small_codec().to(device).stream()
    pixels = torch.cat([whole.decode_chunk(part.to(device)) for part in first["latents"].split([1, 2, 2, 2, 2, 2], dim=2)], dim=2).cpu()
    assert torch.equal(first["frames"], pixels) and torch.equal(first["again"], pixels[:, :, -first["again"].shape[2] :])
    assert all(first["images"])
    for other in found[1:]:
        assert torch.equal(other["latents"], first["latents"]) and torch.equal(other["frames"], other["latents"])
        assert not any(other["images"])
    assert sum(row["bytes"] for row in found) == whole.num_bytes() and all(bool(row["bytes"]) == split for row in found[1:])


@pytest.mark.parametrize(
    ("ranks", "decode_ranks", "have"),
    [(2, None, "all"), (2, 1, "all"), (2, None, "first"), pytest.param(4, None, "all", marks=pytest.mark.slow)],
)
def test_ranks_that_share_a_stream_decode_the_pixels_of_one(tmp_path, ranks, decode_ranks, have):
    found = run_ranks(ranks, stream, decode_ranks, have, "cpu", tmp_path=tmp_path)
    check(found, split=decode_ranks is None and have == "all")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_decode_the_pixels_of_one(tmp_path):
    found = run_ranks(2, stream, None, "all", "cuda", tmp_path=tmp_path, device_type="cuda")
    check(found, split=True, device="cuda:0")


@pytest.mark.parametrize("wrong", ["tiles", "no Wan codec"])
def test_every_rank_keeps_what_it_has_where_one_cannot_take_a_stage(monkeypatch, wrong):
    """Rank 1 of two has a codec that cannot be cut; rank 0 must not wait for its stage."""
    mine, told = small_codec(), []

    def gather(found, own):
        told.append(own)
        found[:] = [own, "cpu"] if wrong == "tiles" else ["cpu", None]

    world = SimpleNamespace(get_world_size=lambda: 2, get_rank=lambda: 0, all_gather_object=gather)
    monkeypatch.setattr(decode_lane, "dist", world)
    mine.tile = 64 if wrong == "tiles" else None
    assert decode_lane.shared_decoder(mine, ranks=None, sharing=2) is mine
    assert told == [None if wrong == "tiles" else "cpu"]


def test_few_sent_tensors_are_kept(monkeypatch):
    """The sender waits for the receiver, which may be slower for ever."""
    waited = []

    class Work:
        def __init__(self, x):
            self.x = x

        def wait(self):
            waited.append(self.x)

        def is_completed(self):
            return self.x in waited or self.x == 3

    monkeypatch.setattr(links, "dist", SimpleNamespace(isend=lambda x, **_: Work(x)))
    link = links.Link(None, source=1, target=0)
    for x in range(5):
        link.send(x)
        assert len(link._sent) <= links.MOST_UNDER_WAY
    assert waited == [0, 1, 2]
    link.release()
    assert [x for _, x in link._sent] == [4]


def test_no_ranks_cannot_decode():
    with pytest.raises(ConfigError, match="decode_ranks=0"):
        StreamSpec(RECIPE, (16, *CELLS), num_frames=3, decode_ranks=0)
