"""Every container gives the same tensors; whatever is not whole is refused when it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm.core.errors import CheckpointError
from rcm.pipelines.weight_files import open_weights
from rcm.storage import weight_files
from rcm.storage.weight_files import open_container
from tests.support.weight_folders import own, small_state, write_shards


@pytest.fixture(scope="module")
def state() -> dict:
    """Some of the tensors are enough here, and one of them in another dtype."""
    tensors = dict(list(small_state().items())[:12])
    return tensors | {"half": torch.arange(10, dtype=torch.bfloat16), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}


def write(path: Path, state: dict) -> Path:
    if path.name == "shards":
        return write_shards(path, state)
    if path.suffix == ".safetensors":
        save_file(own(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="old" not in path.stem)
    return path


CONTAINERS = {
    "new.pt": "torch pickle",
    "old.pt": "torch pickle of the old format",
    "x.safetensors": "safetensors",
    "shards": "3 shards, safetensors",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_arrive_as_they_were_written(state, tmp_path, name):
    file = open_container(write(tmp_path / name, state))
    assert file.container == CONTAINERS[name] and set(file) == set(state) and file.others == ()
    for key, value in state.items():
        header, got = file.headers[key], file[key]
        assert header.is_meta and header.shape == value.shape and header.dtype == value.dtype
        assert got.dtype == value.dtype and torch.equal(got, value)
    with pytest.raises(KeyError):
        file["nothing"]


def test_old_torch_files_are_read_with_a_warning(state, tmp_path, warned):
    open_container(write(tmp_path / "old.pt", state))
    assert any("read into memory as a whole" in message for message in warned)


def test_an_expanded_view_is_told_as_what_it_is(tmp_path):
    """torch.save writes it, with fewer numbers than its shape has; the file is whole."""
    torch.save({"a": torch.ones(1).expand(128)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"beyond the 1 elements of its storage, an expanded view\? save x\.contiguous\(\)"):
        open_container(tmp_path / "x.pt")


def test_pickled_parameters_carry_no_graph(tmp_path):
    """A file of `named_parameters()`: what is copied from them must not record anything."""
    torch.save(dict(torch.nn.Linear(2, 3).named_parameters()), tmp_path / "p.pt")
    assert not open_container(tmp_path / "p.pt")["weight"].requires_grad


def test_nested_entries_and_what_is_no_tensor(tmp_path):
    torch.save({"generator": {"a.b": torch.ones(2)}, "step": 3, "optimizer": {"state": {0: torch.ones(1)}}, "note": "x"}, tmp_path / "n.pt")
    file = open_container(tmp_path / "n.pt")
    assert set(file) == {"generator.a.b"} and set(file.others) == {"step", "optimizer.state", "note"}
    with pytest.raises(CheckpointError, match=r"n\.pt holds entries that are not tensors: step, optimizer\.state, note; expected a flat"):
        file.require_tensors_only()


def test_tensors_without_names_are_told(tmp_path, warned):
    """Numbered or listed: no network has such entries, and a reader that skips them must say so."""
    torch.save(
        {"a": torch.ones(2), "b": {0: torch.ones(1), "c": torch.ones(1)}, "d": [({"e": torch.ones(1)},)], "f": [1]}, tmp_path / "n.pt"
    )
    file = open_container(tmp_path / "n.pt")
    assert set(file) == {"a"} and file.others == ("b", "d", "f") and file.unnamed == ("b", "d")
    assert any("the tensors under b, d have no names" in message for message in warned)
    with pytest.raises(CheckpointError, match=r"n\.pt holds tensors without names under b, d"):
        file.require_named()


def test_weights_that_need_scales_are_named(tmp_path):
    """Only those that are asked for: a table of positions may well be of integers."""
    odd = {"q": torch.zeros(2, dtype=torch.int8), "f": torch.zeros(2).to(torch.float8_e4m3fn), "good": torch.zeros(2)}
    for name in ("x.safetensors", "new.pt"):
        file = open_container(write(tmp_path / name, odd))
        file.require_floats(["good"])
        with pytest.raises(CheckpointError, match=rf"{name} holds weights that are not .*bfloat16: q \(int8\), f \(float8_e4m3fn\)"):
            file.require_floats(["q", "good", "f"])


def test_nothing_is_read_before_it_is_asked_for(state, tmp_path, monkeypatch):
    asked = []

    plain = weight_files.read_entry

    def recording(path, header, start):
        asked.append(tuple(header.shape))
        return plain(path, header, start)

    monkeypatch.setattr(weight_files, "read_entry", recording)
    file = open_container(write_shards(tmp_path / "shards", state))
    assert asked == [] and len(file) == len(state)
    assert torch.equal(file["half"], state["half"]) and asked == [(10,)]
    shard = next(path for path in (tmp_path / "shards").glob("*.safetensors") if "half" in load_file(path))
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="shards.*cannot be read .*the file ends .* bytes early"):
        [file[key] for key in file]


CUTS = {"header": 6, "early": 150, "middle": 0.5, "late": -3}


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "x.safetensors"])
@pytest.mark.parametrize("cut", CUTS)
def test_truncated_files_are_refused(state, tmp_path, name, cut):
    path = write(tmp_path / name, state)
    whole, where = path.read_bytes(), CUTS[cut]
    path.write_bytes(whole[: int(where * len(whole)) if isinstance(where, float) else where])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(.*\); it is damaged, truncated or not a "):
        open_container(path)


@pytest.mark.parametrize("values", [[], [1.0], [float(n) for n in range(300)]], ids=len)
@pytest.mark.parametrize("name", ["new.pt", "old.pt", "x.safetensors"])
def test_a_file_cut_anywhere_near_its_end_is_refused(tmp_path, name, values):
    """Also of an empty tensor, of which the old format ends with eight zeros."""
    path = write(tmp_path / name, {"last": torch.tensor(values)})
    whole = path.read_bytes()
    for cut in range(1, 33):
        path.write_bytes(whole[:-cut])
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_container(path)


def test_no_flipped_bit_of_an_archive_passes_for_other_weights(tmp_path):
    """It has checksums: wherever the bit is, the values are as before, or the file is refused."""
    path = write(tmp_path / "new.pt", {"a": torch.arange(3.0), "b": torch.zeros(0), "c": torch.ones((), dtype=torch.uint8)})
    whole, want = path.read_bytes(), open_container(path)
    want, refused = {key: want[key].clone() for key in want}, 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            file = open_container(path)
            got = {key: file[key] for key in file}
        except CheckpointError:
            refused += 1
        else:
            assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want), at
    assert refused > len(whole) // 21


@pytest.mark.parametrize("name", ["new.pt", "x.safetensors"])
def test_a_hole_in_the_middle_is_found(state, tmp_path, name):
    """A resumed download that skipped some bytes ends as it should and is still refused."""
    path = write(tmp_path / name, state)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + whole[len(whole) // 2 + 4096 :])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_container(path)


def test_bytes_moved_inside_a_zip_are_found(state, tmp_path):
    """Same length, an entry's header overwritten."""
    path = write(tmp_path / "new.pt", state)
    whole = bytearray(path.read_bytes())
    second = whole.index(b"PK\x03\x04", 100)
    whole[second : second + 4] = b"\x00\x00\x00\x00"
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="is not where the directory says"):
        open_container(path)


@pytest.mark.parametrize("stem", ["模型", "modèle"])
def test_names_outside_ascii(state, tmp_path, stem):
    """torch names the entries of its archive after the file."""
    torch.save(state, tmp_path / f"{stem}.pt")
    assert len(open_container(tmp_path / f"{stem}.pt")) == len(state)


def test_shards_must_be_complete(state, tmp_path):
    folder = write_shards(tmp_path / "a", state)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"index\.json names 3 shards, of which 1 .*00002-of-00003.*download is incomplete, or the index"
    ):
        open_container(folder)
    folder = write_shards(tmp_path / "b", state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["ghost"] = "diffusion_pytorch_model-00001-of-00003.safetensors"
    del listed["weight_map"]["half"]
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="the shards lack: ghost; the reverse: half"):
        open_container(index)
    listed["weight_map"].pop("ghost")
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="the shards lack: none; the reverse: half"):
        open_container(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_container(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        open_container(folder)
    shard = next(write_shards(tmp_path / "c", state).glob("*2-of*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read"):
        open_container(shard.parent)


def test_a_damaged_index_is_named_and_not_its_shards(state, tmp_path):
    """Wherever the byte is: what is there is the network, or it is the index that is blamed."""
    folder = write_shards(tmp_path / "a", state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    whole = index.read_bytes()
    for at in range(0, len(whole), 5):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 7)]) + whole[at + 1 :])
        told = str(index)
        try:
            assert set(open_container(folder)) == set(state)
        except CheckpointError as error:
            told = str(error)
        assert told.startswith(str(index)), at


def test_a_shard_alone_and_an_empty_path_are_no_network(state, tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "a", state, shards=2)
    alone = tmp_path / "alone" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    alone.parent.mkdir()
    shutil.copy(folder / alone.name, alone)
    for path in (folder / alone.name, alone, alone.parent):
        with pytest.raises(CheckpointError, match=r"00002\.safetensors is one of 2 shards of a network; give its folder"):
            open_container(path)
    assert len(open_container(write_shards(tmp_path / "b", state, shards=1) / "diffusion_pytorch_model-00001-of-00001.safetensors"))
    monkeypatch.chdir(folder)
    for empty in ("", " "):
        for opened in (open_container, open_weights):
            with pytest.raises(CheckpointError, match="path of the weights is empty"):
                opened(empty)
    assert len(open_container(".")) == len(state)


def test_folders_with_one_network(state, tmp_path):
    with pytest.raises(CheckpointError, match=r"one network \(files of weights in it: none\).*; ask Ann"):
        open_container(tmp_path, hint="ask Ann")
    write(tmp_path / "a.pt", state)
    (tmp_path / "config.json").write_text('{"heads": 4}')
    assert len(open_container(tmp_path)) == len(state) and open_container(tmp_path).config == {"heads": 4}
    write(tmp_path / "b.safetensors", state)
    with pytest.raises(CheckpointError, match=r"files of weights in it: a\.pt, b\.safetensors\); give the file"):
        open_container(tmp_path)
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    assert open_container(tmp_path).path.name == "diffusion_pytorch_model.safetensors"


def test_a_folder_that_offers_both_formats(state, tmp_path):
    """Public folders keep pickles called .bin beside the same weights as safetensors."""
    one, shards = tmp_path / "one", write_shards(tmp_path / "shards", state)
    one.mkdir()
    write(one / "pytorch_model.bin", state)
    assert open_container(one).container == "torch pickle"
    write(one / "model.safetensors", state)
    assert open_container(one).container == "safetensors"
    (shards / "pytorch_model.bin.index.json").write_text("{}")
    assert open_container(shards).container == "3 shards, safetensors"


def test_a_pickle_larger_than_memory_says_so(state, tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")

    path = write(tmp_path / "new.pt", state)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", full)
    with pytest.raises(CheckpointError, match=r"new\.pt cannot be read .*this machine has less memory; use a safetensors file"):
        open_container(path)


class Opaque:
    """Something that only pickle knows."""


def test_other_files_are_refused(tmp_path):
    torch.save({"config": Opaque(), "model": torch.ones(1)}, tmp_path / "objects.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "page.pth").write_text("<html>please log in</html>")
    for name in ("model.gguf", "notes.txt", "empty.pt", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for name, words in {
        "objects.pt": r"needs Python objects other than tensors \(.*Opaque\), which are not executed",
        "list.pt": "holds a list, not a state dict",
        "page.pth": r"page\.pth cannot be read \(UnpicklingError: it has the instruction b'<'.*\); it is damaged",
        "nowhere.pt": "nowhere.pt does not exist; ask Ann",
        "model.gguf": "GGUF file, whose weights are quantised",
        "notes.txt": "no file of weights: expected a name ending in .pt",
        "empty.pt": "cannot be read",
        "empty.safetensors": "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            open_container(tmp_path / name, hint="ask Ann")
