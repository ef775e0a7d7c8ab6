"""Packages of attention that load and cannot be called: `auto` goes on without them and says so
once, a named one is refused in a sentence, and what fails after its trial is an error.
"""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from rcm.core.errors import ConfigError
from rcm.kernels import replay
from rcm.nets import attention_auto, attention_flex
from rcm.nets.attention import resolve
from rcm.nets.attention_auto import Auto, leave_out, left_out
from rcm.nets.attention_dense import Reference
from rcm.nets.attention_packages import WITHOUT_KEY
from rcm.nets.attention_trial import trial
from tests.nets.test_attention_choice import forget
from tests.support.watched import Watched

MODULES = {"flash2": "flash_attn.flash_attn_interface", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
MODULES |= {"te": "transformer_engine.pytorch", "magi": "magi_attention.api"}
TRIED = {"heads": 2, "widths": (16, 16), "dtype": torch.bfloat16, "device": torch.device("cpu")}


class Backward(torch.autograd.Function):
    """A package whose backward pass does not compile."""

    @staticmethod
    def forward(ctx, q, k, v):
        return Reference()(q, k, v, mask=None, scale=q.shape[3] ** -0.5)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("ptxas: no backward")


def sound(q, k, v):
    return Reference()(q, k, v, mask=None, scale=q.shape[3] ** -0.5)


def raising(error: BaseException):
    def attend(*_, **__):
        raise error

    return attend


SYMBOL = ImportError("undefined symbol: _ZN3c104cuda9SetDeviceEi\nand more")
FAULTS = {
    "symbol": (raising(SYMBOL), "ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEi", (False, True)),
    "card": (raising(RuntimeError("no kernel image")), "RuntimeError: no kernel image", (False, True)),
    "another interface": (lambda *_: {}.flash, "AttributeError: 'dict' object has no attribute 'flash'", (False, True)),
    "no backward": (Backward.apply, "RuntimeError: ptxas: no backward", (True,)),
    "no gradient": (lambda *x: sound(*x).detach(), "RuntimeError: element 0 of tensors does not require grad", (True,)),
    "zeros": (lambda *x: 0 * sound(*x), "wrong results: o by 1", (False, True)),
    "NaN": (lambda *x: sound(*x) * torch.nan, "wrong results: o by nan", (False, True)),
    "another scale": (lambda q, k, v: sound(2 * q, k, v), "wrong results: o by", (False, True)),
    "gradient of v": (lambda q, k, v: sound(q, k, v.detach()) + 0 * v, "wrong results: dv by 1 of", (True,)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_trial_tells_what_goes_wrong(name):
    attend, words, found = FAULTS[name]
    for gradient in (False, True):
        told = trial(attend, gradient=gradient, **TRIED)
        assert (told or "").startswith(words if gradient in found else "") and bool(told) == (gradient in found), told
    for error in (torch.OutOfMemoryError("full"), torch.AcceleratorError("CUDA error: out of memory")):
        with pytest.raises(type(error)):
            trial(raising(error), gradient=False, **TRIED)


def test_a_trial_is_not_seen_by_the_caller():
    """Recomputation counts what is saved and done, and its second pass holds no trial."""
    seen, dtypes, state = [], [], torch.random.get_rng_state()

    def attend(q, k, v):
        dtypes.append((q @ q.mT).dtype)
        return replay.kept(lambda: (sound(q, k, v),))[0]

    wide = {**TRIED, "dtype": torch.float16}
    with replay.Tape().recording() as tape, replay.keeping():
        assert trial(attend, gradient=True, **wide) is None and tape.num_results == 0
    with saved_tensors_hooks(seen.append, lambda x: x), Watched(lambda func, _: seen.append(func)), torch.autocast("cpu", torch.bfloat16):
        assert trial(attend, gradient=True, **wide) is None
    with torch.inference_mode():
        assert trial(attend, gradient=True, **wide) is None
    assert not seen and set(dtypes) == {torch.float16} and torch.equal(state, torch.random.get_rng_state())


def install(monkeypatch, name: str, attend) -> list[int]:
    """A module of the name whose function computes by `attend`; tokens of each call."""
    asked: list[int] = []

    def function(q, k, v, **_):
        asked.append(q.shape[1])
        return attend(q, k, v)

    head, _, tail = MODULES[name].partition(".")
    for module_name in {head, MODULES[name]}:
        module = types.ModuleType(module_name)
        module.__spec__, module.__path__ = types.SimpleNamespace(name=module_name), []
        module.__version__, module.flash_attn_func = "2.9.9", function
        module.DotProductAttention = raising(TypeError("an unexpected keyword argument 'qkv_format'"))
        monkeypatch.setitem(sys.modules, module_name, module)
    return asked


def inputs(length: int = 4) -> torch.Tensor:
    return torch.randn(1, length, 2, 16).bfloat16()


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_a_named_package_that_fails_is_refused_in_a_sentence(name, monkeypatch):
    asked, q = install(monkeypatch, name, raising(SYMBOL)), inputs()
    for _ in range(2):
        with pytest.raises(ConfigError) as refused:
            resolve(name)(q, q, q, mask=None, scale=0.25)
    told = str(refused.value)
    assert told.startswith(
        f"attention backend '{name}' is not available: {MODULES[name]} 2.9.9 loads and fails at its first call, forward of"
    )
    assert (
        "(ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEi): install a build for torch" in told
        and "choose attention_backend" in told
    )
    assert len(asked) == 1, "tried once"


@pytest.mark.parametrize("name", ["flash3", "flex_flash"])
def test_recomputation_may_end_inside_a_package(name, monkeypatch):
    """Torch leaves a recomputed layer by an exception once it has what was saved: no failure."""
    install(monkeypatch, name if name in MODULES else "flash4", sound)
    backend, x = resolve(name), inputs().requires_grad_()

    def compiled(q, k, v, **_):
        return sound(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def layer(x):
        return backend(x, x, x, mask=None, scale=0.25)

    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(attention_flex, "wants_gradient", lambda *_: False)  # it refuses a CPU's
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).float().square().sum(), x)
    (wanted,) = torch.autograd.grad(sound(x, x, x).float().square().sum(), x)
    torch.testing.assert_close(got, wanted)


def test_a_package_computes_on_the_card_of_its_inputs(monkeypatch):
    """Some launch on whatever card is current; memory that runs out under them is no failure."""
    seen, current = [], ["cuda:0"]

    class Guard:
        def __init__(self, device):
            self.before = current[0]
            current[0] = str(device)

        __enter__, __exit__ = (lambda self: None), (lambda self, *_: current.__setitem__(0, self.before))

    class Second:
        is_cuda, device, dtype, shape, requires_grad = True, torch.device("cuda", 1), torch.bfloat16, (1, 8, 2, 16), False

    def function(q, k, v):
        seen.append(current[0])
        return raising(torch.AcceleratorError("CUDA error: out of memory"))() if len(seen) > 1 else q

    install(monkeypatch, "flash4", function)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    backend = resolve("flash4")
    monkeypatch.setattr(backend, "problem", lambda *_: None)
    assert isinstance(backend(Second(), Second(), Second(), mask=None, scale=1.0), Second)
    with pytest.raises(torch.AcceleratorError):
        backend(Second(), Second(), Second(), mask=None, scale=1.0)
    assert seen == ["cuda:1", "cuda:1"] and current == ["cuda:0"]


def test_transformer_engine_of_another_interface(monkeypatch):
    install(monkeypatch, "te", sound)
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    with pytest.raises(
        ConfigError, match=r"'te' is not available: transformer_engine\.pytorch 2\.9\.9 loads and fails .*TypeError: an unexp"
    ):
        resolve("te")(inputs(), inputs(), inputs(), mask=None, scale=0.25)


def test_flex_flash_names_the_package_whose_code_does_not_compile(monkeypatch):
    install(monkeypatch, "flash4", sound)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: raising(TypeError("Expected TensorSSA, but got int")))
    with pytest.raises(
        ConfigError, match=r"'flex_flash' failed: flash_attn\.cute 2\.9\.9 raised TypeError: Expected TensorSSA.*choose attention_b"
    ):
        resolve("flex_flash")(inputs(), inputs(), inputs(), mask=None, scale=0.25)
    with pytest.raises(TypeError):
        resolve("flex")(inputs(), inputs(), inputs(), mask=None, scale=0.25)


class Long:
    """A long call of a card, on a machine without one."""

    is_cuda, device, dtype = True, torch.device("cpu"), torch.bfloat16

    def __init__(self, *, gradient: bool = False, heads: int = 2) -> None:
        self.shape, self.requires_grad = (1, 32760, heads, 128), gradient


@pytest.fixture
def auto(monkeypatch):
    """`auto` on such a machine, and the calls that its own back end got."""
    forget(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # that of `Long`
    own: list[Long] = []
    monkeypatch.setattr(attention_auto, "SDPA", lambda: lambda q, *_, mask, scale: own.append(q))
    made = Auto()
    made.own = own
    return made


def ask(auto: Auto, q: Long) -> list[str]:
    """One call; warnings that came with it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        auto(q, q, q, mask=None, scale=128**-0.5)
    return [str(warning.message) for warning in said]


def returning(q, k, v):
    """Computes in the trial; of `Long` there is nothing to compute."""
    return q if isinstance(q, Long) else sound(q, k, v)


def test_auto_goes_on_without_what_fails_and_says_so_once(auto, monkeypatch):
    asked = install(monkeypatch, "flash3", raising(SYMBOL))
    (told,) = ask(auto, Long())
    assert told.startswith(
        "auto goes on without it: attention backend 'flash3' is not available: flash_attn_interface 2.9.9 loads and fails"
    )
    assert "undefined symbol" in told and told.endswith(f"{WITHOUT_KEY}=flash3 leaves it out from the start")
    assert ask(auto, Long()) == ask(Auto(), Long()) == [] and asked == [128]
    assert len(auto.own) == 3 and left_out() == {("flash3", 2, False)}
    monkeypatch.setenv("RANK", "3")
    (told,) = ask(auto, Long(heads=4))
    assert told.startswith("rank 3: auto goes on"), "another kind of call has its own trial"


def test_auto_takes_the_next_package_where_one_has_no_backward_pass(auto, monkeypatch):
    third = install(monkeypatch, "flash3", lambda q, k, v: q if isinstance(q, Long) else Backward.apply(q, k, v))
    fourth = install(monkeypatch, "flash4", returning)
    assert ask(auto, Long()) == [] and third == [128, 32760]
    (told,) = ask(auto, Long(gradient=True))
    assert "forward and backward" in told and "ptxas: no backward" in told
    assert fourth == [128, 32760] and auto.decisions["dense, long"] == "flash4"
    assert ask(auto, Long()) == ask(auto, Long(gradient=True)) == [] and not auto.own
    assert third == [128, 32760, 128, 32760] and fourth == [128, 32760, 32760]


def test_a_later_failure_is_an_error_not_another_back_end(auto, monkeypatch):
    calls = install(monkeypatch, "flash3", lambda q, k, v: raising(RuntimeError("launch"))() if len(calls) > 2 else returning(q, k, v))
    assert ask(auto, Long()) == []
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=rf"'flash3' failed: flash_attn_interface 2.9.9 raised RuntimeError: launch .*{WITHOUT_KEY}=flash3"
        ):
            ask(auto, Long())
    assert not auto.own
    install(monkeypatch, "flash2", lambda q, k, v: raising(torch.OutOfMemoryError("full"))() if q.shape[1] < 9 else sound(q, k, v))
    with pytest.raises(torch.OutOfMemoryError):
        resolve("flash2")(inputs(), inputs(), inputs(), mask=None, scale=0.25)


def test_memory_that_runs_out_in_a_trial_decides_nothing(auto, monkeypatch):
    asked = install(
        monkeypatch, "flash3", lambda q, k, v: raising(torch.OutOfMemoryError("full"))() if len(asked) == 1 else returning(q, k, v)
    )
    with pytest.raises(torch.OutOfMemoryError):
        ask(auto, Long())
    assert ask(auto, Long()) == [] and asked == [128, 128, 32760] and not left_out()


def test_packages_that_the_environment_leaves_out_are_not_asked(auto, monkeypatch):
    third, fourth = install(monkeypatch, "flash3", returning), install(monkeypatch, "flash4", returning)
    monkeypatch.setenv(WITHOUT_KEY, "flash3")
    assert ask(auto, Long()) == [] and not third and fourth
    monkeypatch.setenv(WITHOUT_KEY, "flash3, flash4")
    assert ask(auto, Long(heads=4)) == [] and len(auto.own) == 1
    monkeypatch.setenv(WITHOUT_KEY, "flash5")
    with pytest.raises(
        ConfigError, match=rf"{WITHOUT_KEY} names flash5, which auto never chooses .*; name some of flash3, flash4, or unset"
    ):
        Auto()


def test_what_fails_on_another_rank_is_left_out_here(auto, monkeypatch):
    asked = install(monkeypatch, "flash3", returning)
    assert ask(auto, Long()) == [] and not auto.own
    with pytest.warns(UserWarning, match="auto goes on without it: 'flash3' does not work on another rank"):
        leave_out({("flash3", 2, False)})
    ask(auto, Long())
    assert len(auto.own) == 1 and asked == [128, 32760]
    assert ask(auto, Long(gradient=True)) == [] and len(auto.own) == 1, "calls of other kinds stay"
    assert attention_auto.left_out() == {("flash3", 2, False)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_recomputed_layers_on_a_card(works, reentrant, monkeypatch):
    """A trial on the way forward, or (reentrant: without gradient, then with) on the way back."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("auto takes packages on compute capability 9.0")
    forget(monkeypatch)

    def fused(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, scale=q.shape[3] ** -0.5).transpose(1, 2)

    asked = install(monkeypatch, "flash3", fused if works else lambda *x: Backward.apply(*x) if len(x[0][0]) == 128 else fused(*x))
    x, auto = torch.randn(1, 32760, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True), Auto()

    def layer(x):
        return auto(x, x, x, mask=None, scale=128**-0.5)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = checkpoint(layer, x, use_reentrant=reentrant)
        out.float().square().sum().backward()
    told = [str(warning.message) for warning in said if "goes on without" in str(warning.message)]
    assert len(told) == (not works) and asked[:1] == [128]
    wanted = fused(x, x, x)
    (exact,) = torch.autograd.grad(wanted.float().square().sum(), x)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-3)
    assert (x.grad - exact).norm() < 1e-2 * exact.norm()
