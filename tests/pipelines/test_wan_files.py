"""From any family's file to the same network, or to an error that leaves everything as it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rcm.configs.build_nets import open_network
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.wan.convert import from_wan
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.init import load_full, materialise, on_first, on_meta
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines import LoRA, load_wan, open_weights, random_wan, wan_files
from rcm.pipelines.wan_files import network_weights
from rcm.storage.state_dicts import LazyWeights
from rcm.train.describe import Description
from tests.support.dist import run_ranks
from tests.support.tiny_nets import tiny_config, tiny_net
from tests.support.weight_folders import FAMILIES, own, prefixed, small_config, small_state, write_shards

FP32 = Precision.preset("fp32")


def equal(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_network(tmp_path, family):
    """Averaged weights where there are some, else the only ones; sizes from the tensors alone."""
    state = small_state()
    found = load_wan(FAMILIES[family](tmp_path, state), precision=FP32)
    assert equal(found.net.state_dict(), state)
    assert found.net.config == small_config() and not any(p.requires_grad for p in found.net.parameters()) and not found.net.training


@pytest.mark.parametrize(("weights", "shift"), [("ema", 0), ("live", 1), ("reg", 1), ("fake_score", 2)])
def test_copies_of_a_training_checkpoint(tmp_path, weights, shift):
    state = small_state()
    found = load_wan(FAMILIES["rcm job"](tmp_path, state), weights=weights, precision=FP32)
    assert equal(found.net.state_dict(), {key: value + shift for key, value in state.items()})


def test_dtype_is_that_of_the_computation(tmp_path):
    state = small_state()
    found = load_wan(FAMILIES["rcm .pth"](tmp_path, state), precision=Precision.preset("bf16"))
    assert equal(found.net.state_dict(), {key: value.bfloat16() for key, value in state.items()})


def described(path: Path, **extra) -> Path:
    Description(stage="sf_dmd", network=asdict(tiny_config()), network_name="tiny", extra=extra).write(path.with_name(path.name + ".json"))
    return path


def test_sizes_that_tensors_do_not_tell(tmp_path):
    """Heads of 16: from the caller, from config.json, or from the self-description; otherwise
    refused.
    """
    state = dict(tiny_net(dtype=torch.float32).state_dict())
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="width 64 is no multiple of the head size 128; say how many heads"):
        load_wan(tmp_path / "a.pt", precision=FP32)
    assert load_wan(tmp_path / "a.pt", precision=FP32, expect=tiny_config()).net.config == tiny_config()
    folder = write_shards(tmp_path / "b", from_wan(state, form="wan"), settings={"num_heads": 4, "eps": 1e-5, "text_len": 8})
    found = load_wan(folder, precision=FP32).net.config
    assert (found.num_heads, found.eps, found.text_len) == (4, 1e-5, 8)
    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save(state, alone / "any.pth")
    (alone / "config.json").write_text(json.dumps({"num_heads": 4}))
    assert load_wan(alone, precision=FP32).net.config.num_heads == 4
    described(tmp_path / "a.pt")
    assert load_wan(tmp_path / "a.pt", precision=FP32).net.config == tiny_config()
    save_file(own(state), tmp_path / "c.safetensors", metadata={"rcm": (tmp_path / "a.pt.json").read_text()})
    assert load_wan(tmp_path / "c.safetensors", precision=FP32).net.config == tiny_config()


def test_words_that_contradict_the_tensors(tmp_path):
    state = small_state()
    folder = write_shards(tmp_path / "b", from_wan(state, form="wan"), settings={"num_heads": 1, "num_layers": 5})
    with pytest.raises(CheckpointError, match="config.json contradicts the tensors beside it: num_layers 5, the tensors have 2"):
        load_wan(folder, precision=FP32)
    torch.save(dict(tiny_net(num_layers=1).state_dict()), tmp_path / "a.pt")
    described(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="contradicts its own description: num_layers 1 and 2"):
        load_wan(tmp_path / "a.pt", precision=FP32)


@pytest.mark.parametrize(("stated", "asked"), [("ema", "live"), ("fake_score", "ema"), ("fake_score", "fake_score")])
def test_a_file_that_says_which_copy_it_holds(tmp_path, stated, asked):
    path = tmp_path / "a.pt"
    torch.save(prefixed(dict(tiny_net().state_dict()), "net."), path)
    described(path, weights=stated)
    assert network_weights(open_weights(path), weights=asked).copy == stated
    described(path, weights="ema")
    with pytest.raises(CheckpointError, match="holds no net_fake_score.* weights"):
        network_weights(open_weights(path), weights="fake_score")


def test_another_network_than_expected_is_named(tmp_path):
    path = FAMILIES["rcm .pth"](tmp_path, small_state())
    with pytest.raises(
        CheckpointError, match=r"holds a network of 2 layers of width 128.*but 14B of 40 layers of width 5120.*was asked for"
    ):
        load_wan(path, expect="14B", precision=FP32)
    with pytest.raises(ConfigError, match="unknown network preset '2B'"):
        load_wan(path, expect="2B", precision=FP32)


def test_advice_about_the_size_flag(tmp_path, monkeypatch):
    """A preset's file given as another preset: the flag that fits it."""
    monkeypatch.setitem(wan_files.PRESETS, "small", small_config())
    path = FAMILIES["rcm .pth"](tmp_path, small_state())
    with pytest.raises(CheckpointError, match="holds small of 2 layers.*but 1.3B .*; pass --model_size small, or give the file"):
        load_wan(path, expect="1.3B", precision=FP32)
    cut = {key: value for key, value in small_state().items() if not key.startswith("blocks.1.")}
    torch.save(cut, tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="holds 1 layers of small, which has 2; it is incomplete"):
        load_wan(tmp_path / "cut.pt", precision=FP32)


BAD = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "blocks.1.norm3.bias"}, "missing 1 key.*blocks.1.norm3.bias"),
    "extra": (lambda s: s | {"blocks.1.audio.weight": torch.zeros(1)}, "1 unexpected key.*blocks.1.audio.weight"),
    "shape": (lambda s: s | {"head.head.bias": torch.zeros(3)}, r"head.head.bias has shape \(3,\), expected \(16,\)"),
    "first tensor": (lambda s: {k: v for k, v in s.items() if k != "patch_embedding.weight"}, "missing 1 key.*patch_embedding.weight"),
    "no tensor": (lambda s: s | {"step": 3}, "entries are not tensors: step"),
    "quantised": (
        lambda s: s | {"head.head.weight": torch.zeros(16, 128, dtype=torch.int8)},
        r"not float64, float32, float16 or bfloat16: .*head.head.weight \(int8\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_misfits_are_named_and_change_nothing(tmp_path, name, monkeypatch):
    """Before memory is taken for a new network, before a weight of an old one changes."""
    change, words = BAD[name]
    torch.save(change(small_state()), tmp_path / "bad.pt")
    monkeypatch.setattr(wan_files, "materialise", None)
    with pytest.raises(CheckpointError, match=rf"bad.pt.*{words}"):
        load_wan(tmp_path / "bad.pt", precision=FP32, expect=small_config())
    net = tiny_net(dtype=torch.float32, dim=128, num_heads=1, ffn_dim=32, text_len=512, seed=5)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_full(net, network_weights(open_weights(tmp_path / "bad.pt")), source="bad.pt")
    assert equal(net.state_dict(), before)


def lora_file(path: Path, *, rank: int = 4, alpha: float | None = None) -> dict:
    draw = torch.Generator().manual_seed(2)
    names = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]
    base, state = small_state(), {}
    for name in names:
        rows, columns = base[name + ".weight"].shape
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=draw)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=draw)
        if alpha is not None:
            state[f"base_model.model.{name}.alpha"] = torch.tensor(alpha)
    torch.save({"generator_lora": state, "step": 3}, path)
    return state


@pytest.mark.parametrize(
    ("lora", "alpha", "strength"), [({}, None, 1.0), ({"scale": 0.5}, None, 0.5), ({"alpha": 2.0}, 8.0, 0.5), ({}, 8.0, 2.0)]
)
def test_a_lora_is_added_as_in_float64(tmp_path, lora, alpha, strength):
    """strength = scale * alpha / rank, alpha from the argument, else the file, else the rank."""
    base = FAMILIES["Self-Forcing"](tmp_path, small_state())
    factors = lora_file(tmp_path / "lora.pt", alpha=alpha)
    found = load_wan(base, precision=FP32, loras=[LoRA(tmp_path / "lora.pt", **lora)]).net.state_dict()
    for name, weight in small_state().items():
        lead = "base_model.model." + name.removesuffix(".weight")
        expected = weight.double()
        if f"{lead}.lora_A.weight" in factors:
            expected = expected + strength * factors[f"{lead}.lora_B.weight"].double() @ factors[f"{lead}.lora_A.weight"].double()
            assert not torch.equal(found[name], weight)
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=5e-6)


def test_a_peft_folder_says_its_alpha(tmp_path):
    state = lora_file(tmp_path / "x.pt")
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(own(state), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    base = FAMILIES["rcm .pth"](tmp_path, small_state())
    one, three = (load_wan(base, precision=FP32, loras=[LoRA(folder, alpha=alpha)]).net.state_dict() for alpha in (12, None))
    assert equal(one, three)
    plain = load_wan(base, precision=FP32, loras=[LoRA(tmp_path / "x.pt", scale=3.0)]).net.state_dict()
    assert equal(plain, three)


def test_loras_that_do_not_fit(tmp_path):
    lora_file(tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=r"lora.pt is a low-rank update \(LoRA\), not a network"):
        load_wan(tmp_path / "lora.pt", precision=FP32)
    path = tmp_path / "other.pt"
    torch.save(prefixed(small_state(num_layers=1), "net."), path)
    with pytest.raises(CheckpointError, match="LoRA .*lora.pt: 4 of 8 targets are not in the network"):
        load_wan(path, precision=FP32, loras=[LoRA(tmp_path / "lora.pt")])


@pytest.mark.parametrize("preset", ["tiny", small_config()], ids=["by name", "by sizes"])
def test_random_networks(preset):
    first, again, other = (random_wan(preset, precision=FP32, seed=seed).net.state_dict() for seed in (0, 0, 1))
    assert equal(first, again) and not torch.equal(first["head.head.weight"], other["head.head.weight"])
    assert all(value.isfinite().all() for value in first.values()) and first["head.head.weight"].std() > 0.01
    assert random_wan(preset, precision=Precision.preset("bf16")).net.head.head.weight.dtype == torch.bfloat16


class Failing(LazyWeights):
    """Weights of which one cannot be read."""

    def __init__(self, weights: LazyWeights, name: str) -> None:
        self.weights, self.headers, self.name = weights, weights.headers, name

    def __getitem__(self, key: str) -> torch.Tensor:
        if key == self.name:
            raise OSError("Input/output error")
        return self.weights[key]


def on_two_ranks(folder: Path) -> dict:
    """Load sharded and unsharded; every failure of rank 0 as this rank sees it."""
    first = dist.get_rank() == 0
    dims = ParallelDims(1, 2, 1)
    net = on_meta(lambda: WanDiT(small_config(), attention="sdpa"))
    net = materialise(parallelize(net, dims=dims, precision=FP32), device="cpu")
    load_full(net, on_first(lambda: open_network(folder / "a.pt", knob="net")))
    found = {
        "sharded": {key: value.full_tensor() for key, value in net.state_dict().items()},
        "whole": dict(load_wan(folder / "a.pt", precision=FP32, loras=[LoRA(folder / "lora.pt")]).net.state_dict()),
    }
    (folder / f"{dist.get_rank()}").mkdir()
    # rank 0's path exists on rank 0 alone, as with local disks
    mine = folder / f"{dist.get_rank()}" / "only_here.pt"
    good = network_weights(open_weights(folder / "a.pt")) if first else None
    failures = {
        "no file": lambda: load_wan(folder / "nowhere.pt", precision=FP32),
        "truncated": lambda: load_full(net, on_first(lambda: open_network(folder / "cut.pt", knob="model.config.net"))),
        "another": lambda: load_wan(folder / "a.pt", precision=FP32, expect="1.3B"),
        "midway": lambda: load_full(net, Failing(good, "blocks.1.ffn.0.weight") if first else None, source=str(folder)),
        "nothing": lambda: load_full(net, None, source="x"),
        "local": lambda: on_first(mine.read_bytes),
    }
    for name, call in failures.items():
        try:
            call()
            found[name] = ""
        except (CheckpointError, OSError) as error:
            found[name] = str(error)
    return found


@pytest.mark.dist
def test_two_ranks_load_like_one_and_fail_together(tmp_path):
    """Rank 0 reads; what goes wrong there ends the others with the same words instead of leaving
    them waiting.
    """
    state = small_state()
    torch.save(prefixed(state, "net."), tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-5000])
    lora_file(tmp_path / "lora.pt")
    merged = dict(load_wan(tmp_path / "a.pt", precision=FP32, loras=[LoRA(tmp_path / "lora.pt")]).net.state_dict())
    ranks = run_ranks(2, on_two_ranks, tmp_path, tmp_path=tmp_path)
    for found in ranks:
        assert equal(found["sharded"], state) and equal(found["whole"], merged)
        for name, words in {
            "no file": "nowhere.pt does not exist",
            "truncated": "model.config.net: ",
            "another": "was asked for",
            "midway": "blocks.1.ffn.0.weight could not be read (OSError: Input/output error); the network is incomplete now",
            "nothing": "no weights were given on rank 0",
            "local": "only_here.pt",
        }.items():
            assert words in found[name], (name, found[name])
    assert {name: ranks[0][name] for name in ranks[0] if isinstance(ranks[0][name], str)} == {
        name: ranks[1][name] for name in ranks[1] if isinstance(ranks[1][name], str)
    }
