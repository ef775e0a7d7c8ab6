"""The network in bfloat16 on a GPU against itself in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.dual import guard_tangents, in_dual_level, jvp, unpack
from rcm.nets import attention_dense
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from tests.support.tiny_nets import GRID, condition, latents, pattern, tiny_net

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STRUCTURE = {"grid": GRID, "pattern": pattern("c1-1")}
FRAMES = 4


def rms_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double().cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def tangent_over_context(denoiser: Denoiser, device: str) -> torch.Tensor:
    """Tangent of the noisy half over a clean context cache."""
    clean, noisy, x_dot = (latents(FRAMES, seed=seed, dtype=torch.float32).to(device) for seed in (1, 9, 8))
    t = torch.full((2, FRAMES), 0.625, dtype=torch.float64, device=device)
    cond = condition(denoiser.net.config)
    cache = denoiser.new_cache(num_frames=FRAMES, grid=GRID)
    with torch.no_grad():
        denoiser.velocity(clean, torch.zeros_like(t), cond, TokenLayout.context(FRAMES, **STRUCTURE), cache=cache.append())
    layout = TokenLayout.noisy_over_context(FRAMES, **STRUCTURE)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return denoiser.velocity(x, t, cond, layout, cache=cache.readonly())

    with guard_tangents(denoiser.net):
        return jvp(velocity, (noisy, t), (x_dot, torch.full_like(t, 0.002)))[1]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_tangent_in_bfloat16(implementation):
    weights = tiny_net(dtype=torch.bfloat16)
    expected = tangent_over_context(Denoiser(tiny_net(dtype=torch.bfloat16).double(), Precision.preset("fp64")), "cpu")
    net = weights.cuda()
    net.set_jvp_implementation(implementation)
    dtypes = set()

    def watch(module, args, output):
        if in_dual_level() and isinstance(output, torch.Tensor):
            primal, tangent = unpack(output)
            if tangent is not None:
                dtypes.add((type(module).__name__, primal.dtype, tangent.dtype))

    for module in net.modules():
        module.register_forward_hook(watch)
    got = tangent_over_context(Denoiser(net, Precision.preset("bf16_fp32_time")), "cuda")
    assert rms_error(got, expected) < 0.05
    assert dtypes and all(primal == tangent for _, primal, tangent in dtypes), sorted(map(str, dtypes))


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["segments", "matrix"])
@torch.no_grad()
def test_packed_pass_in_bfloat16(limit, monkeypatch):
    monkeypatch.setattr(attention_dense, "DENSE_MASK_LIMIT", limit)
    results = []
    for preset, device, dtype in (("fp64", "cpu", torch.float64), ("bf16_fp32_time", "cuda", torch.bfloat16)):
        denoiser = Denoiser(tiny_net(dtype=torch.bfloat16).to(device, dtype), Precision.preset(preset))
        x = latents(2 * FRAMES, dtype=torch.float32).to(device)
        t = torch.full((2, 2 * FRAMES), 0.625, dtype=torch.float64, device=device)
        layout = TokenLayout.teacher_forcing(FRAMES, **STRUCTURE)
        results.append(denoiser.velocity(x, t, condition(denoiser.net.config), layout))
    assert rms_error(results[1], results[0]) < 0.03
