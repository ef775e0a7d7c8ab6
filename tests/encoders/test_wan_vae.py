"""The Wan autoencoder as a codec: sizes, splits, streams, precision, tiles, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec, LatentStream
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_layers import Conv
from rcm.encoders.wan_vae_net import WanVAE
from rcm.encoders.wan_vae_tiles import plan_tiles
from tests.support.wan_vae_cases import CELLS, small_codec, small_latents, small_video

SPLITS = [tuple(b - a for a, b in itertools.pairwise((0, *cuts, 5))) for n in range(5) for cuts in itertools.combinations(range(1, 5), n)]


@pytest.fixture(scope="module")
def codec() -> WanVAECodec:
    return small_codec()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes_on_the_meta_device():
    with torch.device("meta"):
        vae = WanVAE()
    assert (parameters(vae), parameters(vae.encoder), parameters(vae.decoder)) == (126_892_531, 53_595_872, 73_295_331)
    state = vae.state_dict()
    assert len(state) == 194
    shapes = {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "decoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.0.residual.6.weight": (384, 384, 3, 3, 3),
        "decoder.head.0.gamma": (96, 1, 1, 1),
        "decoder.head.2.bias": (3,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_state_has_the_published_size():
    with torch.device("meta"):
        vae = WanVAE()
    assert (len(vae.encoder.slots), len(vae.decoder.slots)) == (24, 32)
    assert vae.decoder_state(batch=1, cells=(60, 104)).numel() == 944_286_720


def test_is_a_codec(codec):
    assert isinstance(codec, LatentCodec)
    assert isinstance(codec.stream(), LatentStream)
    assert (codec.temporal_stride, codec.spatial_stride, codec.latent_channels) == (4, 8, 16)
    assert (codec.latent_frames_for(81), codec.frames_for(21), codec.latent_size(480, 832)) == (21, 81, (60, 104))
    assert codec.describe() == {"name": "wan_vae", "path": None}
    assert not any(p.requires_grad for p in codec.vae.parameters())


@pytest.mark.parametrize(("frames_per_step", "split"), [*((1, split) for split in SPLITS), *((4, split) for split in SPLITS[::4])])
def test_streamed_equals_one_shot(codec, split, frames_per_step):
    latents = small_latents(5)
    stream = codec.stream(frames_per_step=frames_per_step)
    chunks = [stream.decode_chunk(part) for part in latents.split(split, dim=2)]
    assert [c.shape[2] for c in chunks] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(split)]
    assert (torch.cat(chunks, dim=2) - codec.decode(latents, frames_per_step=2)).abs().max() <= 1e-6


def test_a_stream_may_be_stepped_in_and_out_of_inference_mode(codec):
    latents, stream = small_latents(3), codec.stream()
    with torch.inference_mode():
        pieces, state = [stream.decode_chunk(latents[:, :, :2])], stream.state_copy()
    pieces.append(stream.decode_chunk(latents[:, :, 2:]))
    stream.load_state(state)
    assert torch.equal(stream.decode_chunk(latents[:, :, 2:]), pieces[1])
    torch.testing.assert_close(torch.cat(pieces, dim=2), codec.decode(latents), rtol=0, atol=1e-12)


def test_streams_do_not_disturb_one_another(codec):
    a, b = small_latents(4, seed=5), small_latents(4, seed=6)
    streams = [codec.stream(), codec.stream()]
    turns = [[stream.decode_chunk(x[:, :, i : i + 1]) for stream, x in zip(streams, (a, b), strict=True)] for i in range(4)]
    for index, x in enumerate((a, b)):
        assert torch.equal(torch.cat([turn[index] for turn in turns], dim=2), codec.decode(x, frames_per_step=1))


def test_state_keeps_its_addresses_and_restarts(codec):
    latents = small_latents(4)
    stream = codec.stream()
    once = stream.decode_chunk(latents)
    frames = stream.state._frames
    addresses = [f.data_ptr() for f in frames]
    stream.decode_chunk(latents)
    assert [f.data_ptr() for f in stream.state._frames] == addresses
    stream.restart()
    assert torch.equal(stream.decode_chunk(latents), once)


def test_a_later_frame_is_not_seen_by_an_earlier_one(codec):
    latents = small_latents(4)
    changed = latents.clone()
    changed[:, :, 3] += 1
    a, b = codec.decode(latents), codec.decode(changed)
    assert torch.equal(a[:, :, :9], b[:, :, :9])
    assert (a[:, :, 9:] - b[:, :, 9:]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("frames_per_step", [8, 12, 16])
def test_encode_in_any_steps(codec, frames_per_step):
    video = small_video(17)
    assert (codec.encode(video, frames_per_step=frames_per_step) - codec.encode(video)).abs().max() <= 1e-6


def test_precision(codec):
    exact = small_codec(dtype=torch.float64)
    exact.vae.load_state_dict(codec.vae.state_dict())
    latents, video = small_latents(3), small_video(5)
    pictures, means = exact.decode(latents.double()), exact.encode(video.double())
    assert means.dtype == torch.float64
    assert (codec.decode(latents) - pictures).abs().max() <= 2e-6
    assert (codec.encode(video) - means).abs().max() <= 1e-5
    fast = small_codec(dtype=torch.bfloat16)
    fast.vae.load_state_dict(codec.vae.state_dict())
    assert fast.encode(video.bfloat16()).dtype == torch.float32
    assert fast.decode(latents.bfloat16()).dtype == torch.bfloat16
    assert ((fast.decode(latents) - pictures).norm() / pictures.norm()).item() <= 0.1


def test_weights_may_change_between_calls(codec):
    other = small_codec(seed=9)
    latents = small_latents(2)
    before = other.decode(latents)
    other.vae.load_state_dict(codec.vae.state_dict())
    assert torch.equal(other.decode(latents), codec.decode(latents))
    assert not torch.equal(before, codec.decode(latents))


def test_other_weights_where_freed_ones_lay_are_read():
    """What a convolution has packed is of its tensor, not of an address."""
    conv = Conv(8, 8, taps=(3, 3, 3))
    memory = np.full((8, 8, 3, 3, 3), 0.5, np.float32)
    found = []
    for _ in range(2):
        conv.weight = torch.nn.Parameter(torch.from_numpy(memory))
        found.append(conv.over(torch.ones(1, 3, 3, 3, 8)))
        memory *= 2
    assert torch.equal(found[1], 2 * found[0])


def test_forms_of_convolutions_agree(codec):
    other = small_codec()
    for module in other.vae.modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim == 5 and module.weight.shape[-1] == 3:
            module.form = "pairs"
    latents = small_latents(3)
    assert (other.decode(latents) - codec.decode(latents)).abs().max() <= 1e-6
    assert (other.encode(small_video(5)) - codec.encode(small_video(5))).abs().max() <= 1e-5


def test_random_is_reproducible():
    a, b, c = (WanVAECodec.random(dtype=torch.float32, base_dim=8, seed=s) for s in (1, 1, 2))
    states = [x.vae.state_dict() for x in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not any(torch.equal(states[0][k], states[2][k]) for k in states[0])


# tiles


def test_one_tile_that_covers_everything_changes_nothing(codec):
    tiled = WanVAECodec(codec.vae, tile=6)
    latents, video = small_latents(3), small_video(5)
    assert torch.equal(tiled.decode(latents), codec.decode(latents))
    assert torch.equal(tiled.encode(video), codec.encode(video))


def test_tiles_blend_into_nearly_the_whole_frame():
    """Smooth content, as pictures are: random latents have detail at the scale of a seam that no
    tiling can know.
    """
    codec = small_codec()
    cells = (8, 22)
    frame = torch.linspace(0, 2, cells[1]).sin()[None, :] + torch.linspace(0, 1, cells[0])[:, None]
    latents = frame.expand(1, 16, 2, *cells) * torch.linspace(-1, 1, 16)[:, None, None, None]
    whole = codec.decode(latents)
    tiled = WanVAECodec(codec.vae, tile=16)
    blended = tiled.decode(latents)
    assert torch.equal(blended, tiled.decode(latents))
    inner = (blended - whole)[..., 16:-16].norm() / whole.norm()
    assert 1e-6 < inner < 0.2
    step = (blended[..., 1:] - blended[..., :-1]).abs().mean(dim=(0, 1, 2, 3))
    assert step.max() <= 2 * (whole[..., 1:] - whole[..., :-1]).abs().mean(dim=(0, 1, 2, 3)).max(), "a seam shows"
    streamed = tiled.stream()
    pieces = torch.cat([streamed.decode_chunk(part) for part in latents.split(1, dim=2)], dim=2)
    assert (pieces - blended).abs().max() <= 1e-6


@pytest.mark.parametrize("cells", [(60, 104), (5, 7), (15, 32), (4, 100)])
def test_tile_weights_add_to_one_and_overlap(cells):
    tiles = plan_tiles(cells, tile=8, scale=2)
    total = torch.zeros(2 * cells[0], 2 * cells[1], dtype=torch.float64)
    for tile in tiles:
        assert max(tile.cells) <= 8
        tile.add(torch.ones(2 * tile.cells[0], 2 * tile.cells[1], dtype=torch.float64), total, scale=2)
    assert (total - 1).abs().max() <= 1e-12
    columns = sorted({(t.columns.start, t.columns.stop) for t in tiles})
    assert all(a[1] - b[0] >= 2 for a, b in itertools.pairwise(columns))


def test_overlapping_tiles_fade_linearly():
    left, right = plan_tiles((4, 14), tile=8, scale=2)
    fade = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    assert (left.columns, right.columns) == (slice(0, 8), slice(6, 14))
    torch.testing.assert_close(right.column_weights[:5], torch.cat([fade, fade.new_ones(1)]))
    torch.testing.assert_close(left.column_weights[-5:], torch.cat([fade.new_ones(1), fade.flip(0)]))


# refusals


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 6, 32, 48), torch.float32, r"6 frames .* choose num_frames=5 or 9"),
        ((1, 3, 5, 30, 48), torch.float32, r"30x48 .* multiples of 8"),
        ((3, 5, 32, 48), torch.float32, r"\[B, 3, F, H, W\]"),
        ((1, 4, 5, 32, 48), torch.float32, r"\[B, 3, F, H, W\]"),
        ((1, 3, 5, 32, 48), torch.uint8, r"floating"),
    ],
)
def test_bad_videos_are_refused(codec, shape, dtype, message):
    with pytest.raises(ConfigError, match=message):
        codec.encode(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(16, 2, 4, 6), (1, 15, 2, 4, 6), (1, 16, 0, 4, 6)])
def test_bad_latents_are_refused(codec, shape):
    for decode in (codec.decode, codec.stream().decode_chunk):
        with pytest.raises(ConfigError, match=r"\[B, 16, T, h, w\]"):
            decode(torch.zeros(shape))


def test_bad_settings_are_refused(codec):
    video, latents = small_video(5), small_latents(1)
    with pytest.raises(ConfigError, match="multiple of 4"):
        codec.encode(video, frames_per_step=6)
    with pytest.raises(ConfigError, match="frames_per_step=0"):
        codec.decode(latents, frames_per_step=0)
    with pytest.raises(ConfigError, match="tile=3"):
        WanVAECodec(codec.vae, tile=3)
    with pytest.raises(ConfigError, match="CUDA"):
        codec.stream(graphs="on")
    with pytest.raises(ConfigError, match="dtype"):
        WanVAECodec.random(dtype=torch.int8)


def test_a_stream_serves_one_video(codec):
    stream = codec.stream()
    stream.decode_chunk(small_latents(1))
    with pytest.raises(ConfigError, match=r"batch of 1 at 4x6 .* got 2 at 4x6"):
        stream.decode_chunk(small_latents(1, batch=2))
    with pytest.raises(ConfigError, match="got 1 at 6x4"):
        stream.decode_chunk(small_latents(1, cells=CELLS[::-1]))


def test_a_stream_that_failed_half_way_does_not_go_on(monkeypatch):
    codec, latents = small_codec(), small_latents(2)
    stream = codec.stream()
    expected = stream.decode_chunk(latents)
    with monkeypatch.context() as patch:
        patch.setattr(codec.vae.decoder.upsamples[5], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.decode_chunk(latents)
    with pytest.raises(RuntimeError, match="failed half-way"):
        stream.decode_chunk(latents)
    stream.restart()
    assert torch.equal(stream.decode_chunk(latents), expected)


def test_a_stream_refuses_weights_of_another_dtype():
    codec = small_codec()
    stream = codec.stream()
    stream.decode_chunk(small_latents(1))
    codec.vae.to(torch.float64)
    with pytest.raises(ConfigError, match=r"torch\.float32.*torch\.float64"):
        stream.decode_chunk(small_latents(1))
