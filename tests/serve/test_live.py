"""The live server over real sockets of this machine: pictures, receipts, viewers, limits, ends. A
tiny network, 40 pictures a second.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from rcm.serve import server as server_module
from rcm.serve.access import Access
from rcm.serve.hub import Offer
from rcm.serve.limits import Limits
from tests.support.live_server import Live, live
from tests.support.tiny_checkpoint import PROMPT, write_checkpoint

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((15 / 16, 5 / 6), (5 / 6,)))
OTHER = "a blue square moving up"
WINDOW = {"policy": SlidingWindow(3, 1)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    job = tmp_path_factory.mktemp("live") / "job"
    write_checkpoint(job, RECIPE)
    torch.set_num_threads(1)
    return open_checkpoint(job)


@pytest.fixture(scope="module")
def offer(model) -> Offer:
    return Offer(model, PROMPT, WINDOW, fps=40, kind="png", presets=(PROMPT, OTHER))


@pytest.fixture(scope="module")
def server(offer):
    with live(offer, Limits(sessions=3)) as running:
        yield running


def images(model: LoadedModel, chunks: int, *, seed: int = 0, switch: tuple[int, str] | None = None) -> np.ndarray:
    """What a session alone shows: uint8 [frames, H, W, 3]."""
    with model.open([PROMPT], seed=seed, to_host=True, **WINDOW) as session:
        found = []
        for block in range(chunks):
            if switch is not None and block == switch[0]:
                session.set_condition(model.condition([switch[1]]))
            found.append(session.step().images[0].numpy())
    return np.concatenate(found)


def get(server: Live, path: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers), timeout=120
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_pictures_are_those_of_the_session_and_a_prompt_applies_where_its_receipt_says(server, model):
    with server.client("new") as client:
        hello = client.message("hello")
        assert (hello["width"], hello["height"], hello["fps"], hello["shared"]) == (8, 8, 40, False)
        client.frames(6)
        client.ask(id=7, prompt=OTHER)
        assert client.message("receipt", id=7)["state"] == "received"
        applied = client.message("receipt", id=7, state="applied")["chunk"]
        client.until(lambda _: client.pictures[-1].chunk >= applied + 2)
        assert [p.frame for p in client.pictures] == list(range(len(client.pictures)))
        wanted = images(model, applied + 3, switch=(applied, OTHER))
        for picture in client.pictures:
            np.testing.assert_array_equal(picture.pixels, wanted[picture.frame])
            # the first chunk has one picture, others two
            assert picture.chunk == (picture.frame + 1) // 2


def test_pictures_keep_the_time_of_the_clock(server):
    """Never ahead of it; with it where the machine had time, three pictures on end."""
    with server.client("new") as client:
        sent = [picture.sent for picture in client.frames(60)[20:]]
    assert sent[-1] - sent[0] > (len(sent) - 2) / 40
    assert min(b - a for a, b in zip(sent, sent[3:], strict=False)) < 3 / 40 + 0.01


def test_a_seed_begins_another_take_and_play_stops_and_goes_on(server, model):
    with server.client("new") as client:
        client.frames(4)
        client.ask(id="s", seed=9)
        receipt = client.message("receipt", id="s", state="applied")
        assert (receipt["chunk"], receipt["take"]) == (0, 1)
        first = client.until(lambda p: not isinstance(p, dict) and p.take == 1)
        np.testing.assert_array_equal(first.pixels, images(model, 1, seed=9)[0])
        client.ask(play=False)
        client.message("state", playing=False)
        count = len(client.pictures)
        client.ask(ping=5)
        client.message("pong", ping=5)
        time.sleep(0.3)
        with contextlib.suppress(TimeoutError):
            while client.step(0.2):
                pass
        assert len(client.pictures) <= count + 2, "what was on its way when the clock stopped"
        client.ask(play=True)
        assert client.frames(3)


def test_viewers_of_the_shared_stream_see_the_same_and_steer_it(server):
    with server.client() as one, server.client() as two:
        one.frames(8)
        two.frames(8)
        both = {p.number for p in one.pictures} & {p.number for p in two.pictures}
        assert len(both) >= 4
        seen = [{p.number: p.pixels.tobytes() for p in client.pictures} for client in (one, two)]
        assert all(seen[0][number] == seen[1][number] for number in both)
        half = "half a character \ud800"
        one.ask(id=half, steps=[1], context="noisy")
        two.message("state", context="noisy", steps=[1])
        one.until(lambda _: sum(m["type"] == "receipt" and m["state"] != "received" for m in one.said) == 2)
        told = {m["what"]: m["state"] for m in one.said if m.get("id") == half}
        assert told == {"steps": "applied", "context": "applied"}
        two.ask(id=2, window=0)
        assert "window is a whole number from 1" in two.message("error", id=2)["reason"]


def test_sessions_over_the_limit_get_an_answer(server):
    with server.client("new") as one, server.client("new") as two, server.client("new") as three:
        name = one.message("hello")["stream"]
        for client in (two, three):
            client.until(lambda m: isinstance(m, dict) and m["type"] in ("hello", "refused"))
        # those of earlier tests, which nobody watches any more, made room
        with server.client("new") as late:
            refused = late.message("refused")
            assert "session limit reached: 3 of 3" in refused["reason"] and refused["retry_after"] == 10
            late.to_end()
            assert late.close_code == 1013
        with server.client(name) as friend, server.client("nonsense") as lost:
            assert friend.message("hello")["stream"] == name, "a stream is watched by its name without another session"
            assert friend.frames(2)
            assert "there is no stream" in lost.message("refused")["reason"]


def test_health_metrics_and_page(server):
    with server.client() as client:
        client.frames(3)
        status, text = get(server, "/health")
        assert status == 200 and json.loads(text)["status"] == "ok"
        values = dict(line.rsplit(" ", 1) for line in get(server, "/metrics")[1].splitlines() if not line.startswith("#"))
        assert float(values["rcm_chunks_total"]) > 0 and 0 < float(values['rcm_chunk_seconds{quantile="0.99"}']) < 30
        assert float(values["rcm_sessions_limit"]) == 3 and float(values["rcm_session_bytes"]) > 0 and float(values["rcm_fps"]) > 0
    status, page = get(server, "/")
    assert status == 200 and page.startswith("<!DOCTYPE html>") and "http://" not in page and "https://" not in page.replace('"https:"', "")
    assert get(server, "/metrics", Host="example.org")[0] == 403


def test_messages_beyond_the_rate_and_the_size_end_badly_for_their_sender_alone(offer):
    with live(offer, Limits(rate=1, burst=3, strikes=5, message_bytes=300)) as server, server.client() as calm:
        calm.frames(2)
        with server.client() as hasty:
            for _ in range(9):
                hasty.ask(ping=1)
            hasty.to_end()
            assert hasty.close_code == 1008 and any("too many messages" in m.get("reason", "") for m in hasty.said)
        with server.client() as long:
            long.ask(prompt="a" * 400)
            long.to_end()
            assert long.close_code == 1009
        assert calm.frames(3)


def test_streams_end_when_nobody_watches_or_their_time_is_up(offer):
    with live(offer, Limits(idle_s=0.2, session_s=1.5)) as server:
        with server.client("new") as client:
            client.to_end()
            assert client.close_code == 1000 and "time is up" in client.said[-1]["reason"]
        with server.client() as client:
            client.frames(2)
        end = time.monotonic() + 20
        while server.hub.channels or server.hub.worker.pool.seats:
            assert time.monotonic() < end, "the stream that nobody watches is still there"
            time.sleep(0.05)


def test_a_stream_that_fails_is_told_and_the_others_go_on(offer):
    with live(offer) as server, server.client("new") as good, server.client("new") as bad:
        name = bad.message("hello")["stream"]
        good.frames(2)
        server.hub.channels[name].seat.session.step = lambda: 1 / 0
        bad.to_end()
        assert bad.close_code == 1011 and "ZeroDivisionError" in bad.said[-1]["reason"]
        assert good.frames(4)
        assert server.hub.metrics.failed == 1 and len(server.hub.worker.pool.seats) == 1


def test_a_stop_tells_everyone_and_closes_all(offer, monkeypatch):
    """Also of a server that was started without a standard output."""
    monkeypatch.setattr(sys, "stdout", None)
    with live(offer) as server, server.client() as one, server.client("new") as two:
        one.frames(2)
        two.frames(2)
        seats = list(server.hub.worker.pool.seats)
        assert server.stop() == 2
        for client in (one, two):
            client.to_end()
            assert client.close_code == 1001 and client.said[-1] == {"type": "bye", "reason": "the server is stopping"}
        assert all(seat.closed for seat in seats) and not server.hub.worker.is_alive()
        with pytest.raises(OSError), server.client():
            pass


def test_silent_connections_keep_nobody_out(server, monkeypatch):
    """The oldest end when others come; those that became sockets stay."""
    monkeypatch.setattr(server_module, "MOST", 3)
    with server.client("new") as client, contextlib.ExitStack() as open_ones:
        client.frames(1)
        silent = [open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=120)) for _ in range(8)]
        silent[0].sendall(b"GET / HT")
        assert get(server, "/health")[0] == 200
        for ended in silent[:5]:
            with contextlib.suppress(ConnectionError):
                assert ended.recv(1) == b""
        assert client.frames(2)


def test_a_session_over_the_memory_budget_is_refused_with_the_numbers(offer, model):
    with model.open([PROMPT], **WINDOW) as session:
        for _ in range(4):
            session.step()
        one = session.num_bytes()
    with live(replace(offer), budget=int(1.5 * one)) as server, server.client() as first, server.client("new") as second:
        first.message("hello")
        assert "MiB does not fit" in second.message("refused")["reason"]


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({}, "", 403),
        ({}, "&token=wrong", 403),
        ({}, "&token=right", 101),
        ({"Authorization": "Bearer right"}, "", 101),
        ({"Origin": "http://evil.example"}, "&token=right", 403),
        ({"Origin": "http://friend.example"}, "&token=right", 101),
    ],
)
def test_tokens_and_origins_of_sockets(guarded, headers, query, status):
    address = guarded.address() + query
    if status == 101:
        with connect(address, additional_headers=headers) as connected:
            assert json.loads(connected.recv(timeout=120))["type"] == "hello"
    else:
        with pytest.raises(InvalidStatus) as refused, connect(address, additional_headers=headers):
            pass
        assert refused.value.response.status_code == status


@pytest.fixture(scope="module")
def guarded(offer):
    with live(offer, access=Access("right", ("http://friend.example",))) as running:
        yield running
