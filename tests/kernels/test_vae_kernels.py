"""Windows and convolutions of the autoencoder: the eager forms against plain operators, the kernels
in Triton's interpreter (float32).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rcm.kernels.vae_conv import convolve
from rcm.kernels.vae_conv_pack import best_form, fold_nearest, pack
from rcm.kernels.vae_window import window
from rcm.kernels.vae_window_eager import Features
from tests.support.in_interpreter import in_interpreter


@pytest.fixture(scope="module")
def report() -> dict:
    return in_interpreter("interpreted_vae")


def test_convolution_kernel_matches_float64(report):
    errors = report["convolutions"]
    assert len(errors) == 12
    assert {name: error for name, error in errors.items() if not error <= 2e-6} == {}


def test_window_kernel_matches_eager(report):
    errors = report["windows"]
    assert len(errors) == 24
    assert {name: error for name, error in errors.items() if not error <= 4e-6} == {}


def test_folded_doubling_through_both_kernels(report):
    assert report["fold"] <= 2e-6


def test_window_against_plain_operators():
    torch.manual_seed(0)
    value, residual, carried = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6), torch.randn(2, 2, 4, 5, 6)
    bias, gamma, before = torch.randn(6), torch.randn(6), carried.clone()
    got = window(Features(value, bias, residual), gamma=gamma, norm="rms_silu", carried=carried, border=(1, 1), keep=True)
    total = value + bias + residual
    new = F.silu(F.normalize(total, dim=-1) * 6**0.5 * gamma)
    torch.testing.assert_close(got.kept, total)
    torch.testing.assert_close(got.padded[:, :2, 1:-1, 1:-1], before)
    torch.testing.assert_close(got.padded[:, 2:, 1:-1, 1:-1], new)
    torch.testing.assert_close(carried, new[:, -2:])
    edges = got.padded.clone()
    edges[:, :, 1:-1, 1:-1] = 0
    assert not edges.any()


def test_one_frame_moves_the_older_carried_frame_up():
    carried = torch.randn(1, 2, 2, 2, 3)
    older, newer = carried[:, 0].clone(), carried[:, 1].clone()
    frame = torch.randn(1, 1, 2, 2, 3)
    padded = window(Features(frame), carried=carried).padded
    assert torch.equal(padded, torch.cat([older[:, None], newer[:, None], frame], dim=1))
    assert torch.equal(carried, padded[:, 1:])


def test_layouts_are_read_where_they_are_written():
    frames = torch.randn(1, 4, 2, 3, 5)
    pairs = torch.cat([frames[:, 0::2], frames[:, 1::2]], dim=-1)
    assert torch.equal(Features(pairs, layout="frame_pairs").total(), frames)
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6, 1)
    quads = torch.full((1, 2, 3, 4, 4), torch.nan)
    for y in range(4):
        for x in range(6):
            quads[:, :, (y + 1) // 2, (x + 1) // 2, 2 * (y % 2) + x % 2] = image[:, :, y, x, 0]
    assert torch.equal(Features(quads, layout="pixel_quads").total(), image)


@pytest.mark.parametrize("size", [(2, 3), (4, 5)])
def test_folded_doubling_equals_interpolation(size):
    x, weight = torch.randn(2, 8, *size, dtype=torch.float64), torch.randn(6, 8, 3, 3, dtype=torch.float64)
    truth = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    padded = window(Features(x.permute(0, 2, 3, 1)[None].contiguous()), border=(1, 1)).padded
    quads = convolve(padded, pack(fold_nearest(weight), form="direct"))
    assert (Features(quads, layout="pixel_quads").total()[0].permute(0, 3, 1, 2) - truth).abs().max() <= 1e-12


def test_pairs_equal_the_direct_form():
    x, weight = torch.randn(2, 4, 5, 8, 6, dtype=torch.float64), torch.randn(7, 6, 3, 3, 3, dtype=torch.float64)
    direct, pairs = (convolve(x, pack(weight, form=form)) for form in ("direct", "pairs"))
    assert direct.shape == (2, 2, 3, 6, 7)
    assert (direct - pairs).abs().max() <= 1e-12
    assert best_form(weight) == "direct"


def test_refusals():
    x = torch.randn(1, 3, 4, 5, 6)
    weight = torch.randn(4, 6, 3, 3, 3)
    with pytest.raises(ValueError, match="even window width"):
        convolve(x, pack(weight, form="pairs"))
    with pytest.raises(ValueError, match="bulk copy"):
        pack(weight, form="tma")
    with pytest.raises(ValueError, match="stride"):
        pack(torch.randn(4, 8, 3, 3, 3), form="tma", stride=(1, 2, 2))
    with pytest.raises(ValueError, match="'direct', 'pairs', 'tma' or 'columns'"):
        pack(weight, form="best")
    with pytest.raises(ValueError, match="6 of torch"):
        convolve(x[..., :5], pack(weight, form="direct"))
    with pytest.raises(ValueError, match="carried frames are"):
        window(Features(x), carried=torch.zeros(1, 2, 4, 4, 6))
    with pytest.raises(ValueError, match="gamma"):
        window(Features(x), norm="rms")
    with pytest.raises(ValueError, match="norm must be"):
        window(Features(x), norm="layer")
    with pytest.raises(ValueError, match="residual"):
        window(Features(x, residual=x[:, :1]))
    with pytest.raises(ValueError, match="border"):
        window(Features(x), border=(2, 0))
