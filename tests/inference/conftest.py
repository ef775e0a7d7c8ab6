"""Files of a tiny Wan, which the commands take for the published ones."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.support.tiny_wan_files import WanFiles, expect_a_tiny_vae, write_wan_files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> WanFiles:
    """With a first frame beside them."""
    made = write_wan_files(tmp_path_factory.mktemp("checkpoints"))
    pixels = torch.randint(0, 256, (20, 40, 3), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(made.folder / "first.png")
    return made


@pytest.fixture(autouse=True)
def _tiny_vae(monkeypatch) -> None:
    expect_a_tiny_vae(monkeypatch)
