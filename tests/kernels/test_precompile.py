"""Kernels compiled ahead of time: which ones a decoder and a transformer want, that all are made
and loaded, errors, threads.
"""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from rcm.encoders.wan_vae_compile import compile_decoder
from rcm.encoders.wan_vae_net import WanVAE, WanVAEConfig
from rcm.kernels import precompile, vae_conv_tma, vae_window_triton
from rcm.kernels.fused import quantise_kernels
from rcm.kernels.fused.compile_list import inference_plan
from tests.support.pretend_gpu import pretended

SIZE = (480, 832)


class Recorded:
    """Stands in for a kernel: keeps what a warm-up would compile."""

    def __init__(self, name: str, found: Counter) -> None:
        self.name, self.found = name, found

    def warmup(self, *arguments: object, grid: tuple, **constants: object) -> None:
        types = tuple(getattr(x, "dtype", getattr(getattr(x, "base", None), "dtype", "int")) for x in arguments)
        blocks = tuple(tuple(x.block_shape) for x in arguments if hasattr(x, "block_shape"))
        self.found[self.name, types, blocks, tuple(constants.items())] += 1


def variants(run) -> Counter:
    """Kernels that the Wan decoder wants in `run`, on a Hopper card."""
    found: Counter = Counter()
    window, conv = Recorded("window", found), Recorded("conv", found)
    token = precompile._planned.set(torch.device("cuda", 0))
    try:
        with (
            pretended(),
            patch.object(vae_window_triton, "window_kernel", window),
            patch.object(vae_conv_tma, "convolution_kernel", conv),
        ):
            run()
    finally:
        precompile._planned.reset(token)
    return found


def decoded(frames: tuple[int, ...]) -> None:
    """Decode steps of a full-size network on the meta device."""
    with torch.device("meta"), torch.no_grad():
        vae = WanVAE().to(torch.bfloat16)
        state = vae.decoder_state(batch=1, cells=(60, 104))
        for count in frames:
            vae.decode_step(torch.empty(1, count, 60, 104, 16, dtype=torch.bfloat16), state)


@pytest.mark.parametrize("step", [1, 2])
def test_the_plan_of_the_decoder_holds_all_it_will_launch(step):
    def plan() -> None:
        with patch("rcm.encoders.wan_vae_compile.precompile", lambda plan, **_: plan()):
            compile_decoder("cuda", size=SIZE, frames_per_step=step)

    planned, wanted = variants(plan), variants(lambda: decoded((1, step, step, step)))
    assert set(planned) == set(wanted)
    assert len(planned) <= 13  # each costs 0.3 to 1 s of one core in the first frames


@pytest.mark.slow
def test_a_plan_compiles_and_loads_every_kernel_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pretended() as loaded:
        plan = inference_plan(width=64, hidden=96, heads=2, tokens=16, fp8=True)
        done = precompile.precompile(lambda: (plan(), plan()), device="cuda", threads=2)
        small = compile_decoder("cuda", size=(16, 16), config=WanVAEConfig(base_dim=16), threads=2)
    expected = {"norm_forward": 4, "gated_add_forward": 1, "gelu_forward": 1, "rotate_pairs": 1, "quantise_rows": 2}
    assert Counter(loaded[: done.kernels]) == expected
    assert done.kernels == 9
    assert len(loaded) == done.kernels + small.kernels
    assert list(tmp_path.rglob("*.cubin"))
    assert precompile._planned.get() is None


def test_a_kernel_that_does_not_compile_is_an_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(4, 16, device="meta")

    def plan() -> None:
        # tiles are powers of two
        options = {"GELU": False, "WIDTH": 16, "BLOCK": 15, "num_warps": 4}
        precompile.launch(quantise_kernels.quantise_rows, (4,), x, x, x, 16, **options)

    with pretended():
        with pytest.raises(Exception, match="power of 2"):
            precompile.precompile(plan, device="cuda", threads=2)
        assert precompile.precompile(lambda: None, device="cuda").kernels == 0
    assert precompile._planned.get() is None


def test_the_processor_has_nothing_to_compile():
    assert compile_decoder("cpu", size=SIZE) == precompile.Compiled()
    assert precompile.device_for(torch.empty(1)).type == "cpu"
