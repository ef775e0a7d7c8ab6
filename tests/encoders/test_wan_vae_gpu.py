"""The autoencoder on a card: fused kernels against the library and the CPU, streams, CUDA
graphs.
"""

from __future__ import annotations

import pytest
import torch

from rcm.encoders.wan_vae import WanVAECodec
from tests.support.wan_vae_cases import small_latents, small_video

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]
WIDE = 96
CELLS = (8, 12)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item()


def twin(codec: WanVAECodec, *, device: str, dtype: torch.dtype) -> WanVAECodec:
    other = WanVAECodec.random(device=device, dtype=dtype, base_dim=codec.vae.config.base_dim)
    other.vae.load_state_dict(codec.vae.state_dict())
    return other


@pytest.fixture(scope="module")
def fast() -> WanVAECodec:
    return WanVAECodec.random(device="cuda", dtype=torch.bfloat16, base_dim=WIDE)


def test_float32_equals_the_cpu():
    cpu = WanVAECodec.random(dtype=torch.float32, base_dim=16)
    card = twin(cpu, device="cuda", dtype=torch.float32)
    latents, video = small_latents(3, batch=2), small_video(9)
    assert relative(card.decode(latents), cpu.decode(latents)) <= 1e-5
    assert relative(card.encode(video), cpu.encode(video)) <= 1e-5


def test_bfloat16_is_as_near_to_float32_as_the_library(fast):
    exact = twin(fast, device="cuda", dtype=torch.float32)
    latents, video = small_latents(3, cells=CELLS), small_video(9, cells=CELLS)
    pictures, means = exact.decode(latents), exact.encode(video)
    ours = relative(fast.decode(latents), pictures), relative(fast.encode(video), means)
    fast.vae.use("direct")
    library = relative(fast.decode(latents), pictures), relative(fast.encode(video), means)
    fast.vae.use(None)
    assert max(ours) <= 3e-2
    assert all(mine <= 1.3 * theirs for mine, theirs in zip(ours, library, strict=True))


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_streams_in_turn_give_the_one_shot_result(fast, graphs):
    videos = [small_latents(6, cells=CELLS, seed=s) for s in (1, 2)]
    streams = [fast.stream(graphs=graphs) for _ in videos]
    turns = [[s.decode_chunk(v[:, :, i : i + 1]) for s, v in zip(streams, videos, strict=True)] for i in range(6)]
    for index, video in enumerate(videos):
        streamed = torch.cat([turn[index] for turn in turns], dim=2)
        assert relative(streamed, fast.decode(video, frames_per_step=1)) == 0
        assert relative(streamed, fast.decode(video, frames_per_step=5)) <= 1e-2


def test_captured_steps_follow_the_weights(fast):
    codec, latents = twin(fast, device="cuda", dtype=torch.bfloat16), small_latents(5, cells=CELLS)
    stream = codec.stream(graphs="on")
    stream.decode_chunk(latents)
    codec.to("cpu").to("cuda")
    stream.restart()
    assert relative(stream.decode_chunk(latents), codec.decode(latents, frames_per_step=1)) == 0


def test_a_batch_equals_its_videos(fast):
    latents = small_latents(3, batch=2, cells=CELLS)
    together = fast.decode(latents)
    for index in range(2):
        assert relative(together[index : index + 1], fast.decode(latents[index : index + 1])) <= 1e-2
