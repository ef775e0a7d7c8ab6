"""Attention over segments against float64; the gain of coded keys against drawn errors; what its
correction recovers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcm.kernels.kv_codec import bias
from rcm.kernels.kv_codec.codec import Blob, KVCodec
from rcm.kernels.kv_codec.segments import Segment, attend_segments, flash, plain
from rcm.kernels.kv_codec.smoothing import Undo, unsmooth
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec

D = 64
SCALE = D**-0.5


def draw(seed: int, s: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of two heads; keys with channels of uneven size and a few large constants."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, length, 2, D, generator=g) for length in (128, s, s))
    spread = torch.exp(0.5 * torch.randn(1, 1, 2, D, generator=g))
    heavy = 5 * torch.randn(1, 1, 2, D, generator=g) * (torch.rand(1, 1, 2, D, generator=g) < 0.05)
    return 1.5 * q / spread, k * spread + heavy, v


def coded(k: Tensor, **settings: object) -> tuple[KVCodec, Blob, Tensor]:
    codec = KVCodec(KVCodecSpec(SideSpec(**{"dtype": "int2", **settings})))
    blob = codec.encode(k, side="key", layer=0)
    return codec, blob, codec.decode(blob, side="key")


def attention(q: Tensor, k: Tensor, v: Tensor, gain: Tensor | float = 0.0) -> Tensor:
    logits = torch.einsum("blnd,bsnd->bnls", q.double(), k.double()) * SCALE - gain
    return torch.einsum("bnls,bsnd->blnd", logits.softmax(-1), v.double())


@pytest.mark.parametrize("attend", [plain, flash])
def test_segments_merge_to_one_attention(attend):
    q, k, v = draw(0)
    gains = [None, torch.randn(1, 2, 128), None]
    parts = [slice(0, 100), slice(100, 101), slice(101, 512)]
    scratch: list[Tensor] = [torch.empty_like(k), torch.empty_like(v)]

    def restored():
        for part, gain in zip(parts, gains, strict=True):
            for room, x in zip(scratch, (k, v), strict=True):
                room[:, : part.stop - part.start] = x[:, part]
            yield Segment(*(room[:, : part.stop - part.start] for room in scratch), gain)

    offsets = torch.zeros(1, 2, 128, 512)
    offsets[..., 100:101] = gains[1].unsqueeze(-1)
    got = attend_segments(q, restored(), scale=SCALE, attend=attend)
    torch.testing.assert_close(got.double(), attention(q, k, v, offsets), rtol=1e-4, atol=1e-5)
    exact = attend_segments(q.double(), [Segment(k[:, p].double(), v[:, p].double()) for p in parts], scale=SCALE)
    torch.testing.assert_close(exact, attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_no_key_is_refused():
    q, k, v = draw(0)
    with pytest.raises(ValueError, match="at least one key"):
        attend_segments(q, [Segment(k[:, :0], v[:, :0])], scale=SCALE)


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("smoothing", ["none", "balance", "hadamard", "reorder"])
def test_the_gain_is_that_of_drawn_errors(granularity, smoothing):
    """log of the mean of exp over uniform errors of the blob's steps, drawn in the smoothed
    channels, against the formula.
    """
    q, k, _ = draw(1, s=64)
    blob = coded(k, granularity=granularity, group_size=32, smoothing=smoothing, dtype="int4")[1]
    wide = Blob(blob.codes, Undo(), None, blob.dtype)
    steps = (12 * bias.error_variance(wide)).sqrt()
    generator = torch.Generator().manual_seed(2)
    mean = torch.zeros(1, 2, 128, 64, dtype=torch.float64)
    draws = 400
    for _ in range(draws):
        error = unsmooth(steps * (torch.rand(k.shape, generator=generator) - 0.5), blob.undo)
        mean += torch.einsum("blnd,bsnd->bnls", q.double(), error.double()).mul(SCALE).exp() / draws
    gain = bias.logit_gain(q, blob, scale=SCALE).double()
    assert float((mean.log().mean() - gain.mean()).abs()) < 0.03 * float(gain.mean()) + 2e-4
    worst = (mean.log() - gain).mean(-1)
    assert float(worst.abs().max()) < 0.15 * float(gain.mean(-1).max()) + 2e-3


@pytest.mark.parametrize("dtype", ["int2", "fp4", "fp8"])
@pytest.mark.parametrize("granularity", ["channel", "token", "head"])
def test_variance_is_near_the_measured_one(dtype, granularity):
    k = torch.randn(1, 500, 2, D, generator=torch.Generator().manual_seed(5))
    _, blob, hat = coded(k, dtype=dtype, granularity=granularity)
    measured, predicted = (hat - k).square().mean(), bias.error_variance(blob).mean()
    assert 0.75 < float(measured / predicted) < 1.2
    torch.testing.assert_close(bias.segment_variance(blob), bias.error_variance(blob).mean(1))


def test_augmented_channels_give_the_corrected_logits():
    q, k, _ = draw(3, s=96)
    _, blob, hat = coded(k)
    longer_q, longer_k = bias.augment(q, hat, blob, scale=SCALE)
    logits = torch.einsum("blnd,bsnd->bnls", longer_q, longer_k) * SCALE
    plain_logits = torch.einsum("blnd,bsnd->bnls", q, hat) * SCALE
    torch.testing.assert_close(logits, plain_logits - bias.logit_gain(q, blob, scale=SCALE), rtol=1e-4, atol=1e-4)


def test_a_rotated_query_gains_the_mean_over_angles():
    q, k, _ = draw(4, s=64)
    blob = coded(k)[1]
    angles = torch.linspace(0, 2 * torch.pi, 65)[:-1]
    pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
    turned = [torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(-2) for angle in angles]
    mean = torch.stack([bias.segment_gain(x, blob, scale=SCALE) for x in turned]).mean(0)
    torch.testing.assert_close(bias.segment_gain(q, blob, scale=SCALE, rotated=True), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_correction_recovers_half_of_what_the_bias_costs(asymmetric):
    """One coded chunk and one plain. What the bias costs: the error of attention less the error
    with the true mean gain taken off.
    """
    cost = left = 0.0
    for seed in range(6):
        q, k, v = draw(10 + seed)
        old, new = slice(0, 256), slice(256, 512)
        _, blob, hat = coded(k[:, old], asymmetric=asymmetric)
        gain = bias.segment_gain(q, blob, scale=SCALE)
        true = (plain(q, hat, v[:, old], SCALE)[1] - plain(q, k[:, old], v[:, old], SCALE)[1]).mean(-1, keepdim=True).expand_as(gain)
        exact = attention(q, k, v)

        def error(taken: Tensor | None, q=q, k=k, v=v, hat=hat, exact=exact, old=old, new=new) -> float:
            segments = [Segment(hat, v[:, old], taken), Segment(k[:, new], v[:, new])]
            return float((attend_segments(q, segments, scale=SCALE) - exact).square().sum())

        cost += error(None) - error(true)
        left += error(gain) - error(true)
    assert cost > 0
    assert left < 0.5 * cost
