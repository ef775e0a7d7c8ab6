"""What is written is what other loaders read, whole or not at all, one tensor in memory at a
time.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.wan.convert import FORMS, from_wan
from rcm.pipelines import load_wan, open_weights, save_network
from rcm.pipelines.weight_writer import write_safetensors
from rcm.storage.state_dicts import LazyWeights
from rcm.train.describe import Description
from rcm.train.export import describe
from tests.support.weight_folders import small_config, small_state

FP32 = Precision.preset("fp32")
ABOUT = Description(stage="imported", network=asdict(small_config()), extra={"weights": "ema"})


class Counting(LazyWeights):
    """Weights that count how many of them are alive, and can fail at one."""

    def __init__(self, state: dict, *, failing: str = "") -> None:
        self.state, self.failing = state, failing
        self.headers = {key: value.to("meta") for key, value in state.items()}
        self.order: list[str] = []

    def __getitem__(self, key: str) -> torch.Tensor:
        if key == self.failing:
            raise OSError(28, "No space left on device")
        self.order.append(key)
        return self.state[key].clone()


def save(path: Path, *, form: str = "rcm", weights: LazyWeights | None = None, **options) -> Path:
    return save_network(path, weights or Counting(small_state()), form=form, config=small_config(), description=ABOUT, **options)


NAMES = ("a.safetensors", "a.pt", "a.pth", "a.dcp", "folder")


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", NAMES)
def test_written_networks_load_as_they_were(tmp_path, form, name):
    """Every form in every container that can hold it, bit by bit."""
    if FORMS[form].container and name not in ("a.pt", "a.pth"):
        with pytest.raises(ConfigError, match="which only .pt and .pth hold"):
            save(tmp_path / name, form=form)
        return
    path = save(tmp_path / name, form=form)
    found = load_wan(path, precision=FP32, expect=small_config()).net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in small_state().items())
    assert describe(path).extra["weights"] == "ema" and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_keys_and_shapes_are_those_of_the_form(tmp_path):
    state = small_state()
    file = open_weights(save(tmp_path / "sf.pt", form="self_forcing"))
    assert set(file) == {f"generator_ema.model.{key}" for key in state} and file["generator_ema.model.patch_embedding.weight"].dim() == 5
    assert load_file(save(tmp_path / "c.safetensors", form="comfyui"))["model.diffusion_model.patch_embedding.weight"].shape == (
        128,
        4,
        1,
        2,
        2,
    )
    theirs = load_file(save(tmp_path / "d.safetensors", form="diffusers"))
    expected = from_wan(state, form="diffusers")
    assert theirs.keys() == expected.keys() and all(torch.equal(theirs[key], expected[key]) for key in expected)


def test_dtype_is_cast_on_the_way(tmp_path):
    for name in NAMES[:4]:
        file = open_weights(save(tmp_path / name, dtype=torch.bfloat16))
        assert all(file[f"net.{key}"].dtype == torch.bfloat16 for key in small_state())
        assert torch.equal(file["net.head.head.weight"], small_state()["head.head.weight"].bfloat16())


def test_values_beyond_float16_are_not_made_infinite(tmp_path):
    state = small_state()
    name = next(iter(state))
    state[name] = state[name].float().flatten().fill_(1e5).reshape(state[name].shape)
    with pytest.raises(CheckpointError, match=rf"{name} has values up to 1e\+05, beyond float16"):
        save(tmp_path / "a.safetensors", weights=Counting(state), dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_not_larger_than_its_tensors(tmp_path):
    """Views of one large storage (slices of a fused weight, views into a mapped file) must not take
    all of it with them.
    """
    state = small_state()
    sizes = [value.numel() for value in state.values()]
    parts = torch.cat([*(value.flatten() for value in state.values()), torch.zeros(10**6)]).split([*sizes, 10**6])

    class Views(LazyWeights):
        headers = {key: value.to("meta") for key, value in state.items()}

        def __getitem__(self, key):
            return parts[list(state).index(key)].view(state[key].shape)

    path = save(tmp_path / "b.pt", weights=Views())
    assert 4 * sum(sizes) < path.stat().st_size < 4 * sum(sizes) + 1000 * len(state)
    assert torch.equal(open_weights(path)["net.head.head.weight"], state["head.head.weight"])


def test_shards_and_their_index(tmp_path):
    state = small_state()
    limit = max(value.nbytes for value in state.values()) + 1000
    folder = save(tmp_path / "folder", form="wan", max_shard_bytes=limit)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and {p.name for p in shards} == set(index["weight_map"].values())
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert all(sum(t.nbytes for t in load_file(p).values()) <= limit for p in shards)
    assert json.loads((folder / "config.json").read_text())["num_heads"] == 1
    plain = save(tmp_path / "plain", form="rcm", max_shard_bytes=10**9)
    assert sorted(p.name for p in plain.iterdir()) == ["diffusion_pytorch_model.safetensors", "rcm.json"]


def test_memory_holds_one_tensor(tmp_path):
    """Each is asked for once, after the one before was written."""
    weights = Counting(small_state())
    save(tmp_path / "a.safetensors", weights=weights)
    assert sorted(weights.order) == sorted(small_state())
    alive: list[int] = []

    def read(key: str) -> torch.Tensor:
        alive.append(int(key))
        # the buffer may hold one back
        assert (tmp_path / "b").stat().st_size >= 1000 * 400 * (int(key) - 1)
        return torch.full((100_000,), float(key))

    write_safetensors(tmp_path / "b", {str(i): torch.empty(100_000, device="meta") for i in range(5)}, read, metadata={})
    assert alive == list(range(5)) and load_file(tmp_path / "b")["3"].eq(3).all()


def test_mixed_dtypes_stay_aligned(tmp_path):
    tensors = {
        "b": torch.arange(3, dtype=torch.bfloat16),
        "a": torch.tensor(2.5),
        "c": torch.arange(3.0, dtype=torch.float64),
        "d": torch.zeros(0),
    }
    write_safetensors(
        tmp_path / "x.safetensors", {k: v.to("meta") for k, v in tensors.items()}, tensors.__getitem__, metadata={"format": "pt"}
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())
    whole = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert all(header[key]["data_offsets"][0] % value.element_size() == 0 for key, value in tensors.items())
    with pytest.raises(ValueError, match="b was announced as"):
        write_safetensors(tmp_path / "y", {"b": torch.empty(4, device="meta")}, tensors.__getitem__, metadata={})


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    folder = save(tmp_path / "folder")
    (folder / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"folder holds other files \(holiday\.jpg\)"):
        save(folder, overwrite=True)
    assert (folder / "holiday.jpg").read_bytes() == b"mine"
    (folder / "holiday.jpg").unlink()
    save(folder, overwrite=True)
    save(tmp_path / "a.dcp")
    save(tmp_path / "a.dcp", overwrite=True)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "folder"])
def test_a_failed_write_leaves_the_old_file(tmp_path, name):
    path = save(tmp_path / name)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=f"{name} exists; pass --overwrite"):
        save(path)
    with pytest.raises(OSError, match="No space left"):
        save(path, weights=Counting(small_state(seed=3), failing="head.head.weight"), overwrite=True)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    save(path, weights=Counting(small_state(seed=3)), overwrite=True)
    found = load_wan(path, precision=FP32, expect=small_config()).net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in small_state(seed=3).items())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("length", [234, 245, 252, 300])
def test_a_name_too_long_is_told_before_the_work(tmp_path, length):
    """Also where only the description's temporary name, the longest, does not fit."""
    weights, target = Counting(small_state()), tmp_path / f"{'n' * (length - 3)}.pt"
    with pytest.raises(OSError, match="too long") as refused:
        save(target, weights=weights)
    assert refused.value.filename == str(target) and not weights.order and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.bin", {}, "end it in .safetensors, .pt, .pth or .dcp, or give a folder"),
        ("a.pt", {"form": "onnx"}, "unknown form 'onnx'; choose --to from rcm, wan"),
        ("a.pt", {"max_shard_bytes": 10}, "--max_shard_size is a positive size for a folder"),
        ("folder", {"max_shard_bytes": 0}, "--max_shard_size"),
    ],
)
def test_impossible_targets(tmp_path, name, options, words):
    with pytest.raises(ConfigError, match=words):
        save(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
