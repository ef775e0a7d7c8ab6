"""Files that a user names: text as editors leave it, and targets that are what they were when they
were looked at.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile, is_file_of
from rcm.core.text_file import lines_of, read_lines, read_text
from tests.hygiene.source import ROOT


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_are_no_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("caf\u00e9\r\n\u2028two\r\n \r\n".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "caf\u00e9\r\n\u2028two\r\n \r\n"
    assert read_lines(tmp_path / "a.txt") == ["caf\u00e9", "\u2028two"]


def test_only_line_ends_end_lines():
    assert lines_of("a\rb\r\nc\n\nd\x0be\x85f\n\n \n") == ["a", "b", "c", "", "d\x0be\x85f"]
    assert lines_of("") == lines_of("\n \n") == []


def test_the_advice_for_another_encoding_works_as_printed(tmp_path):
    path = tmp_path / "it's mine.txt"
    path.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ConfigError, match=r"caption file .*it's mine\.txt:2 is not UTF-8 \(.*0xe9\)") as refused:
        read_text(path, what="caption file")
    assert os.system(str(refused.value).partition("convert it: ")[2]) == 0
    assert read_text(tmp_path / "it's mine.utf8.txt") == "one\ncaf\u00e9\n"


def test_what_is_looked_at_is_what_is_written(tmp_path, monkeypatch):
    """Also when the folder that a relative name counts from, or the link that it goes through, is
    another by then.
    """
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/there.json")
    monkeypatch.chdir(tmp_path)
    relative, linked = OutputFile.claim("new/12:30.json", suffix=".json"), OutputFile.claim("link.json")
    assert not list(tmp_path.rglob(".*")) and not (tmp_path / "real" / "there.json").exists()
    monkeypatch.chdir("/")
    (tmp_path / "link.json").unlink()
    relative.write("one")
    linked.write(b"two")
    assert (tmp_path / "new" / "12:30.json").read_text() == "one"
    assert (tmp_path / "real" / "there.json").read_text() == "two"


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("older")
    target = OutputFile.claim(tmp_path / "a.json")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write: No space left.*a\.json"):
        target.write("newer")
    assert (tmp_path / "a.json").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "is no name of a file"),
        (" ", "no name"),
        ("~/a.mp4", r"a folder called ~; write /.*a\.mp4"),
        ("a\0b", "no name"),
        ("caf\udce9.mp4", "not UTF-8"),
        ("a.avi", r"must end in \.mp4"),
    ],
)
def test_names_that_are_none(tmp_path, name, told):
    with pytest.raises(ConfigError, match=f"--save_path .*{told}"):
        OutputFile.claim(name, suffix=".mp4", knob="--save_path")


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="is a device or a pipe"):
        OutputFile.claim(tmp_path / "pipe.mp4")
    assert stat.S_ISFIFO((tmp_path / "pipe.mp4").stat().st_mode)
    if os.geteuid():
        Path(tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match="cannot write there: Permission denied"):
            OutputFile.claim(tmp_path / "locked" / "a.mp4")


def test_a_file_has_many_names_and_a_word_none(tmp_path, monkeypatch):
    """`--device cpu --report cpu.json` replaces nothing."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "a.pt"
    made.write_text("")
    (tmp_path / "soft").symlink_to(made), (tmp_path / "hard").hardlink_to(made)
    for target, given in (("a.pt", made), ("soft", "a.pt"), (made, "hard"), ("hard", "./soft"), ("a.pt.json", made), ("b.pt", "b.pt")):
        assert is_file_of(Path(target), given), (target, given)
    for target, given in (("cpu.json", "cpu"), ("b.pt", made), ("a.pt", "x" * 5000), ("a.pt", "\0"), ("a.pt", "")):
        assert not is_file_of(Path(target), given), (target, given)


def test_a_folder_is_called_one(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        OutputFile.claim(str(tmp_path / "a.mp4"), suffix=(".mp4",), knob="--save_path")


def test_what_is_written_does_not_depend_on_the_locale(tmp_path):
    text = "import sys, pathlib, rcm.core.files as f; f.write_atomically(pathlib.Path(sys.argv[1]), 'fa\\xe7ade')"
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", text, tmp_path / "a"], env=plain, check=True)
    assert (tmp_path / "a").read_bytes() == b"fa\xc3\xa7ade"
