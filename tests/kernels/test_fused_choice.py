"""Which of a layer's two forms runs, and that nothing replaces the other silently."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.kernels.fused import choice
from tests.support.watched import SilentKernel, Watched

CPU = torch.randn(2, 3, 4, 8)


class Anywhere:
    """What the rule reads of a tensor."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, elements: int = 1 << 24) -> None:
        self.dtype, self.device, self.is_cuda, self.elements = dtype, torch.device("cuda"), True, elements

    def numel(self) -> int:
        return self.elements


def test_rule_of_auto_on_and_off(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not choice.use_fused("auto", CPU, width=8) and not choice.use_fused("off", Anywhere(), width=8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choice.use_fused("auto", Anywhere(dtype), width=5120) and choice.use_fused("on", Anywhere(dtype), width=5120)
    for x, width in ((Anywhere(torch.float64), 8), (Anywhere(), choice.MAX_WIDTH + 1)):
        assert not choice.use_fused("auto", x, width=width)
        with pytest.raises(ConfigError, match=r"fused_layers=on.*auto or off"):
            choice.use_fused("on", x, width=width)
    small = Anywhere(elements=choice.LAUNCH_BOUND - 1)
    assert choice.use_fused("auto", small, width=8), "with gradient"
    with torch.no_grad():
        assert not choice.use_fused("auto", small, width=8) and choice.use_fused("on", small, width=8)
        assert choice.use_fused("auto", Anywhere(elements=choice.LAUNCH_BOUND), width=8)
        with forward_ad.dual_level():
            assert choice.use_fused("auto", small, width=8), "tangent pass"
    with pytest.raises(ConfigError, match="CUDA device, the input is on cpu"):
        choice.use_fused("on", CPU, width=8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not choice.use_fused("auto", Anywhere(), width=8)
    with pytest.raises(ConfigError, match="compiled code"):
        choice.use_fused("on", Anywhere(), width=8)


def test_unknown_setting_names_the_choices():
    with pytest.raises(ConfigError, match=r"'yes'.*fused_layers.*auto, on, off"):
        choice.check_setting("yes")


def test_misfits_and_tangents_with_gradient_raise():
    api = pytest.importorskip("rcm.kernels.fused.api")
    weight = torch.ones(8)
    with pytest.raises(ValueError, match="gain must be .* got \\(7,\\)"):
        api.rms_norm(CPU, torch.ones(7), eps=1e-6)
    with pytest.raises(ValueError, match="gain must be"):
        api.modulated_norm(CPU, torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, 8), eps=1e-6, dtype=CPU.dtype)
    with pytest.raises(ValueError, match="1 to 4 dimensions"):
        api.rms_norm(CPU[None], weight, eps=1e-6)
    with pytest.raises(ValueError, match="one shape and dtype"):
        api.gated_add(CPU, CPU.double(), weight)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"under no_grad.*fused_layers=off"):
        api.gelu_tanh(forward_ad.make_dual(CPU.clone().requires_grad_(), CPU))


def test_plain_norms_keep_the_dtype_of_a_tangent_that_only_the_weights_have():
    from rcm.kernels.fused import reference

    x, weight = CPU.bfloat16(), torch.ones(8, dtype=torch.bfloat16)
    for norm in (lambda w: reference.rms_norm(x, w, eps=1e-6), lambda w: reference.affine_norm(x, w, weight, eps=1e-6)):
        value, tangent = jvp(norm, (weight,), (weight,))
        assert value.dtype == tangent.dtype == torch.bfloat16


def test_packing_value_and_tangent_copies_nothing(monkeypatch):
    """`make_dual` copies a tangent into fresh zeros when the primal is a view of something
    larger.
    """
    api = pytest.importorskip("rcm.kernels.fused.api")
    for module, kernel in ((api.launch.norm_kernels, "norm_tangent"), (api.launch.pointwise_kernels, "gated_add_forward")):
        monkeypatch.setattr(module, kernel, SilentKernel())
    for kernel in ("gelu_forward", "rotate_pairs"):
        monkeypatch.setattr(api.launch.pointwise_kernels, kernel, SilentKernel())
    row, weight, table = torch.ones(2, 3, 1, 8), torch.ones(8), torch.ones(4, 4)
    heads = torch.randn(2, 4, 2, 8)
    calls = {
        "modulated norm": (lambda x: api.modulated_norm(x, row, row, eps=1e-6, dtype=x.dtype), CPU),
        "rms norm": (lambda x: api.rms_norm(x, weight, eps=1e-6), CPU),
        "gated add": (lambda x: api.gated_add(x, x, row), CPU),
        "gelu": (api.gelu_tanh, CPU),
        "rotation": (lambda x: api.rotate_pairs(x, table, table), heads),
    }
    for name, (call, x) in calls.items():
        names: list[str] = []
        with Watched(lambda func, _, names=names: names.append(func.name())):
            jvp(call, (x.clone(),), (x.clone(),))
        copies = [done for done in names if any(word in done for word in ("copy", "zeros", "clone", "fill"))]
        assert copies == ["aten::clone"] * 2, f"{name}: {copies}"
