"""What `inspect_weights` says about every family, and about files that cannot be used."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError
from rcm.nets.wan.convert import from_wan
from rcm.pipelines import inspect_weights, load_wan, wan_files, weight_report
from rcm.train.describe import Description
from tests.support.wan_keys import PUBLISHED
from tests.support.weight_folders import FAMILIES, prefixed, small_config, small_state, write_shards

FOUND = {
    "original Wan .safetensors": ("original Wan", "safetensors", "5-D", ["unstated"]),
    "original Wan shards": ("original Wan", "3 shards, safetensors", "5-D", ["unstated"]),
    "Wan2.2 expert": ("original Wan", "3 shards, safetensors", "5-D", ["unstated"]),
    "rcm .pth": ("rcm (also", "torch pickle", "2-D", ["unstated"]),
    "rcm .pt of the old format": ("rcm (also", "torch pickle of the old format", "2-D", ["unstated"]),
    "rcm .dcp": ("rcm (also", "DCP directory", "2-D", ["unstated"]),
    "rcm job": ("rcm training checkpoint", "DCP directory", "2-D", ["ema", "live", "fake_score"]),
    "Self-Forcing": ("Self-Forcing family", "torch pickle", "5-D", ["ema"]),
    "Self-Forcing trainer": ("Self-Forcing family", "torch pickle", "5-D", ["ema", "live"]),
    "CausVid": ("Self-Forcing family", "torch pickle", "5-D", ["live", "fake_score"]),
    "LongLive": ("Self-Forcing family", "torch pickle", "5-D", ["unstated"]),
    "ComfyUI": ("ComfyUI", "safetensors", "5-D", ["unstated"]),
    "diffusers transformer": ("diffusers", "3 shards, safetensors", "5-D", ["unstated"]),
    "diffusers pipeline": ("diffusers", "3 shards, safetensors", "5-D", ["unstated"]),
    "torch_to_dcp of a nested file": ("Self-Forcing family", "DCP directory", "5-D", ["unstated"]),
}


@pytest.fixture
def small_preset(monkeypatch):
    """The small network as a published one."""
    for module in (wan_files, weight_report):
        monkeypatch.setattr(module, "PRESETS", {"14B": small_config()})


@pytest.mark.parametrize("family", FOUND)
def test_families(tmp_path, family, small_preset):
    assert FOUND.keys() == FAMILIES.keys()
    lead, container, patch, copies = FOUND[family]
    (folder := tmp_path / "it's mine").mkdir()
    path = FAMILIES[family](folder, small_state())
    report = inspect_weights(path)
    assert report.family.startswith(lead) and (report.container, report.patch, report.dtype) == (container, patch, "float32")
    assert [copy.copy for copy in report.copies] == copies and all(copy.fits and copy.preset == "14B" for copy in report.copies)
    parameters = sum(value.numel() for value in small_state().values())
    assert all((copy.tensors, copy.parameters) == (len(small_state()), parameters) for copy in report.copies)
    assert report.ok and report.preset == "14B" and report.problem is None
    assert f"wan2pt1_t2v_rcm_infer --model_size 14B --dit_path {shlex.quote(str(path))}" in str(report) and "complete" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["copies"][0]["copy"] == copies[0]


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A float32 safetensors file of full length that takes no space: its header, then a hole."""
    listed, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        listed[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(listed).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_full_size(tmp_path, name):
    """The published tensors in a file of their real length (57 GB for 14B), of which the header
    alone is read.
    """
    shapes, tensors, parameters = PUBLISHED[name]
    report = inspect_weights(sparse_file(tmp_path / "diffusion_pytorch_model.safetensors", shapes))
    assert report.ok and report.preset == name and (report.copies[0].tensors, report.copies[0].parameters) == (tensors, parameters)
    command = {"1.3B": "--model_size 1.3B", "14B": "--model_size 14B", "A14B": "--high_noise_model_path"}
    command |= {"i2v-14B": "--image_path FIRST --dit_path", "flf2v-14B": "--last_image_path LAST --dit_path"}
    assert command[name] in str(report)
    with pytest.raises(CheckpointError, match=f"holds {name} of .*; pass --model_size {name}"):
        load_wan(report.path, expect="14B" if name == "1.3B" else "1.3B", precision=Precision.preset("bf16"))


def test_what_is_missing_and_what_is_too_much(tmp_path):
    state = small_state()
    del state["blocks.1.norm3.bias"]
    state |= {"blocks.0.audio.weight": torch.zeros(1), "head.head.bias": torch.zeros(3)}
    torch.save({"net." + key: value for key, value in state.items()} | {"epoch": 3}, tmp_path / "a.pt")
    report = inspect_weights(tmp_path / "a.pt")
    (copy,) = report.copies
    assert copy.missing == ("blocks.1.norm3.bias",) and copy.extra == ("blocks.0.audio.weight",)
    assert copy.misshapen == ("head.head.bias has shape (3,), expected (16,)",) and report.others == 1 and not report.ok
    assert "1 missing: blocks.1.norm3.bias" in str(report) and "CANNOT BE USED" in str(report) and not report.uses


def test_the_nearest_published_network_is_named(tmp_path, small_preset):
    state = {key: value for key, value in small_state().items() if key != "patch_embedding.weight"}
    torch.save(prefixed(state, "net."), tmp_path / "a.pt")
    report = inspect_weights(tmp_path / "a.pt")
    assert report.copies[0].network == f"nearest to 14B, {len(state)} tensors agree" and report.copies[0].missing == (
        "patch_embedding.weight",
    )
    assert report.preset is None and "not a Wan network" in report.problem
    cut = {key: value for key, value in small_state().items() if "blocks.1." not in key}
    torch.save(cut, tmp_path / "b.pt")
    assert "holds 1 layers of 14B, which has 2; it is incomplete" in inspect_weights(tmp_path / "b.pt").problem


def test_what_a_file_says_of_itself(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(prefixed(small_state(), "net."), path)
    about = Description(stage="sf_dmd", network=asdict(small_config()), network_name="small", iteration=300, extra={"weights": "ema"})
    about.write(tmp_path / "a.pt.json")
    report = inspect_weights(path)
    assert report.description == "stage sf_dmd, iteration 300, small" and report.copies[0].copy == "ema"


def test_two_experts(tmp_path):
    for name in ("transformer", "transformer_2"):
        write_shards(tmp_path / name, from_wan(small_state(), form="diffusers"))
    report = inspect_weights(tmp_path)
    assert [part.path.rpartition("/")[2] for part in report.parts] == ["transformer", "transformer_2"] and report.ok
    assert "two experts, high noise first" in str(report) and str(report).count("diffusers") == 2
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_weights(tmp_path / "nowhere")


def test_things_that_are_no_network(tmp_path):
    torch.save({"decoder.conv1.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}, tmp_path / "vae.pth")
    report = inspect_weights(tmp_path / "vae.pth")
    assert not report.ok and report.problem == "it is Wan's VAE, not a network; pass it as --vae_path"
    torch.save({"something": torch.zeros(1)}, tmp_path / "x.pt")
    report = inspect_weights(tmp_path / "x.pt")
    assert not report.ok and report.copies[0].network == "no Wan network"
    factors = {"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 8), "blocks.0.ffn.0.lora_B.weight": torch.zeros(8, 4)}
    torch.save(factors, tmp_path / "lora.pt")
    report = inspect_weights(tmp_path / "lora.pt")
    assert report.ok and report.family == "low-rank update (LoRA) of 1 weights, rank 4, alpha unstated (the rank)"
    torch.save(factors | {"blocks.0.diff": torch.zeros(1)}, tmp_path / "lora.pt")
    assert "'blocks.0.diff' is no factor" in inspect_weights(tmp_path / "lora.pt").problem
