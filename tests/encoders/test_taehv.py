"""The tiny decoder against a straight-line float64 one over whole videos, its streams, and what its
file must hold.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.codec import LatentCodec, LatentStream
from rcm.encoders.taehv import TinyDecoderCodec, encoder_shapes
from rcm.encoders.taehv_net import Level, TinyConfig

SMALL = TinyConfig(levels=(Level(12, 1, 8), Level(8, 2, 6), Level(6, 2, 5)))


def small(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> TinyDecoderCodec:
    return TinyDecoderCodec.random(dtype=dtype, seed=seed, config=SMALL)


def latents(frames: int, *, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(batch, 16, frames, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def straight_line(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The published order of operations, one video [16, T, h, w] to [3, F, H, W], frame by frame
    with a list as memory.
    """
    at = {name.removeprefix("decoder."): value for name, value in weights.items()}

    def conv(frame: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(frame, at[f"{name}.weight"], at.get(f"{name}.bias"), padding=at[f"{name}.weight"].shape[-1] // 2)

    frames = [F.relu(conv(3 * torch.tanh(frame[None] / 3), "1")) for frame in x.unbind(1)]
    for first, grow, stride in ((3, 7, 1), (9, 13, 2), (15, 19, 2)):
        for block in range(first, first + 3):
            before, made = torch.zeros_like(frames[0]), []
            for frame in frames:
                y = F.relu(conv(torch.cat([frame, before], dim=1), f"{block}.conv.0"))
                y = conv(F.relu(conv(y, f"{block}.conv.2")), f"{block}.conv.4")
                made.append(F.relu(y + frame))
                before = frame
            frames = made
        frames = [F.interpolate(frame, scale_factor=2, mode="nearest") for frame in frames]
        frames = [part for frame in frames for part in conv(frame, f"{grow}.conv").chunk(stride, dim=1)]
        frames = [conv(frame, f"{grow + 1}") for frame in frames]
    pixels = torch.cat([conv(F.relu(frame), "22") for frame in frames])[3:]
    return 2 * pixels.transpose(0, 1) - 1


def test_published_sizes():
    with torch.device("meta"):
        from rcm.encoders.taehv_net import TinyDecoder

        state = TinyDecoder().state_dict()
    assert sum(x.numel() for x in state.values()) == 9_844_611
    assert sum(torch.Size(shape).numel() for shape in encoder_shapes(TinyConfig()).values()) == 1_470_928
    assert state["decoder.19.conv.weight"].shape == (128, 64, 1, 1)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decodes_as_the_straight_line(frames):
    codec, x = small(), latents(frames, batch=2)
    found = codec.decode(x)
    assert found.shape == (2, 3, codec.frames_for(frames), 24, 32)
    for video, pixels in zip(x, found, strict=True):
        torch.testing.assert_close(pixels, straight_line(codec.net.state_dict(), video), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [(5,), (1, 1, 1, 1, 1), (2, 3), (1, 3, 1)])
def test_streams_are_the_whole_bit_for_bit(split, dtype):
    codec, x = small(dtype=dtype), latents(5).float()
    stream = codec.stream()
    pieces = [stream.decode_chunk(part) for part in x.split(split, dim=2)]
    assert torch.equal(torch.cat(pieces, dim=2), codec.decode(x))


def test_several_frames_at_once_are_the_same_up_to_rounding():
    codec, x = small(), latents(6)
    torch.testing.assert_close(codec.stream(frames_per_step=3).decode_chunk(x), codec.decode(x), rtol=1e-10, atol=1e-10)


def test_a_stream_restarts_and_goes_on_from_a_copy():
    codec, x = small(), latents(4)
    stream, other = codec.stream(), codec.stream()
    first = stream.decode_chunk(x[:, :, :2])
    kept = stream.state_copy()
    rest = stream.decode_chunk(x[:, :, 2:])
    other.load_state(kept)
    assert torch.equal(other.decode_chunk(x[:, :, 2:]), rest)
    stream.restart()
    assert torch.equal(stream.decode_chunk(x[:, :, :2]), first)
    assert stream.num_bytes() == 8 * 3 * 3 * 4 * (12 + 4 * 8 + 16 * 6)


def test_it_is_a_codec_that_does_not_encode():
    codec = small()
    assert isinstance(codec, LatentCodec)
    assert isinstance(codec.stream(), LatentStream)
    assert codec.latent_size(480, 832) == (60, 104)
    with pytest.raises(ConfigError, match="does not encode"):
        codec.encode(torch.zeros(1, 3, 1, 24, 32))
    with pytest.raises(ConfigError, match="floating latents"):
        codec.decode(torch.zeros(1, 4, 1, 3, 4))
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        codec.stream(graphs="on")


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A file as it is published: half precision, encoder and decoder."""
    decoder = TinyDecoderCodec.random(dtype=torch.float16).net.state_dict()
    encoder = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in encoder_shapes(TinyConfig()).items()}
    return {**encoder, **decoder}


def test_its_file_is_read_by_name(tmp_path, published):
    path = tmp_path / "taew2_1.pth"
    torch.save(published, path)
    codec = TinyDecoderCodec.from_file(path, dtype=torch.float32)
    assert codec.describe() == {"name": "tiny_decoder", "path": str(path)}
    for name, value in codec.net.state_dict().items():
        assert torch.equal(value, published[name].float()), name
    alone = {name: value for name, value in published.items() if name.startswith("decoder.")}
    more = torch.cat([torch.full((256, 256, 1, 1), 9.0).half(), alone["decoder.7.conv.weight"]])
    torch.save({**alone, "decoder.7.conv.weight": more}, path)
    grown = TinyDecoderCodec.from_file(path, dtype=torch.float32)
    assert torch.equal(grown.net.decoder["7"].conv.weight, codec.net.decoder["7"].conv.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("decoder.14.weight"), "missing 1 key.*decoder.14.weight"),
        (lambda state: state.pop("encoder.17.bias"), "missing 1 key.*encoder.17.bias"),
        (lambda state: state.update({"decoder.23.weight": torch.zeros(1)}), "unexpected key.*decoder.23.weight"),
        (lambda state: state.update({"decoder.22.weight": torch.zeros(12, 64, 3, 3)}), "decoder.22.weight has shape"),
        (lambda state: state.update({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}), "decoder.1.weight has shape"),
        (lambda state: state.update({"decoder.1.bias": torch.zeros(256, dtype=torch.int8)}), "not float64, float32"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, published, change, said):
    state = dict(published)
    change(state)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=said) as caught:
        TinyDecoderCodec.from_file(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_its_flag(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist.*--tiny_decoder"):
        TinyDecoderCodec.from_file(tmp_path / "taew2_1.pth")
