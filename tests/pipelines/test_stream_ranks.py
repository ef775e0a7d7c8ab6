"""A stream that two ranks make together: what one of them does alone reaches the other at the next
chunk, and neither waits for ever.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError, NonFinite
from rcm.nets.denoiser import Denoiser
from rcm.parallel.ulysses import shard_sequence
from rcm.pipelines import stream_ranks
from rcm.pipelines.decode_lane import DecodeLane
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamCancelled, StreamSpec, SwitchRefused
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.pipelines.test_stream_finite import Decoder
from tests.support.dist import run_ranks
from tests.support.tiny_nets import condition, tiny_config, tiny_net

LATENT = (8, 4, 8)
RECIPE = SamplingRecipe("few_step", "c1-2", mids=((0.5,), ()))


def opened(*, prefix: torch.Tensor | None = None, **options) -> Session:
    net = tiny_net(dtype=torch.float32, in_dim=LATENT[0], out_dim=LATENT[0])
    shard_sequence(net, group=dist.group.WORLD)
    denoiser = Denoiser(net, Precision.preset("fp32")).eval_params()
    spec = StreamSpec(RECIPE, LATENT, policy=SlidingWindow(3), **options)
    return Session(denoiser, None, denoiser.prepare(condition(tiny_config(), batch=1)), spec, prefix=prefix)


def told(action) -> str:
    """The kind and words of what an action raises; the frames of a chunk."""
    try:
        made = action()
        return "" if made is None else f"{made.latents.shape[2]} frames"
    except (ConfigError, StreamCancelled, NonFinite) as error:
        return f"{type(error).__name__}: {error}"


def steps(session: Session) -> list[str]:
    return [told(session.step) for _ in range(3)]


def cancels(alone: bool, session: Session) -> list[str]:
    if alone:
        session.cancel()
    return steps(session)


def closes(alone: bool, session: Session) -> list[str]:
    if alone:
        session.close()
    return steps(session)


def fails(alone: bool, session: Session) -> list[str]:
    if alone:
        session._course.fail(RuntimeError("no more memory"))
    return steps(session)


def refuses(alone: bool, session: Session) -> list[str]:
    """One rank alone cannot replay its context."""
    if alone:
        session._steering._contexts.clear()
    receipt = session.set_condition(condition(tiny_config(), batch=1, seed=3), mode="recache")
    return [*steps(session), f"{bool(receipt.refused)} {receipt.applied_at}"]


def asks(alone: bool, session: Session) -> list[str]:
    if alone:
        receipt = session.set_condition(condition(tiny_config(), batch=1, seed=3))
    return [*steps(session), f"{bool(receipt.refused)} {receipt.applied_at}" if alone else ""]


def restarts(alone: bool, session: Session) -> list[str]:
    if alone:
        session.restart()
    return steps(session)


def poisons(alone: bool, session: Session) -> list[str]:
    """The weights of one rank alone, from which all have their latents."""
    if alone:
        with torch.no_grad():
            session.loop.denoiser.net.blocks[1].ffn[0].weight[0, 0] = math.nan
    return steps(session)


def decodes(alone: bool, session: Session) -> list[str]:
    """One rank alone sees pixels."""
    if alone:
        session._lane = DecodeLane(Decoder(poisoned=True), device=session.device, own_stream=False, graphs="off", to_host=False)
    return steps(session)


def opens(alone: bool, session: Session) -> list[str]:
    session.close()
    try:
        opened(prefix=torch.zeros(1, 5, 1, 4, 8) if alone else None)
    except ConfigError as error:
        return [str(error)]
    return []


SCENES = (cancels, closes, fails, refuses, asks, restarts, poisons, decodes, opens)


def meetings() -> list[int]:
    """How often the ranks meet per chunk, a change in the third of four; then settled."""
    told, counts = stream_ranks.greatest, []
    stream_ranks.greatest = lambda *numbers, **group: counts.append(1) or told(*numbers, **group)
    found = []
    for settled in (False, True):
        session = opened(settled=settled)
        for change in (False, False, True, False):
            if change:
                session.set_condition(condition(tiny_config(), batch=1, seed=3), mode="recache")
            counts.clear()
            session.step()
            found.append(len(counts))
        session.close()
    stream_ranks.greatest = told
    return found


def sharded() -> list[str]:
    """A network of which every rank holds a part, as it is sampled in training: whole, then with
    NaN in the part of one.
    """
    net = tiny_net(dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh)
    model, spec = Denoiser(net, Precision.preset("fp32")), StreamSpec(RECIPE, (4, 4, 6), num_frames=3)
    found = []
    for poisoned in (False, True):
        if poisoned and dist.get_rank() == 1:
            net.blocks[1].ffn[0].weight.to_local().data.fill_(math.nan)
        found.append(told(lambda: Session(model, None, condition(tiny_config(), batch=1, dtype=torch.float32), spec).step()))
    return found


def play() -> dict[str, list[str]]:
    found = {}
    for scene in SCENES:
        for look_ahead in (False, True):
            session = opened(look_ahead=look_ahead)
            for _ in range(2):
                session.step()
            found[f"{scene.__name__} {look_ahead}"] = scene(dist.get_rank() == 1, session)
            session.close()
    return found | {"meetings": meetings(), "sharded": sharded()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, list[str]]]:
    return run_ranks(2, play, tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("scene", [cancels, closes, fails])
def test_a_rank_that_leaves_ends_the_stream_on_all(ranks, scene, look_ahead):
    other, alone = (found[f"{scene.__name__} {look_ahead}"] for found in ranks)
    assert other[0].startswith("StreamCancelled: rank 1 left this stream")
    assert all(line.startswith("StreamCancelled: this stream") for line in [*alone, *other[1:]])


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("scene", [refuses, asks])
def test_a_change_that_one_rank_cannot_take_up_is_refused_on_all_and_the_stream_goes_on(ranks, scene, look_ahead):
    words = {"refuses": ("rank 1 refused", "mode='recache' replays"), "asks": ("on some ranks",) * 2}[scene.__name__]
    for found, expected in zip(ranks, words, strict=True):
        *told, receipt = found[f"{scene.__name__} {look_ahead}"]
        refusal = told.pop(1 if look_ahead else 0)  # a chunk made ahead is whole and handed out first
        assert refusal.startswith("SwitchRefused: ") and expected in refusal
        assert told == ["2 frames"] * 2 and receipt in ("True None", "")


@pytest.mark.parametrize("look_ahead", [False, True])
def test_what_is_not_finite_ends_the_stream_on_all(ranks, look_ahead):
    other, alone = (found[f"poisons {look_ahead}"][int(look_ahead) :] for found in ranks)
    block = 3 if look_ahead else 2
    assert alone[0].startswith(f"NonFinite: chunk {block} ") and "weight blocks.1.ffn.0.weight is not" in alone[0]
    assert other[0].startswith(f"NonFinite: chunk {block} ") and "after step 1 of 1" in other[0]
    other, alone = (found[f"decodes {look_ahead}"] for found in ranks)
    assert alone[0].startswith("NonFinite: chunk 2 of this stream is not finite: the decoder made")
    assert other[:2] == ["2 frames", "NonFinite: rank 1 found that this stream is not finite, and says where; look at its output"]
    assert all(line.startswith("StreamCancelled: this stream") for line in [*alone[1:], other[2]])


def test_a_part_of_a_sharded_network_that_is_not_finite_is_refused_on_all_ranks(ranks):
    for found in ranks:
        whole, refused = found["sharded"]
        assert whole == "1 frames" and refused.startswith("NonFinite: the network's weight blocks.1.ffn.0.weight is NaN or infinite")


def test_ranks_meet_once_per_chunk(ranks):
    """And a second time where a context had to be entered before a change."""
    assert [found["meetings"] for found in ranks] == [[1, 1, 2, 1, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("look_ahead", [False, True])
def test_ranks_at_different_chunks_stop(ranks, look_ahead):
    for found in ranks:
        assert "the ranks of this stream are at different chunks" in found[f"restarts {look_ahead}"][0]


def test_what_one_rank_refuses_to_open_is_refused_on_all(ranks):
    for found in ranks:
        assert found["opens False"][0].startswith("prefix must be [1 or 1, 8, k, 4, 8]")


def test_a_stream_of_one_rank_meets_nobody(monkeypatch):
    monkeypatch.setattr(stream_ranks, "greatest", lambda *_, **__: pytest.fail("a message of one rank"))
    meeting = stream_ranks.Meeting(None)
    meeting.meet(None, place=3, asked=True)
    meeting.leave()
    with pytest.raises(SwitchRefused, match="words"):
        meeting.meet(SwitchRefused("words"), place=0, asked=True)
    assert not meeting.stopped


def throws() -> list[str]:
    """Both ranks are thrown out of a pass, one by Ctrl-C."""
    session = opened()
    session.step()
    session._loop.denoise = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt if dist.get_rank() else RuntimeError("full"))
    found = []
    for action in (session.step, session.close):
        try:
            action()
        except BaseException as error:
            found.append(type(error).__name__)
    return [*found, f"{session._course.ranks.stopped}"]


def test_a_rank_thrown_out_of_a_pass_waits_for_nobody(tmp_path, monkeypatch):
    """Whoever is in the pass with it would never come to the meeting."""
    meeting = stream_ranks.Meeting(object())
    monkeypatch.setattr(stream_ranks, "greatest", lambda *_, **__: pytest.fail("waits for a rank that waits for this one"))
    meeting.adrift = True
    meeting.leave()
    assert run_ranks(2, throws, tmp_path=tmp_path) == [["RuntimeError", "False"], ["KeyboardInterrupt", "False"]]
