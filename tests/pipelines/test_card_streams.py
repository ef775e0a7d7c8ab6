"""The host's side of work on a card, with stand-ins for it: the order of streams, captures that end
early, points in time of another card than the current one, settings that threads share.
"""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from rcm.core.device_copy import out_of_memory
from rcm.core.dtypes import Precision
from rcm.core.process_wide import ProcessWide
from rcm.encoders.wan_vae_stream import EXACT, DecodeStream
from rcm.inference.causal_report import Stopwatch
from rcm.kernels import precompile
from rcm.kernels.cuda_graph import CudaGraph
from rcm.nets.attention_dense import CUDNN_ALONE
from rcm.nets.denoiser import Denoiser
from rcm.parallel.host import Waiting
from rcm.pipelines.decode_lane import DecodeLane
from rcm.pipelines.stream_spec import StreamCancelled
from rcm.rollout.eviction.sliding_window import SlidingWindow
from tests.pipelines.test_session import opened, spec
from tests.support.tiny_nets import tiny_net

SECOND = torch.device("cuda", 1)


class Lane:
    """A stream that notes what it waits for."""

    priority = 0

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: Lane) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


class Decoder:
    def __init__(self, told: list[str]) -> None:
        self.restart, self.state_copy = (lambda: told.append("restart")), (lambda: told.append("copy"))
        self.load_state = lambda _: told.append("load")


@pytest.mark.parametrize(("method", "arguments", "word"), [("restart", (), "restart"), ("state", (), "copy"), ("load_state", (0,), "load")])
def test_memory_of_a_decoder_is_touched_between_its_decodes(monkeypatch, method, arguments, word):
    """A step that failed may have left one under way on a stream of its own."""
    told: list[str] = []
    codec = SimpleNamespace(stream=lambda: Decoder(told))
    lane = DecodeLane(codec, device=torch.device("cpu"), own_stream=False, graphs="off", to_host=False)
    lane._stream = Lane("lane", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Lane("caller", told))
    getattr(lane, method)(*arguments)
    assert told == ["caller waits for lane", word, "lane waits for caller"]


def test_a_decoder_in_host_memory_serves_a_stream_on_a_card():
    class Codec:
        device = torch.device("cpu")

        def stream(self):
            return SimpleNamespace(decode_chunk=lambda x: x[:, :3])

    lane = DecodeLane(Codec(), device=SECOND, own_stream=True, graphs="on", to_host=True)
    frames, images = lane.decode(torch.zeros(1, 4, 1, 2, 2)).result()
    assert frames.shape == (1, 3, 1, 2, 2) and images.dtype == torch.uint8


def test_what_ends_a_captured_step_is_told(monkeypatch):
    """Not what the capture says of a step that broke off, branches unjoined."""
    ended, broken = [], [True, False, False, True]

    class Graph:
        def capture_begin(self, *_, **__):
            pass

        def capture_end(self):
            ended.append("end")
            if broken[len(ended) - 1]:
                raise torch.AcceleratorError("CUDA error: operation failed due to unjoined work")

    def full() -> None:
        raise torch.OutOfMemoryError("full")

    fakes = {"CUDAGraph": Graph, "Stream": lambda *_, **__: Lane("side", []), "current_stream": lambda _: Lane("now", [])}
    for name, fake in {**fakes, "device": lambda _: nullcontext(), "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            CudaGraph(full, SECOND)
    CudaGraph(lambda: None, SECOND)
    with pytest.raises(torch.AcceleratorError):
        CudaGraph(lambda: None, SECOND)
    assert ended == ["end"] * 4


def test_points_in_time_are_those_of_the_device(monkeypatch):
    on: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(record=on.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    Stopwatch(SECOND).now()
    assert on == ["stream of cuda:1"]


def test_a_step_is_captured_once_it_has_run(monkeypatch):
    """What a step compiles, none of it may be left to a capture."""
    frames, calls = torch.zeros(1, 1, 2, 2, 16), []

    def step(given, state):
        calls.append("run")
        if len(calls) == 1:
            raise torch.OutOfMemoryError("full")
        return given

    vae = SimpleNamespace(device=torch.device("cpu"), generation=0, decode_step=step)
    stream = DecodeStream(vae, SimpleNamespace(to=lambda _: None))
    stream._graphs = "on"
    captured = SimpleNamespace(replay=lambda given: given)
    monkeypatch.setattr("rcm.encoders.wan_vae_stream._CapturedStep", lambda *_: calls.append("captured") or captured)
    with pytest.raises(torch.OutOfMemoryError):
        stream._step(frames, SimpleNamespace(started=True))
    for _ in range(3):
        stream._step(frames, SimpleNamespace(started=True))
    assert calls == ["run", "run", "captured"]


def test_weights_that_came_before_memory_ran_out_are_waited_for(monkeypatch):
    waited, room = [], [False]

    class Shelf:
        def __init__(self, name: str, *, small: bool) -> None:
            self.name, self.small, self.away = name, small, True

        def arrive(self, *, stream):
            if not self.away:
                return None
            if not (self.small or room[0]):
                raise torch.OutOfMemoryError("full")
            self.away = False
            return self.name

    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList()
    waiting = Waiting(net, lambda *_: None)
    waiting._shelves = [Shelf("first", small=True), Shelf("second", small=False)]
    waiting._stream = SimpleNamespace(device=SECOND)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(wait_event=waited.append))
    with pytest.raises(torch.OutOfMemoryError):
        waiting.arrive()
    room[0] = True
    waiting.arrive()
    assert waited == ["first", "second"] and not waiting.away


def test_a_pass_that_failed_keeps_no_memory(monkeypatch):
    """Its traceback would: of a pass that ran out of memory, all that there was, for as long as the
    session is held.
    """
    session = opened(Denoiser(tiny_net(), Precision.preset("fp64")).eval_params(), spec(policy=SlidingWindow(3)))
    made: list[weakref.ref] = []

    def full(*_, **__):
        activations = torch.zeros(3)
        made.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(session.loop.denoiser.net.blocks[-1], "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        session.step()
    gc.collect()
    assert made[0]() is None
    with pytest.raises(StreamCancelled, match="OutOfMemoryError: full"):
        session.step()


RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def test_memory_that_ran_out_is_known_by_whoever_says_so():
    assert all(map(out_of_memory, RAN_OUT))
    others = (RuntimeError("out of resource: shared memory, Required: 300000"), ValueError("out of memory"), KeyboardInterrupt())
    assert not any(map(out_of_memory, others))


def test_settings_of_the_process_go_back_with_the_last_thread_that_needs_them():
    value = ["own"]

    @contextmanager
    def change():
        before, value[0] = value[0], "changed"
        yield
        value[0] = before

    scope = ProcessWide(change)
    scope.__enter__()
    scope.__enter__()
    scope.__exit__(None, None, None)
    assert value == ["changed"]
    scope.__exit__(None, None, None)
    with scope:
        assert value == ["changed"]
    assert value == ["own"]


def test_two_plans_at_once_leave_the_turns_of_threads_as_they_were():
    before = sys.getswitchinterval()
    with precompile.QUICK_TURNS:
        with precompile.QUICK_TURNS:
            pass
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == pytest.approx(before)


def test_two_calls_of_cudnn_at_once_leave_torch_its_other_kernels():
    with CUDNN_ALONE:
        with CUDNN_ALONE:
            assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("general", ["none", "tf32", "ieee"])
def test_convolutions_of_a_codec_are_exact_whatever_the_process_chose(general):
    cudnn = torch.backends.cudnn
    kept = torch.backends.fp32_precision, cudnn.conv.fp32_precision
    try:
        torch.backends.fp32_precision = general
        before = cudnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic
        with EXACT:
            assert cudnn.conv.fp32_precision == "ieee" or (general == "none" and not cudnn.allow_tf32)
        if general != "none":  # else torch's own flags, which name what they found
            assert (cudnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic) == before
    finally:
        torch.backends.fp32_precision, cudnn.conv.fp32_precision = kept
