"""A thousand sessions, opened in every way and left in the middle: nothing is kept of them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.nets.denoiser import Denoiser
from rcm.pipelines import course, engine
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.autoregressive import ChunkLoop
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.sliding_window import SlidingWindow
from tests.pipelines.test_session_codec import CODECS, NOISY, RECIPE
from tests.pipelines.test_stream_finite import Decoder
from tests.support.rerun_loop import RerunLoop
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

WINDOW = SlidingWindow(2)
KINDS = (
    lambda i: {"policy": WINDOW},
    lambda i: {"policy": WINDOW, "kv_codec": CODECS["int4"]},
    lambda i: {"policy": DeepForcing(1, 3, 1)},
    lambda i: {"num_frames": 4, "noise": "video", "generator": torch.Generator().manual_seed(i)},
    lambda i: {"policy": WINDOW, "look_ahead": True},
)


def lived(model: Denoiser, i: int) -> None:
    """Opened, stepped, changed, restored, restarted or cancelled; mostly closed."""
    spec = StreamSpec(NOISY if i % 3 else RECIPE, (4, HEIGHT, WIDTH), batch=2, **KINDS[i % len(KINDS)](i))
    cond, other = (condition(tiny_config(), dtype=torch.float32, seed=seed) for seed in (2, 5))
    session = Session(model, Decoder(), cond, spec)
    session.step()
    state = session.snapshot()
    session.step()
    session.set_condition(other, mode="keep" if isinstance(spec.policy, DeepForcing) else "recache")
    if i % 4 == 0:
        session.restore(state)
    if i % 4 == 1:
        session.restart(seed=3)
    if i % 4 == 2:
        session.cancel()
    else:
        session.step()
    if i % 7:
        session.close()


def held() -> tuple[int, int, int]:
    """Tensors, objects, and MiB of this process."""
    gc.collect()
    objects = gc.get_objects()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
    return sum(issubclass(type(x), torch.Tensor) for x in objects), len(objects), resident


@pytest.mark.slow
def test_a_thousand_sessions_leave_nothing(monkeypatch):
    model = Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()

    def cycle(i: int) -> None:
        monkeypatch.setattr(engine, "ChunkLoop", RerunLoop if i % 2 else ChunkLoop)
        lived(model, i)

    for i in range(140):
        cycle(i)
    monkeypatch.undo()
    tensors, objects, resident = held()
    for i in range(1000):
        cycle(i)
    monkeypatch.undo()
    after = held()
    assert after[0] <= tensors and after[1] <= objects + 200 and after[2] <= resident + 4, (after, tensors, objects, resident)
    assert not course._held
