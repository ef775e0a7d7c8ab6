"""Messages, access, queues, quantiles and the command, without a network."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.core.errors import ConfigError
from rcm.front import cli
from rcm.rollout.recipe import SamplingRecipe
from rcm.serve.access import Access
from rcm.serve.channel import _stepped
from rcm.serve.limits import Bucket, Limits
from rcm.serve.metrics import Metrics, Samples
from rcm.serve.protocol import HEADER, Message, Picture, ProtocolError, encode_image, read_message
from rcm.serve.viewer import TEXTS, Viewer

LIMITS = Limits(prompt_chars=20, message_bytes=500)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"id": 3, "prompt": " a cat ", "mode": "recache"}', Message(id=3, prompt="a cat", mode="recache")),
        ('{"steps": 4}', Message(steps=(4,))),
        ('{"steps": [4, 2], "context": "noisy", "window": 3, "seed": 0}', Message(steps=(4, 2), context="noisy", window=3, seed=0)),
        ('{"play": false, "prompt": null}', Message(play=False)),
        ('{"ping": 1.5}', Message(ping=1.5)),
    ],
)
def test_messages_that_mean_something(text, expected):
    assert read_message(text, LIMITS) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 400, "is not JSON"),
        ("[1]", "got a list"),
        (b"\xff\xfe", "is not JSON"),
        ('{"prompt": "%s"}' % ("a" * 600), "at most 500 bytes"),
        ('{"prompt": "%s"}' % ("a" * 21), "at most 20 characters"),
        ('{"prompt": " \\u200b"}', "says something"),
        ('{"prompt": "a\\ud800"}', "surrogate"),
        ('{"prompt": 3}', "says something"),
        ('{"promt": "a"}', "unknown 'promt'"),
        ('{"seed": -1}', "seed is a whole number from 0"),
        ('{"seed": 1.5}', "seed is a whole number"),
        ('{"seed": true}', "seed is a whole number"),
        ('{"seed": 99999999999}', "seed is a whole number"),
        ('{"steps": []}', "steps lists 1 to 16"),
        ('{"steps": [0]}', "each of steps"),
        ('{"steps": [65]}', "from 1 to 64"),
        ('{"context": "dirty"}', "clean, noisy"),
        ('{"mode": "x", "prompt": "a"}', "keep, recache"),
        ('{"window": 65}', "window is a whole number from 1 to 64"),
        ('{"play": 1}', "true or false"),
        ('{"ping": NaN}', "ping is a number"),
        ('{"id": [1], "seed": 1}', "id is a number"),
        ("{}", "asks for nothing"),
    ],
)
def test_messages_that_mean_nothing(text, sentence):
    with pytest.raises(ProtocolError, match=sentence):
        read_message(text, LIMITS)


def test_an_error_carries_the_id_of_its_message():
    with pytest.raises(ProtocolError) as error:
        read_message('{"id": 12, "seed": -4}', LIMITS)
    assert error.value.message_id == 12


@pytest.mark.parametrize(
    ("access", "headers", "query", "sentence"),
    [
        (Access(), {"host": "127.0.0.1:80"}, {}, None),
        (Access(), {"host": "[::1]:80"}, {}, None),
        (Access(), {"host": "LOCALHOST:80", "origin": "http://localhost:80"}, {}, None),
        (Access(), {"host": "evil.example", "origin": "http://evil.example"}, {}, "answers to"),
        (Access(), {"host": "127.0.0.1.evil.example"}, {}, "answers to"),
        (Access(), {"host": "[::1"}, {}, "answers to"),
        (Access(), {}, {}, "answers to"),
        (Access(loopback=False), {"host": "any.example"}, {}, None),
        (Access(loopback=False), {"host": "a.example", "origin": "null"}, {}, "may not use"),
        (Access(), {"host": "localhost:80", "origin": "http://localhost:81"}, {}, "may not use"),
        (Access(origins=("http://b.example",)), {"host": "localhost", "origin": "http://b.example"}, {}, None),
        (Access("käse"), {"host": "localhost"}, {"token": "käse"}, None),
        (Access("käse"), {"host": "localhost", "authorization": "Bearer " + "käse".encode().decode("latin-1")}, {}, None),
        (Access("a+b/c="), {"host": "localhost"}, {"token": "a b/c="}, None),  # as ?token=a+b/c= is read
        (Access("x"), {"host": "localhost"}, {"token": "y"}, "a token is needed"),
        (Access("x"), {"host": "localhost"}, {}, "a token is needed"),
        (Access("x"), {"host": "localhost", "authorization": "Bearer x"}, {}, None),
        (Access("x"), {"host": "localhost", "authorization": "Basic x"}, {"token": "z"}, "a token is needed"),
    ],
)
def test_who_may_talk(access, headers, query, sentence):
    refused = access.refusal(headers, query)
    assert refused is None if sentence is None else sentence in refused


def test_pictures_are_read_back():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for kind, worst in (("png", 0), ("jpeg", 255), ("webp", 255)):
        data = Picture(65537, 5, 6, encode_image(pixels, kind, quality=90), kind).message(7, 1.25)
        assert HEADER.unpack_from(data)[2:] == (1, 5, 6, 7, 1.25) and HEADER.size == 24
        image = Image.open(io.BytesIO(data[24:]))
        assert image.format.lower() == kind and image.size == (32, 24)
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= worst


class Socket:
    """A client that takes `room` messages and then nothing more."""

    def __init__(self, room: int) -> None:
        self.room, self.got = room, []

    async def send_bytes(self, data) -> None:
        if len(self.got) >= self.room:
            await asyncio.Event().wait()
        self.got.append(data)

    async def send_text(self, data) -> None:
        await self.send_bytes(json.loads(data))

    async def close(self, code, reason) -> None:
        await self.send_bytes((code, reason))


def test_a_slow_reader_gets_the_newest_pictures_and_is_closed_in_the_end():
    async def story() -> None:
        metrics, socket = Metrics(), Socket(room=3)
        viewer = Viewer(Limits(queue_frames=4, send_s=0.3), metrics)
        for i in range(10):
            viewer.offer(bytes([i]))
        assert viewer.waiting == 4 and viewer.dropped == metrics.dropped == 6
        viewer.tell({"first": True})
        viewer.inform({"timings": True})
        await asyncio.wait_for(viewer.pump(socket), 5)
        assert socket.got == [{"first": True}, b"\x06", b"\x07"], "messages first, then pictures, the oldest are gone"
        assert metrics.closed_slow == 1 and metrics.sent == 2

    asyncio.run(story())


def test_messages_of_a_client_that_does_not_read_are_bounded():
    async def story() -> None:
        viewer, socket = Viewer(Limits(), Metrics()), Socket(room=1000)
        for i in range(10 * TEXTS):
            viewer.tell({"n": i})
        await asyncio.wait_for(viewer.pump(socket), 5)
        assert len(socket.got) == TEXTS + 1 and socket.got[-1][0] == 1008

    asyncio.run(story())


def test_a_list_of_steps_is_not_cut_for_a_network_of_many_steps():
    ode = SamplingRecipe("ode", "c1-1")
    assert _stepped(ode, trained=ode, steps=(7,)).ode_steps == 7
    with pytest.raises(ConfigError, match=r"steps=\[4, 2\] are for a few-step network; .* give one number"):
        _stepped(ode, trained=ode, steps=(4, 2))


def test_rates_and_quantiles():
    bucket = Bucket(rate=2, burst=3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(10.6), bucket.take(10.7), bucket.take(100.0)] == [True, False, True]
    samples = Samples()
    assert samples.quantile(0.5) == 0
    for value in range(100, 0, -1):
        samples.add(value)
    assert [samples.quantile(q) for q in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]


def test_the_command_refuses_what_it_must(monkeypatch, capsys):
    monkeypatch.delenv("RCM_TOKEN", raising=False)
    monkeypatch.setattr(asyncio, "run", lambda serving: serving.close() or 0)  # what is not refused does not serve for ever
    for line, sentence in (
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines; protect it with --token"),
        (["--token", ""], "--token must be a text that clients can send: not empty"),
        (["--token", "a\r"], "--token must be a text that clients can send: not empty, printable"),
        (["--token", "a b"], "--token must be a text that clients can send"),
        (["--token", "a\udcff"], "--token must be a text that clients can send"),
        (["--port", "70000"], "--port 70000 must be at most 65535"),
        (["--ckpt", "nowhere", "--port", "0"], "no checkpoint at nowhere"),
        (["--max_sessions", "0"], "--max_sessions 0 must be at least 1"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "a red cross moving up up up up", "--port", "0"], "does not fit text_len=8"),
        (["--memory_gib", "0.001", "--window", "64", "--port", "0"], "MiB does not fit"),
        *([] if torch.cuda.is_available() else [(["--graphs", "on", "--port", "0"], "graphs='on' needs a CUDA device")]),
    ):
        assert cli.main(["serve", *line]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else real(name, *rest))
    assert cli.main(["serve"]) == 2
    assert 'rcm serve needs uvicorn, which is not installed; install it with: pip install "rcm[serve]"' in capsys.readouterr().err


def test_the_text_of_metrics_is_one_line_a_value():
    metrics = Metrics()
    metrics.chunk.add(0.25)
    lines = metrics.text([("sessions", "open sessions", 2)]).splitlines()
    values = [line for line in lines if not line.startswith("#")]
    assert "rcm_sessions 2" in values and 'rcm_chunk_seconds{quantile="0.99"} 0.25' in values
    assert len({line.rsplit(" ", 1)[0] for line in values}) == len(values)
    assert json.dumps(lines)
