"""Files that are put in place whole: by several writers at once, where something refuses on the
way, and where folders are replaced.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rcm.core import files
from rcm.core.errors import ConfigError
from rcm.core.files import as_refused, put_in_place, replacing, sole_writer, write_atomically


def there(folder: Path) -> dict[str, str]:
    """Every file below `folder`, with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace_file(folder: Path) -> None:
    with replacing(folder / "a") as partial:
        partial.write_text("new")


def replace_folder(folder: Path) -> None:
    with replacing(folder / "d") as partial:
        partial.mkdir()
        (partial / "x").write_text("new")


WRITERS = {"text": lambda folder: write_atomically(folder / "a", "new"), "file": replace_file, "folder": replace_folder}
OLD = {"a": "old", "d/x": "old"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def broken(number: int) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


REFUSED = [(writer, call, True) for writer in WRITERS for call in ("fsync", "replace") if (writer, call) != ("folder", "replace")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(("writer", "call", "exchange"), [*REFUSED, ("folder", "fsync", False), ("folder", "replace", False)])
def test_what_is_refused_leaves_the_old_and_nothing_else(old, monkeypatch, writer, call, number, exchange):
    """With and without a system that swaps two folders in one step."""
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, call, broken(number))
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: '{old}/[ad]'"):
        WRITERS[writer](old)
    assert there(old) == OLD and sorted(os.listdir(old)) == ["a", "d"]
    monkeypatch.undo()
    WRITERS[writer](old)
    assert sorted(there(old).values()) == ["new", "old"]


def test_the_second_of_two_renames_gives_the_old_folder_back(old, monkeypatch):
    replace, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(old)
    assert there(old) == OLD


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_the_old_and_the_next_one_cleans_up(old, monkeypatch, writer):
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        try:
            WRITERS[writer](old)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert {name: text for name, text in there(old).items() if name in OLD} == OLD
    WRITERS[writer](old)
    assert sorted(there(old).values()) == ["new", "old"] and sorted(os.listdir(old)) == ["a", "d"]


def test_a_folder_is_not_what_a_file_replaces(old):
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{old}/d'"), replacing(old / "d") as partial:
        partial.write_text("new")
    assert there(old) == OLD
    with replacing(old / "a") as partial:
        partial.mkdir()
    assert (old / "a").is_dir() and sorted(os.listdir(old)) == ["a", "d"]
    (old / "link").symlink_to(old / "d")
    put_in_place(old / "a", old / "link")
    assert (old / "d" / "x").read_text() == "old" and not (old / "link").is_symlink()


def test_writers_of_one_text_take_turns(tmp_path):
    """Each of them writes all of it: none takes another's half for its own."""
    texts = [letter * 50_000 for letter in "abcd"]
    seen, done, written = set(), threading.Event(), []
    write_atomically(tmp_path / "t", texts[0])

    def watch() -> None:
        while not done.is_set():
            seen.add((tmp_path / "t").read_text())

    def write(text: str) -> None:
        for _ in range(20):
            write_atomically(tmp_path / "t", text)
        written.append(text)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert sorted(written) == texts and seen <= set(texts) and os.listdir(tmp_path) == ["t"]


def test_a_second_writer_of_one_target_is_refused(tmp_path):
    with replacing(tmp_path / "a") as partial:
        partial.write_text("first")
        with pytest.raises(ConfigError, match="a is being written by another process; wait"), replacing(tmp_path / "a"):
            raise AssertionError
    assert there(tmp_path) == {"a": "first"}


def test_a_file_that_its_writer_has_just_placed_is_not_written_again(tmp_path, monkeypatch):
    """The second writer opened it under its first name, and got the lock once that was done."""
    path, lock = tmp_path / "partial", files._locked
    path.write_text("whole")

    def late(file: object, *, wait: bool) -> bool:
        if path.exists() and path.stat().st_size:
            os.replace(path, tmp_path / "placed")
        return lock(file, wait=wait)

    monkeypatch.setattr(files, "_locked", late)
    with sole_writer(path) as file:
        file.write(b"own")
    assert there(tmp_path) == {"partial": "own", "placed": "whole"}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("precious")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("left", [pipe, link, Path.mkdir])
def test_what_stands_at_the_temporary_name_is_removed(tmp_path, left):
    left(tmp_path / "a.writing")
    write_atomically(tmp_path / "a", "new")
    assert {**there(tmp_path), "elsewhere": "precious"} == {"a": "new", "elsewhere": "precious"}


WORDS = {
    "[enforce fail] unexpected pos 704 vs 598 [Errno 28] No": errno.ENOSPC,
    "unexpected pos 704 vs 598": errno.EIO,
    "shapes differ": None,
}


@pytest.mark.parametrize("words", WORDS)
def test_words_of_torch_for_what_the_system_refused(tmp_path, words):
    found = as_refused(RuntimeError(words), tmp_path / "nothing" / "x.pt")
    assert getattr(found, "errno", None) == WORDS[words]
