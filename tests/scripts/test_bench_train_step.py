"""The parts of the step benchmark that need no GPU: how kernels are sorted, how a floor is added
up.
"""

from __future__ import annotations

import pytest
import torch

from rcm.nets.layout import TokenLayout
from scripts import bench_measure
from scripts.bench_measure import floor_of, kind_of
from scripts.bench_train_student import NoiseTeacher
from tests.support.tiny_nets import GRID, condition, latents, tiny_net


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("hopper_forward", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNN", "matrix product"),
        ("norm_tangent", "fused layers"),
        ("gelu_backward", "fused layers"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>", "other elementwise"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


def test_floor_counts_every_product_and_attention_call(monkeypatch):
    calls = []

    def alone(call, *, repeats):
        calls.append(call)
        return 2.0

    monkeypatch.setattr(bench_measure, "alone", alone)
    net = tiny_net(dtype=torch.float32)
    x, layout = latents(3, dtype=torch.float32), TokenLayout.bidirectional(3, grid=GRID)
    cond = condition(net.config, dtype=torch.float32)
    monkeypatch.setattr(bench_measure.torch, "randn", lambda shape, device: torch.zeros(shape))
    found = floor_of(net, lambda: net(x, torch.full((2, 1), 500.0), cond, layout), repeats=1)
    blocks, attentions = net.config.num_layers, [part for part in found["parts"] if part["what"].startswith("attention")]
    assert sum(part["count"] for part in attentions) == 2 * blocks
    products = 10 * blocks + 1 + 2 + 2 + 1 + 1  # blocks, patch, text, time, time projection, head
    assert sum(part["count"] for part in found["parts"]) == products + 2 * blocks
    assert found["floor_ms"] == 2.0 * sum(part["count"] for part in found["parts"])
    assert len(calls) == len(found["parts"])


def test_noise_stands_for_the_teacher_on_the_predicted_frames():
    net = tiny_net()
    teacher = NoiseTeacher(net.config)
    x, layout = latents(4), TokenLayout.bidirectional(4, grid=teacher.token_grid(4, 6))
    assert teacher.velocity(x, torch.zeros(2, 1), condition(net.config), layout).shape == x.shape
