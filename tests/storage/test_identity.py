"""What identifies a file of weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm.core.errors import CheckpointError
from rcm.storage.identity import content_identity

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def test_identity_follows_the_content_of_a_pickle(tmp_path: Path) -> None:
    first, copy = tmp_path / "a.pth", tmp_path / "renamed.pth"
    torch.save(STATE, first)
    identity = content_identity(first)
    shutil.copy(first, copy)
    os.utime(copy, (1, 1))
    assert content_identity(copy) == identity
    torch.save({**STATE, "a": STATE["a"] + 1}, first)  # same name, same size
    assert content_identity(first) != identity


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 6] = 255  # no zip file has such a version
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be read \(NotImplementedError: zip file version"):
        content_identity(path)


def test_identity_of_safetensors_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    identity = content_identity(path)
    assert content_identity(path) == identity
    os.utime(path, (1, 1))
    assert content_identity(path) != identity
    assert content_identity(tmp_path) == content_identity(path)  # a folder with that one file
