"""Files of the autoencoder: both names, both containers, and every way a file can be wrong, before
any weight changes.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from rcm.core.errors import CheckpointError
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_net import WanVAE, WanVAEConfig
from rcm.encoders.wan_vae_weights import WAN_VAE_FILE, diffusers_name, load_weights
from tests.support.wan_vae_cases import BASE_DIM, small_codec, small_latents, small_video, to_diffusers


@pytest.fixture(scope="module")
def codec() -> WanVAECodec:
    return small_codec()


@pytest.fixture
def small_network(monkeypatch):
    """`from_file` builds the published size; here it builds the small one."""
    monkeypatch.setattr("rcm.encoders.wan_vae.WanVAE", lambda: WanVAE(WanVAEConfig(base_dim=BASE_DIM)))


def state_of(codec: WanVAECodec) -> dict[str, torch.Tensor]:
    return {key: value.clone().contiguous() for key, value in codec.vae.state_dict().items()}


def write(path, state, *, container: str = "pickle"):
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "pickle")
    return path


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("file", "container"), [("vae.pth", "pickle"), ("old.pth", "old pickle"), ("vae.safetensors", "safetensors")], ids=["pth", "old", "st"]
)
def test_every_form_of_file_gives_the_same_codec(codec, small_network, tmp_path, names, file, container):
    state = state_of(codec)
    path = write(tmp_path / file, to_diffusers(state) if names == "diffusers" else state, container=container)
    loaded = WanVAECodec.from_file(path, dtype=torch.float32)
    assert list(loaded.vae.state_dict()) == list(state)
    assert all(torch.equal(loaded.vae.state_dict()[key], state[key]) for key in state)
    assert torch.equal(loaded.decode(small_latents(2)), codec.decode(small_latents(2)))
    assert torch.equal(loaded.encode(small_video(5)), codec.encode(small_video(5)))
    assert loaded.describe() == {"name": "wan_vae", "path": str(path)}


def test_the_file_may_be_replaced_after_loading(codec, small_network, tmp_path):
    path = write(tmp_path / "vae.pth", state_of(codec))
    loaded = WanVAECodec.from_file(path, dtype=torch.float32)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.decode(small_latents(1)), codec.decode(small_latents(1)))


def test_the_folder_of_diffusers_is_read(codec, small_network, tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors", to_diffusers(state_of(codec)), container="safetensors")
    loaded = WanVAECodec.from_file(tmp_path, dtype=torch.float32)
    assert all(torch.equal(loaded.vae.state_dict()[key], value) for key, value in state_of(codec).items())


def test_cast_on_loading(codec, small_network, tmp_path):
    path = write(tmp_path / "vae.pth", state_of(codec))
    loaded = WanVAECodec.from_file(path)
    assert {p.dtype for p in loaded.vae.parameters()} == {torch.bfloat16}
    key = "decoder.middle.0.residual.2.weight"
    assert torch.equal(loaded.vae.state_dict()[key], state_of(codec)[key].bfloat16())


def test_key_map_covers_the_published_network():
    with torch.device("meta"):
        keys = list(WanVAE().state_dict())
    theirs = [diffusers_name(key) for key in keys]
    assert len(set(theirs)) == len(keys) == 194
    expected = {
        "conv1.weight": "quant_conv.weight",
        "decoder.upsamples.3.time_conv.weight": "decoder.up_blocks.0.upsamplers.0.time_conv.weight",
        "decoder.upsamples.4.shortcut.bias": "decoder.up_blocks.1.resnets.0.conv_shortcut.bias",
        "decoder.upsamples.14.residual.6.weight": "decoder.up_blocks.3.resnets.2.conv2.weight",
        "encoder.downsamples.8.resample.1.bias": "encoder.down_blocks.8.resample.1.bias",
        "encoder.head.0.gamma": "encoder.norm_out.gamma",
        "decoder.middle.1.to_qkv.weight": "decoder.mid_block.attentions.0.to_qkv.weight",
    }
    assert {key: diffusers_name(key) for key in expected} == expected
    with pytest.raises(CheckpointError, match=r"decoder\.elsewhere"):
        diffusers_name("decoder.elsewhere.weight")


def test_missing_file_says_where_it_is_published(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth.*huggingface\.co/Wan-AI/Wan2\.1-T2V-1\.3B.*--vae_path"):
        WanVAECodec.from_file(tmp_path / "absent.pth")
    assert WAN_VAE_FILE == "assets/checkpoints/Wan2.1_VAE.pth"


def spoiled(state, how):
    key = "decoder.head.2.bias"
    if how == "missing":
        del state[key]
    elif how == "extra":
        state["decoder.head.9.bias"] = torch.zeros(3)
    elif how == "shape":
        state[key] = torch.zeros(4)
    elif how == "quantised":
        state[key] = torch.zeros(3, dtype=torch.int8)
    elif how == "no tensor":
        state["epoch"] = 3
    elif how == "both namings":
        return to_diffusers(state) | {key: state[key] + 1}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing 1 key\(s\): decoder\.head\.2\.bias"),
        ("extra", r"does not fit the Wan2.1 autoencoder: 1 unexpected key\(s\): decoder\.head\.9\.bias"),
        ("shape", r"decoder\.head\.2\.bias has shape \(4,\), expected \(3,\)"),
        ("no tensor", r"not tensors: epoch"),
        ("both namings", r"holds tensors under two names: decoder\.head\.2\.bias"),
        ("quantised", r"not float64, .*: decoder\.head\.2\.bias \(int8\)"),
    ],
)
def test_misfits_are_named_and_change_nothing(codec, tmp_path, how, message):
    target = small_codec(seed=8)
    before = state_of(target)
    path = write(tmp_path / "vae.pth", spoiled(state_of(codec), how))
    with pytest.raises(CheckpointError, match=message):
        load_weights(target.vae, path, device="cpu", dtype=torch.float32)
    assert all(torch.equal(target.vae.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize(("file", "names"), [("vae.pth", "original"), ("vae.safetensors", "diffusers")])
@pytest.mark.parametrize("part", [0.01, 0.999])
def test_truncated_files_change_nothing(codec, tmp_path, file, part, names):
    target = small_codec(seed=8)
    before = state_of(target)
    state = state_of(codec)
    container = "safetensors" if file.endswith("safetensors") else "pickle"
    path = write(tmp_path / file, to_diffusers(state) if names == "diffusers" else state, container=container)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match=r"vae\.\w+ cannot be read .* truncated"):
        load_weights(target.vae, path, device="cpu", dtype=torch.float32)
    assert all(torch.equal(target.vae.state_dict()[key], before[key]) for key in before)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    for file, message in (("text.pth", "cannot be read"), ("list.pth", "holds a list"), ("other.pth", "unexpected.*: state_dict.a")):
        with pytest.raises(CheckpointError, match=message):
            WanVAECodec.from_file(tmp_path / file)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (print, ("this ran",))

    torch.save({"conv1.bias": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        WanVAECodec.from_file(tmp_path / "bad.pth")
