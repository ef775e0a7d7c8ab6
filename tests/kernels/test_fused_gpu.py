"""The fused layers on a real GPU: three dtypes against float64, widths of the published networks,
reproducibility, 64-bit addresses.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from rcm.kernels.fused import api, reference
    from tests.support.fused_cases import cases, errors
    from tests.support.tiny_nets import GRID, condition, latents, pattern, tiny_net

    CASES = cases(tokens=131, width=320, odd=77, heads=(117, 5, 128))
else:
    CASES = {}


@pytest.fixture(autouse=True)
def poisoned():
    """Deterministic mode fills fresh memory with NaN: an element that no program writes is
    noticed.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype):
    for output, error, budget in errors(CASES[name], dtype, device="cuda"):
        assert error <= budget, f"{output}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("width", [1536, 5120, 8192])
def test_widths_of_published_networks(width):
    chosen = cases(tokens=40, width=width, odd=width - 1, heads=(5, 2, 128))
    for name in ("modulation per frame", "modulation shared, odd width", "affine norm", "rms norm", "gate per frame"):
        for output, error, budget in errors(chosen[name], torch.bfloat16, device="cuda"):
            assert error <= budget, f"{name}, {output}: error {error:.2e}, budget {budget:.2e}"


def test_gradients_repeat_bit_for_bit():
    x, scale = torch.randn(2, 3, 1000, 256, device="cuda").bfloat16(), torch.randn(2, 3, 1, 256, device="cuda", requires_grad=True)
    shift = torch.randn_like(scale).requires_grad_()
    runs = []
    for _ in range(3):
        api.modulated_norm(x, shift, scale, eps=1e-6, dtype=x.dtype).square().sum().backward()
        runs.append((scale.grad.clone(), shift.grad.clone()))
        scale.grad = shift.grad = None
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@torch.no_grad()
def test_more_than_2_31_elements():
    x = torch.zeros(1, 1, (1 << 31) // 512 + 9, 512, device="cuda", dtype=torch.bfloat16)
    x[..., -3:, :] = torch.randn(3, 512, device="cuda")
    weight, last = torch.randn(512, device="cuda").bfloat16(), x[..., -3:, :]
    torch.testing.assert_close(api.rms_norm(x, weight, eps=1e-6)[..., -3:, :], reference.rms_norm(last, weight, eps=1e-6))
    torch.testing.assert_close(api.gelu_tanh(x)[..., -3:, :], reference.gelu_tanh(last))
    torch.testing.assert_close(api.gated_add(x, x, weight)[..., -3:, :], reference.gated_add(last, last, weight))


def test_network_with_fused_layers_is_as_exact_as_with_plain_ones():
    """Output and gradients of a packed pass in bfloat16 against float64 on the CPU."""
    from rcm.nets.layout import TokenLayout

    found = {}
    layout = TokenLayout.teacher_forcing(4, grid=GRID, pattern=pattern("c1-1"))
    for name, device, dtype, fused in (
        ("exact", "cpu", torch.float64, "off"),
        ("plain", "cuda", torch.bfloat16, "off"),
        ("fused", "cuda", torch.bfloat16, "on"),
    ):
        net = tiny_net(dtype=torch.bfloat16, attention="sdpa").to(device, dtype)
        net.set_fused(fused)
        x = latents(8, dtype=torch.bfloat16).to(device, dtype)
        out = net(
            x, torch.full((2, 8), 600.0, device=device, dtype=torch.float64), condition(net.config).to(device=device, dtype=dtype), layout
        )
        out.double().square().mean().backward()
        found[name] = {"out": out.detach(), **{key: p.grad for key, p in net.named_parameters()}}
    for key, exact in found["exact"].items():
        plain, fused = ((found[name][key].double().cpu() - exact).norm() / exact.norm() for name in ("plain", "fused"))
        assert fused <= 1.5 * plain + 5e-3, f"{key}: fused {fused:.2e}, plain {plain:.2e}"
