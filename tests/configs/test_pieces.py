"""The codec and text encoder that a run names: described for later, built for previews, negative
prompts and prompt-only data.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.configs import build_samples, checks, pieces
from rcm.configs.build_data import build_loader, negative_condition
from rcm.configs.build_method import sampling_recipe
from rcm.configs.build_samples import PREVIEW_PROMPTS, sample_observers
from rcm.configs.compose import compose_run
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.nets.denoiser import Denoiser
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.described import text_of
from tests.support.stand_in_codec import StandInCodec
from tests.support.tiny_nets import tiny_net
from tests.support.tiny_umt5 import TINY, save_umt5

M = "model.config."
TF, SF = (f"experiment=causal_wan2pt1_1pt3B_res480p_t2v_{name}_c3-3" for name in ("tf", "sf_dmd"))
SMALL = ["net=tiny", M + f"net.text_dim={TINY.dim}", M + "net.text_len=12"]
SMALL += [M + "latent_hw=[4,4]", M + "state_t=3", M + "net.max_frames=3"]


@pytest.fixture(autouse=True)
def narrow_umt5(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks know umT5 by its width; the one of these tests is smaller."""
    monkeypatch.setattr(checks, "UMT5_WIDTH", TINY.dim)


TEACHERS = [
    f"{M}{role}.{key}" for role in ("net_bidirectional_teacher", "net_fake_score") for key in (f"text_dim={TINY.dim}", "text_len=12")
]


def composed(*words: str, experiment: str = TF):
    return compose_run([experiment, *SMALL, *words], world_size=None, require_inputs=False)


def test_wan_pieces_are_described_with_their_files(tmp_path: Path) -> None:
    weights = save_umt5(tmp_path)
    model = composed(M + f"text_encoder_path={weights}", M + "tokenizer.vae_pth=v.pth").config.model.config
    codec, text = pieces.described_pieces(model)
    assert codec == {"name": "wan_vae", "path": "v.pth"}
    encoder = text_of(text, tmp_path)
    assert torch.equal(encoder.encode(["a cat"])[:, :12], pieces.text_encoder(model, device="cpu").encode(["a cat"]))
    with pytest.raises(CheckpointError, match=r"v\.pth"):
        pieces.codec_of_run(model, device="cpu")


def test_the_negative_prompt_is_encoded_by_umt5(tmp_path: Path) -> None:
    weights = save_umt5(tmp_path)
    run = composed(M + f"text_encoder_path={weights}", M + f"text_cache={tmp_path / 'kept'}").config
    found = negative_condition(run, device="cpu").text
    expected = UMT5TextEncoder.from_files(weights, text_len=12).encode([NEGATIVE_PROMPT]).float()
    assert found.shape == (1, 12, TINY.dim) and found.abs().max() > 0.1
    assert torch.equal(found, expected)
    assert list((tmp_path / "kept").rglob("*.safetensors"))


def test_prompts_alone_are_encoded_as_they_are_read(tmp_path: Path) -> None:
    weights, prompts = save_umt5(tmp_path), tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na square moves left\n")
    words = [M + f"text_encoder_path={weights}", "dataloader_train.kind=prompts", f"dataloader_train.tar_path_pattern={prompts}"]
    run = composed(*words, "dataloader_train.batch_size=2", "dataloader_train.num_workers=0", *TEACHERS, experiment=SF).config
    batch = next(iter(build_loader(run, dims=ParallelDims())))
    rows = UMT5TextEncoder.from_files(weights, text_len=12).encode(batch.prompts).float()
    assert sorted(batch.prompts) == ["a red cat", "a square moves left"]
    assert torch.equal(batch.text.float(), rows) and batch.latents.shape == (2, 16, 3, 4, 4)


def test_prompts_alone_need_an_encoder() -> None:
    run = composed("dataloader_train.kind=prompts", "dataloader_train.tar_path_pattern=p.txt", *TEACHERS, experiment=SF)
    assert any("text_encoder_path is empty: data=prompts" in sentence for sentence in run.missing)


def test_previews_say_what_they_lack(tmp_path: Path) -> None:
    every = "trainer.sampling.every_n=1"
    model = composed(every).config.model.config
    assert "set model.config.text_encoder_path" in build_samples._lacking(model)
    model = composed(every, M + f"text_encoder_path={save_umt5(tmp_path)}", M + "tokenizer.vae_pth=none.pth").config.model.config
    assert "there is no none.pth" in build_samples._lacking(model)


def test_rank_0_decides_whether_there_are_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE may lie beside rank 0 alone; a rank that decided for itself would leave the others
    waiting in a collective.
    """
    monkeypatch.setattr(build_samples, "shared", lambda _: "they need a file that rank 0 does not have")
    (tmp_path / "vae.pth").touch()
    words = [M + f"text_encoder_path={save_umt5(tmp_path)}", M + f"tokenizer.vae_pth={tmp_path / 'vae.pth'}"]
    run = composed(*words, "trainer.sampling={every_n: 1, ema_every_n: 0, num_samples: 2}")
    assert sample_observers(run, tmp_path, Denoiser(tiny_net(), Precision.preset("fp32")), device=torch.device("cpu")) == []


def test_previews_on_wan_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts through umT5, frames through the codec of the run, a row of videos in the file."""
    monkeypatch.setattr(build_samples, "codec_of_run", lambda model, *, device: StandInCodec())
    (tmp_path / "vae.pth").touch()
    words = [M + f"text_encoder_path={save_umt5(tmp_path)}", M + f"tokenizer.vae_pth={tmp_path / 'vae.pth'}"]
    run = composed(*words, "trainer.sampling={every_n: 1, ema_every_n: 0, num_samples: 2}", M + "precision=float32")
    model = run.config.model.config
    assert sampling_recipe(model).kind == "ode"
    net = tiny_net(dtype=torch.float32, in_dim=16, out_dim=16, text_dim=TINY.dim, text_len=12)
    (grid,) = sample_observers(run, tmp_path, Denoiser(net, Precision.preset("fp32")), device=torch.device("cpu"))
    frames = grid.draw(1)
    assert frames.shape[:3] == (2, 3, StandInCodec().frames_for(3))
    assert not torch.equal(frames[0], frames[1])
    grid.write(tmp_path / "grid", frames)
    assert (tmp_path / "grid.mp4").stat().st_size > 0
    assert build_samples.preview_prompts(run.config) == list(PREVIEW_PROMPTS[:2])
