"""Captured streams on a GPU: against the eager one in float32, against float64 in bfloat16, and
without a wait of the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import NonFinite
from rcm.encoders.wan_vae import WanVAECodec
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RECIPES = {
    "clean": SamplingRecipe("few_step", "c1-3", mids=((0.8, 0.5), (0.5,))),
    "noisy": SamplingRecipe("few_step", "c3-3", mids=((0.8, 0.5),), noisy_context=True),
}
CALM = 0.3
"""Factor of the weights: as drawn, the network multiplies float32's rounding by a hundred over
eight chunks.
"""
POLICIES = {"window": SlidingWindow(3, 1), "relative": InfinityRope(blocks=3, sinks=1, horizon=9)}


def run(dtype: str, *, device: str = "cuda", graphs: str = "off", fused: str = "off", recipe: str, policy: str) -> torch.Tensor:
    """Latents of eight chunks through fill-up, wrap and a change of prompt."""
    precision = Precision.preset(dtype)
    net = tiny_net(dtype=precision.compute)
    net.set_fused(fused)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(CALM if weight.dim() > 1 else 1)
    denoiser = Denoiser(net.to(device), precision).eval_params()
    first, second = (denoiser.prepare(condition(tiny_config(), seed=seed)) for seed in (2, 5))
    spec = StreamSpec(RECIPES[recipe], (4, HEIGHT, WIDTH), batch=2, policy=POLICIES[policy], graphs=graphs)
    with Session(denoiser, None, first, spec, device=device) as session:
        found = [chunk.latents for chunk in itertools.islice(session, 4)]
        session.set_condition(second)
        found += [chunk.latents for chunk in itertools.islice(session, 4)]
        if graphs == "on":
            assert session.loop.counts["replayed"] > session.loop.counts["captured"] > 0
    return torch.cat(found, dim=2).double().cpu()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def exact_products() -> Iterator[None]:
    """No TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fused", ["off", "on"])
def test_captured_latents_are_the_eager_ones_in_float32(exact_products, fused, recipe, policy):
    which = {"recipe": recipe, "policy": policy}
    assert error(run("fp32", graphs="on", fused=fused, **which), run("fp32", **which)) <= 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_captured_bfloat16_is_as_near_to_float64_as_the_plain_path_is(recipe):
    which = {"recipe": recipe, "policy": "window"}
    exact, plain = run("fp64", device="cpu", **which), run("bf16", **which)
    captured = run("bf16", graphs="on", fused="on", **which)
    assert error(captured, exact) <= 1.2 * error(plain, exact)
    assert error(captured, plain) <= 1.5 * error(plain, exact)


@pytest.mark.parametrize("decoded", [False, True])
def test_a_captured_stream_tells_of_nan(decoded):
    """With the pixels, or, where nothing waits for the device, later."""
    denoiser = Denoiser(tiny_net(dtype=torch.bfloat16, in_dim=16, out_dim=16).cuda(), Precision.preset("bf16")).eval_params()
    spec = StreamSpec(RECIPES["clean"], (16, HEIGHT, WIDTH), batch=2, policy=POLICIES["window"], graphs="on")
    codec = WanVAECodec.random(device="cuda", base_dim=32) if decoded else None
    with Session(denoiser, codec, denoiser.prepare(condition(tiny_config())), spec, device="cuda") as session:
        for _ in range(8):
            session.step()
        denoiser.net.blocks[1].ffn[0].weight[0, 0] = float("nan")
        with pytest.raises(NonFinite, match=r"chunk 8 .* after step 1 of 2: the network's weight blocks\.1\.ffn\.0\.weight is not"):
            steps(session, 2)


def steps(session: Session, count: int) -> None:
    for _ in range(count):
        session.step()
        torch.cuda.synchronize()


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_of_a_steady_step_but_its_pixels_lets_the_host_wait(policy):
    """Otherwise the next chunk is issued late, and the card is idle meanwhile."""
    denoiser = Denoiser(tiny_net(dtype=torch.bfloat16, in_dim=16, out_dim=16).cuda(), Precision.preset("bf16")).eval_params()
    options = {"graphs": "on", "look_ahead": True, "to_host": True, "draw_on": "cuda"}
    spec = StreamSpec(RECIPES["clean"], (16, HEIGHT, WIDTH), batch=2, policy=POLICIES[policy], **options)
    codec = WanVAECodec.random(device="cuda", base_dim=32)
    with Session(denoiser, codec, denoiser.prepare(condition(tiny_config())), spec, device="cuda") as session:
        for _ in range(12):
            session.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                session.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
