"""Whoever asks a stream for another condition hears what became of it, whatever else happens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import Receipt, StreamCancelled
from tests.pipelines.test_session_codec import RECIPE
from tests.pipelines.test_session_snapshot import chunks, cond, opened
from tests.rollout.test_eviction import POLICIES
from tests.support.tiny_nets import HEIGHT, WIDTH, tiny_net


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()


def test_who_waits_for_a_change_hears_of_its_end(denoiser):
    def waiting(session: Session) -> Receipt:
        chunks(session, 2)
        return session.set_condition(cond(seed=5))

    session = opened(denoiser)
    chunks(session, 2)
    state, told = session.snapshot(), []
    for end in (session.restart, lambda: session.restore(state), session.close):
        receipt = waiting(session)
        end()
        told.append(receipt.refused)
    last = opened(denoiser, num_frames=2)
    told.append(waiting(last).refused)
    assert told == ["the stream ended before", "a snapshot was taken up before", "the stream ended before",
                    "the last chunk of this stream was made before"]  # fmt: skip
    assert last.step() is None


@pytest.mark.parametrize("policy", ["sliding", "rolling", "infinity", "mem", "deep", "relax", "relax paper"])
def test_channels_of_frames_need_chunks_at_their_places(denoiser, policy):
    """Or a chunk would be given those of other frames."""
    session = opened(denoiser, replace(RECIPE, mids=((),)), policy=POLICIES[policy][0], num_frames=40)
    given = replace(cond(), concat=torch.zeros(2, 1, 40, HEIGHT, WIDTH))
    chunks(session, 14)
    refused = session._pending.placement.frame_index != (13,)
    with pytest.raises(ConfigError, match="channels for the frames of a video") if refused else nullcontext():
        session.set_condition(given)


@pytest.mark.parametrize(("meanwhile", "told"), [("asked", (True, "")), ("cancelled", (False, "the stream ended before"))])
def test_of_two_threads_that_ask_at_once_each_hears(denoiser, monkeypatch, meanwhile, told):
    session, heard = opened(denoiser), []

    def receipt() -> Receipt:
        monkeypatch.undo()
        heard.append(session.set_condition(cond(seed=6)) if meanwhile == "asked" else session.cancel())
        return Receipt()

    monkeypatch.setattr("rcm.pipelines.steering.Receipt", receipt)
    heard.append(session.set_condition(cond(seed=5)))
    first = heard[0] or heard[1]
    assert (first.superseded, first.refused) == told
    if meanwhile == "asked":
        chunks(session, 1)
        assert heard[1].applied_at == 0 and not session._steering.asked


@pytest.mark.parametrize(("owner", "name", "told"), [("loop", "refill", "failed as it"), ("_steering", "due", "ended before")])
def test_who_asked_for_a_change_hears_that_it_broke_off_as_it_was_taken_up(denoiser, monkeypatch, owner, name, told):
    session = opened(denoiser)
    chunks(session, 3)
    receipt, real = session.set_condition(cond(seed=5), mode="recache"), getattr(getattr(session, owner), name)

    def stopped(*arguments):
        found = real(*arguments)
        session.cancel()  # from another thread
        session._course.require_open() if name == "refill" else None
        return found

    monkeypatch.setattr(getattr(session, owner), name, stopped)
    with pytest.raises(StreamCancelled):
        session.step()
    assert receipt.applied_at is None and told in receipt.refused
