"""`auto` follows its table of measurements, by shape, device, dtype and gradient; nothing is
replaced silently.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels import replay
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from rcm.nets import attention_auto
from rcm.nets.attention_auto import Auto, Fused, choose, choose_dense
from rcm.nets.attention_dense import Cudnn
from rcm.nets.attention_packages import NotInstalled

PATTERN = BlockPattern(3, 3)


class Shaped:
    """What the rules may look at, without the memory: the largest case has a billion pairs."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, *shape: int, dtype=torch.bfloat16, grad: bool = True) -> None:
        self.shape, self.dtype, self.requires_grad = shape, dtype, grad


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def chosen(mask, *, heads: int = 12, width: int = 128, length: int | None = None, **options) -> str:
    q_len, kv_len = (length, length) if mask is None else (mask.q_len, mask.kv_len)
    q, k = Shaped(1, q_len, heads, width, **options), Shaped(1, kv_len, heads, width, **options)
    return choose(q, k, k, mask=mask)


def forced(tokens_per_frame: int, frames: int = 21) -> TeacherForcing:
    return TeacherForcing(PATTERN, frames, tokens_per_frame)


def test_training_shapes():
    assert chosen(forced(1560)) == "triton + cudnn"
    assert chosen(forced(1560), heads=3) == "triton + cudnn", "heads of one of four context-parallel ranks"
    assert chosen(forced(1560), grad=False) == "triton"
    with torch.no_grad():
        assert chosen(forced(1560)) == "triton"
    assert chosen(BlockCausal(PATTERN, 21, 1560, window=3, sinks=1)) == "triton + cudnn"


def forget(monkeypatch) -> None:
    """What this process decided so far, for the time of a test."""
    monkeypatch.setattr(attention_auto, "_chosen", {})
    monkeypatch.setattr(attention_auto, "_left_out", set())
    attention_auto._say_once.cache_clear()


@pytest.fixture
def packages(monkeypatch):
    """Which of FlashAttention-3 and -4 are there, to be filled in; what they were asked for."""
    here, asked = [], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class Package:
        def __init__(self, name):
            self.name = name

        def problem(self, q, k, v):
            return None

        def __call__(self, q, k, v, *, mask, scale):
            asked.append((self.name, q.shape[1], mask, scale))

    def loaded(name):
        if name not in here:
            raise NotInstalled(name) if f"broken {name}" not in here else ConfigError(f"{name} does not load")
        return Package(name)

    for kind in (attention_auto.Flash3, attention_auto.Flash4, attention_auto.MaskedFlash4):
        monkeypatch.setattr(kind, "loaded", lambda kind=kind: loaded(kind.name))
    forget(monkeypatch)
    return here, asked


@pytest.mark.parametrize(
    ("here", "expected"), [((), "sdpa"), (("flash4",), "flash4"), (("flash3", "flash4"), "flash3"), (("broken flash3", "flash4"), "flash4")]
)
def test_long_dense_calls_take_an_installed_flash_attention(here, expected, packages):
    packages[0].extend(here)
    q = Shaped(1, 32760, 12, 128)
    if "broken flash3" in here:
        with pytest.warns(UserWarning, match="auto goes on without it: flash3 does not load"):
            assert choose_dense(q, q, q) == expected
    assert choose_dense(q, q, q) == expected


def test_what_was_not_measured_of_flash_attention_stays_with_sdpa(packages, monkeypatch):
    here, asked = packages
    here.append("flash3")
    auto, q, short = Auto(), Shaped(1, 32760, 12, 128), Shaped(1, 32759, 12, 128)
    monkeypatch.setattr(auto, "_sdpa", lambda q, *_, mask, scale: asked.append(("sdpa", q.shape[1], mask, scale)))
    auto(q, q, q, mask=None, scale=0.5)
    auto(q, short, short, mask=None, scale=0.5)
    assert asked == [("flash3", 32760, None, 0.5), ("sdpa", 32760, None, 0.5)]
    assert auto.decisions == {"dense": "sdpa", "dense, long": "flash3"}
    for other in (Shaped(1, 32760, 12, 64), Shaped(1, 32760, 12, 128, dtype=torch.float16), Shaped(1, 32760, 12, 128, dtype=torch.float32)):
        assert choose_dense(other, other, other) == "sdpa"
    with replay.keeping():
        assert choose_dense(q, q, q) == "sdpa", "recomputation keeps torch's own operators only"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_dense(q, q, q) == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose_dense(q, q, q) == "sdpa"


def test_long_masked_calls_take_the_gradient_of_flash_attention_4(packages, monkeypatch):
    here, asked = packages
    assert chosen(forced(1560)) == "triton + cudnn"
    forget(monkeypatch)
    here += ["flash3", "flash4"]
    with replay.keeping():
        assert chosen(forced(1560)) == chosen(forced(1560), heads=3) == "triton + flash4", "the forward is this package's, and kept"
    for others in ({"grad": False}, {"dtype": torch.float16}, {"width": 64}):
        assert "flash4" not in chosen(forced(1560), **others)
    assert chosen(forced(779)) == "triton + cudnn", "32,718 tokens were not measured"
    auto, mask = Auto(), forced(1560)
    q = Shaped(1, mask.q_len, 12, 128)
    auto(q, q, q, mask=mask, scale=0.5)
    assert asked == [("flash4", 65520, mask, 0.5)] and auto.decisions["masked with gradient"] == "triton + flash4"
    forget(monkeypatch)
    monkeypatch.setenv("RCM_ATTENTION_WITHOUT", "flash4")
    assert chosen(forced(1560)) == "triton + cudnn"


def test_dense_calls_stay_with_sdpa():
    assert chosen(None, length=32760) == chosen(Full(32760, 512)) == chosen(BlockCausal(PATTERN, 6, 1560, q_block_offset=1)) == "sdpa"


def test_captured_dense_calls_fill_all_processors(monkeypatch):
    """The persistent kernel where it is measured to be the faster and there is no obstacle, else
    cuDNN in parts; only captured, without gradient.
    """
    ran, obstacles = [], []
    monkeypatch.setattr(attention_auto, "PERSISTENT_KEYS", 4000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(attention_auto, "persistent_obstacle", lambda *_: obstacles[0] if obstacles else None)
    monkeypatch.setattr(attention_auto, "persistent_attention", lambda *_, scale: ran.append(("persistent", scale)))
    monkeypatch.setattr(attention_auto, "split_attention", lambda *_, scale, parts: ran.append((parts, scale)))
    auto, (q, k) = Auto(), (Shaped(1, n, 12, 128, grad=False) for n in (1560, 32760))
    monkeypatch.setattr(auto, "_sdpa", lambda *_, mask, scale: ran.append(("sdpa", scale)))
    for captured in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
        auto(q, k, k, mask=None, scale=0.5)
    assert auto.decisions["dense, captured"] == "persistent kernel"
    auto(q, Shaped(1, 512, 12, 128, grad=False), k, mask=None, scale=0.5)
    auto(Shaped(1, 1560, 12, 128), k, k, mask=None, scale=0.5)
    obstacles.append("of another width")
    auto(q, k, k, mask=Full(1560, 32760), scale=0.5)
    assert ran == [("sdpa", 0.5), ("persistent", 0.5), ("sdpa", 0.5), ("sdpa", 0.5), (5, 0.5)]
    assert auto.decisions["dense, captured"] == "cudnn in parts"


def test_small_masks_are_a_matrix():
    assert chosen(forced(96)) == "matrix", "4,032 tokens: 1.33 against 2.88 ms"
    assert chosen(forced(96), grad=False) == "triton", "4,032 tokens: 0.39 against 0.31 ms"
    assert chosen(forced(48), grad=False) == "matrix", "2,016 tokens: 0.14 against 0.19 ms"
    assert chosen(forced(192)) == "triton + cudnn", "8,064 tokens: 4.72 against 2.38 ms"
    assert chosen(forced(250), heads=1) == "triton + cudnn", "a matrix never exceeds 64 MiB"


def test_what_the_fused_kernels_do_not_take():
    assert chosen(forced(1560), dtype=torch.float64) == "sdpa"
    assert chosen(forced(1560), dtype=torch.float32) == "sdpa"
    assert chosen(forced(1560), dtype=torch.float32, grad=False) == "triton"
    assert chosen(forced(1560), width=12) == "sdpa"
    assert chosen(forced(1560), width=36) == "sdpa", "no fused backward for this head size"
    assert chosen(forced(1560), width=36, grad=False) == "triton"


def test_reproducible_runs_avoid_atomic_sums():
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(forced(1560)) == "triton + flash"
    finally:
        torch.use_deterministic_algorithms(False)


def test_blocks_of_one_key_avoid_cudnn():
    assert chosen(TeacherForcing(BlockPattern(1, 1), 60, 1), heads=30_000) == "triton + flash"


def test_cards_without_measurement_keep_dense_calls(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert chosen(forced(1560)) == "sdpa"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("triton", ("triton", "cudnn")), ("triton + cudnn", ("triton", "cudnn")), ("triton + flash", ("triton", "flash"))],
)
def test_the_choice_is_carried_out_and_noted(choice, expected, monkeypatch):
    ran = []

    def spy(q, k, v, *, mask, scale, forward, backward):
        ran.append((forward, backward, mask, scale))
        return q

    monkeypatch.setattr(attention_auto, "choose", lambda q, k, v, *, mask: choice)
    monkeypatch.setattr(attention_auto, "masked_attention", spy)
    auto, mask = Auto(), forced(1)
    q = torch.zeros(1, mask.q_len, 1, 8)
    auto(q, q, q, mask=mask, scale=0.5)
    assert ran == [(*expected, mask, 0.5)]
    assert auto.decisions["masked"] == choice
    monkeypatch.setattr(attention_auto, "choose", lambda q, k, v, *, mask: "matrix")
    auto(q, q, q, mask=mask, scale=0.5)
    auto(q, q, q, mask=mask, scale=0.5)
    assert auto.decisions["masked"] == f"{choice}, matrix", "every choice once"


def test_named_back_ends_refuse_what_they_cannot_do():
    q = torch.zeros(1, 63, 1, 16, requires_grad=True)
    with pytest.raises(
        ConfigError, match="'triton' does not apply: it needs a CUDA device, the inputs are on cpu; choose attention_backend"
    ):
        Fused()(q, q, q, mask=forced(3), scale=1.0)
    with pytest.raises(ConfigError, match="'cudnn' needs bfloat16 or float16 on a CUDA device, got torch.float32 on cpu"):
        Cudnn()(q, q, q, mask=None, scale=1.0)
    on_card = Shaped(1, 63, 1, 16, dtype=torch.float32)
    with pytest.raises(ConfigError, match="backward cudnn: it needs bfloat16 or float16, got torch.float32; backward flash: it needs"):
        Fused()(on_card, on_card, on_card, mask=forced(3), scale=1.0)
