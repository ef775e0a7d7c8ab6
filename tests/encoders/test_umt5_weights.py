"""Names, shapes and the strict reading of umT5 files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.umt5_weights import UMT5Shape, empty_umt5, load_umt5, open_umt5
from tests.support.tiny_umt5 import TINY, random_umt5

TIED = "encoder.embed_tokens.weight"
THEIRS = {row.ours: row.theirs[0] for row in TINY.rows()}


def saved(tmp_path: Path, state: dict[str, torch.Tensor], name: str = "t5.pth") -> Path:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def renamed() -> dict[str, torch.Tensor]:
    return {THEIRS[name]: value for name, value in random_umt5().items()}


def test_full_size_has_the_published_count() -> None:
    shapes = UMT5Shape().tensors()
    assert len(shapes) == 242
    assert sum(map(prod, shapes.values())) == 5_680_910_336
    net = empty_umt5(UMT5Shape())
    assert all(p.is_meta for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == 5_680_910_336
    theirs = {name: tuple(value.shape) for name, value in net.state_dict().items() if name != TIED}
    assert {row.theirs[0]: shape for row, shape in zip(UMT5Shape().rows(), shapes.values(), strict=True)} == theirs


def test_names_are_the_published_ones() -> None:
    """A swap of equal shapes that goes both ways would pass a comparison of two files of this
    package.
    """
    names = {row.ours: row.theirs for row in UMT5Shape().rows()}
    assert len(set(names.values())) == len(names)
    assert names["blocks.7.ffn.gate.0.weight"] == ("encoder.block.7.layer.1.DenseReluDense.wi_0.weight",)
    assert names["blocks.7.ffn.fc1.weight"] == ("encoder.block.7.layer.1.DenseReluDense.wi_1.weight",)
    assert names["norm.weight"] == ("encoder.final_layer_norm.weight",)


def test_a_number_of_a_block_makes_no_other_blocks(tmp_path: Path) -> None:
    for stranger in ("blocks.99999999999.norm1.weight", "blocks.x.norm1.weight"):
        with pytest.raises(CheckpointError, match=rf"1 unexpected key\(s\): {stranger}"):
            open_umt5(saved(tmp_path, {**random_umt5(), stranger: torch.zeros(24)}))


def test_sizes_are_read_off_the_file(tmp_path: Path) -> None:
    assert open_umt5(saved(tmp_path, random_umt5())).shape == TINY


@pytest.mark.parametrize("form", ["original.pth", "original.safetensors", "theirs.pth", "theirs.safetensors", "shards"])
def test_every_container_gives_the_same_weights(tmp_path: Path, form: str) -> None:
    state = renamed() if form in ("shards",) or form.startswith("theirs") else random_umt5()
    path = tmp_path if form == "shards" else saved(tmp_path, state, form)
    if form == "shards":
        places = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
        for shard in set(places.values()):
            save_file({name: state[name] for name in state if places[name] == shard}, tmp_path / shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    net = load_umt5(open_umt5(path), device="cpu", dtype=torch.float32)
    loaded = net.state_dict()
    assert torch.equal(loaded.pop(TIED), loaded["shared.weight"])
    assert loaded.keys() == renamed().keys()
    assert all(torch.equal(loaded[name], value) for name, value in renamed().items())
    assert net.shared is net.encoder.embed_tokens
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_a_tied_copy_is_accepted_and_a_different_one_is_not(tmp_path: Path) -> None:
    state = renamed()
    assert open_umt5(saved(tmp_path, {**state, TIED: state["shared.weight"].clone()})).shape == TINY
    only = {**state, TIED: state["shared.weight"]}
    del only["shared.weight"]
    assert open_umt5(saved(tmp_path, only)).shape == TINY
    with pytest.raises(CheckpointError, match="one token embedding"):
        open_umt5(saved(tmp_path, {**state, TIED: state["shared.weight"] + 1}))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = random_umt5()
    lacking = {name: value for name, value in state.items() if name != "blocks.1.attn.o.weight"}
    with pytest.raises(CheckpointError, match=r"missing 1 key\(s\): blocks\.1\.attn\.o\.weight"):
        open_umt5(saved(tmp_path, lacking))
    with pytest.raises(CheckpointError, match=r"does not fit a umT5 encoder of .*1 unexpected key\(s\): blocks\.0\.attn\.q\.bias"):
        open_umt5(saved(tmp_path, {**state, "blocks.0.attn.q.bias": torch.zeros(30)}))
    with pytest.raises(CheckpointError, match=r"another shape: blocks\.1\.ffn\.fc2\.weight has shape \(40, 24\), expected \(24, 40\)"):
        open_umt5(saved(tmp_path, {**state, "blocks.1.ffn.fc2.weight": torch.zeros(40, 24)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected key\(s\): decoder\.final_layer_norm\.weight"):
        open_umt5(saved(tmp_path, {**renamed(), "decoder.final_layer_norm.weight": torch.zeros(24)}))
    with pytest.raises(CheckpointError, match=r"under two names: norm\.weight"):
        open_umt5(saved(tmp_path, {"norm.weight": torch.ones(24), **renamed()}))
    with pytest.raises(CheckpointError, match="not tensors: step"):
        open_umt5(saved(tmp_path, {**state, "step": 3}))
    with pytest.raises(CheckpointError, match="is no umT5 encoder"):
        open_umt5(saved(tmp_path, {"weight": torch.zeros(3)}))


def test_a_missing_file_says_where_it_is_published() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/t5\.pth does not exist.*Wan-AI/Wan2\.1-T2V-1\.3B.*--text_encoder_path"):
        open_umt5("nowhere/t5.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = saved(tmp_path, random_umt5(), f"t5{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        open_umt5(path)


def test_quantised_weights_and_other_dtypes_are_refused(tmp_path: Path) -> None:
    state = random_umt5()
    state["blocks.0.attn.q.weight"] = state["blocks.0.attn.q.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"not float64, .*: blocks\.0\.attn\.q\.weight \(float8_e4m3fn\)"):
        open_umt5(saved(tmp_path, state))
    good = open_umt5(saved(tmp_path, random_umt5()))
    with pytest.raises(ConfigError, match="overflows in float16"):
        load_umt5(good, device="cpu", dtype=torch.float16)


def test_weights_on_the_cpu_are_views_of_the_file(tmp_path: Path) -> None:
    """No second copy: without a cast the parameters lie in the mapped file."""
    path = saved(tmp_path, random_umt5())
    weights = open_umt5(path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    net = load_umt5(weights, device="cpu", dtype=torch.float32)
    for name, stored in weights.names.items():
        assert net.get_parameter(THEIRS[name]).data_ptr() == weights.file[stored].data_ptr()
