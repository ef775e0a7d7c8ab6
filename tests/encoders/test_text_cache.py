"""The folder of embeddings: keys, damage, several writers, full disks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm.encoders import text_cache
from rcm.encoders.text_cache import EmbeddingCache, PromptRows

ROWS = torch.arange(12.0).reshape(3, 4).bfloat16()


def cache_in(folder: Path, **identity: str) -> EmbeddingCache:
    return EmbeddingCache(folder, identity={"weights": "w", **identity})


def got(cache: EmbeddingCache, prompt: str = "cat", **options: object) -> PromptRows | None:
    return cache.get(prompt, **{"text_len": 8, "text_dim": 4, "dtype": torch.bfloat16, **options})


def test_what_is_put_is_got(tmp_path: Path, warned: list[str]) -> None:
    cache = cache_in(tmp_path / "new" / "folder")
    assert got(cache) is None
    cache.put("cat", PromptRows(ROWS, cut="tail ⚡"))
    found = got(cache_in(tmp_path / "new" / "folder"))
    assert torch.equal(found.rows, ROWS) and found.rows.dtype == ROWS.dtype
    assert found.cut == "tail ⚡"
    assert got(cache, "Cat") is None
    assert got(cache_in(tmp_path / "new" / "folder", dtype="other")) is None
    assert not warned
    assert [p.suffix for p in (tmp_path / "new" / "folder").iterdir()] == [".safetensors"]


def test_entries_that_do_not_fit_are_distrusted(tmp_path: Path, warned: list[str]) -> None:
    cache = cache_in(tmp_path)
    path, meta = cache.path("cat"), {"prompt": "cat", "cut": ""}
    for number, (tensors, metadata) in enumerate(
        [
            ({"rows": ROWS}, {**meta, "prompt": "dog"}),
            ({"rows": ROWS}, None),
            ({"rows": ROWS.float()}, meta),
            ({"rows": ROWS[:, :3].contiguous()}, meta),
            ({"rows": ROWS[:0]}, meta),
            ({"rows": ROWS.repeat(3, 1)}, meta),
            ({"rows": ROWS / 0}, meta),
            ({"other": ROWS}, meta),
        ],
        start=1,
    ):
        save_file(tensors, path, metadata=metadata)
        assert got(cache) is None
        assert len(warned) == number and "made again" in warned[-1]
    save_file({"rows": ROWS}, path, metadata=meta)
    assert torch.equal(got(cache).rows, ROWS)
    path.write_bytes(b"")
    assert got(cache) is None


def test_a_full_disk_is_a_warning_and_leaves_nothing(tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = cache_in(tmp_path)
    monkeypatch.setattr(text_cache.os, "replace", full)
    cache.put("cat", PromptRows(ROWS))
    assert "No space left" in warned[0]
    assert not list(tmp_path.iterdir())


def test_readers_never_see_half_an_entry(tmp_path: Path, warned: list[str]) -> None:
    rows = torch.randn(400, 64)
    caches = [cache_in(tmp_path) for _ in range(3)]

    def write(cache: EmbeddingCache) -> None:
        for _ in range(30):
            cache.put("cat", PromptRows(rows))

    writers = [threading.Thread(target=write, args=(cache,)) for cache in caches]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        found = got(caches[0], text_len=400, text_dim=64, dtype=torch.float32)
        seen += found is not None
        assert found is None or torch.equal(found.rows, rows)
    for writer in writers:
        writer.join()
    assert seen and not warned
    assert len(list(tmp_path.iterdir())) == 1
