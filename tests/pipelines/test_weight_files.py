"""Checkpoints of runs and published folders, beside the containers that tests/storage tries."""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import CheckpointError
from rcm.pipelines.weight_files import experts_at, open_weights
from tests.support.weight_folders import small_state, write_dcp, write_shards


@pytest.fixture(scope="module")
def state() -> dict:
    """Some of the tensors are enough here."""
    return dict(list(small_state().items())[:12])


def test_a_dcp_directory_gives_what_was_written(state, tmp_path):
    file = open_weights(write_dcp(tmp_path / "dcp", state))
    assert file.container == "DCP directory" and set(file) == set(state) and file.others == ()
    for key, value in state.items():
        header, got = file.headers[key], file[key]
        assert header.is_meta and header.shape == value.shape and header.dtype == value.dtype
        assert got.dtype == value.dtype and torch.equal(got, value)
    with pytest.raises(KeyError):
        file["nothing"]


def test_dcp_directories_must_be_complete(state, tmp_path):
    folder = write_dcp(tmp_path / "a", state)
    data = next(folder.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{data.name} is truncated: it has {len(whole) - 10} bytes"):
        open_weights(folder)
    data.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {data.name}, one of its 1 files"):
        open_weights(folder)
    (folder / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="metadata cannot be read"):
        open_weights(folder)


def test_folders_that_could_mean_several_networks(state, tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        write_shards(tmp_path / "A14B" / name, state)
    with pytest.raises(CheckpointError, match=r"two networks: .*high_noise_model \(high noise\) and .*low_noise_model \(low noise\)"):
        open_weights(tmp_path / "A14B")
    assert [path.name for path in experts_at(tmp_path / "A14B")] == ["high_noise_model", "low_noise_model"] and experts_at(tmp_path) == ()
    assert len(open_weights(tmp_path / "A14B" / "low_noise_model")) == len(state)
    (tmp_path / "A14B" / "high_noise_model").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="one of two experts, low_noise_model, and not the other; give .*A14B/low_noise_model if"):
        open_weights(tmp_path / "A14B")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="files of weights in it: none.* is not a DCP checkpoint"):
        open_weights(empty)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist"):
        open_weights(tmp_path / "nowhere.pt")
