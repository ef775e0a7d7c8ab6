"""What identifies a file of weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

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


def test_identity_of_safetensors_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    identity = content_identity(path)
    assert content_identity(path) == identity
    os.utime(path, (1, 1))
    assert content_identity(path) != identity
    assert content_identity(tmp_path) == content_identity(path)  # a folder with that one file
