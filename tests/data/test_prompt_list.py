from __future__ import annotations

import pytest

from rcm.core.errors import ConfigError
from rcm.data.prompt_list import read_prompt_list


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "one, two\n three \n\n\n"),
        ("a.csv", 'id,caption\n1,"one, two"\n2, three \n'),
        ("a.jsonl", '{"prompt": "one, two"}\n{"caption": " three"}\n'),
        ("b.csv", '\ufeffprompt,text\n"one, two",no\nthree,no\n'),
        ("c.csv", 'prompt\r\n"one, two"\r\nthree\r\n'),
        ("b.txt", "one, two\r\nthree\r"),
        ("A.CSV", 'prompt\n"one, two"\nthree\n'),
        ("A.JSONL", '{"prompt": "one, two"}\n{"text": "three"}\n'),
    ],
)
def test_formats(tmp_path, name, text):
    assert read_prompt_list(written(tmp_path, name, text)) == ["one, two", "three"]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1e"])
@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "a{}b\nc"), ("a.csv", "prompt\na{}b\nc"), ("a.jsonl", '{{"text": "a{}b"}}\n{{"text": "c"}}')]
)
def test_only_a_new_line_ends_a_prompt(tmp_path, name, text, mark):
    if name == "a.jsonl" and mark < " ":
        mark = "\u2029"  # JSON has no raw control characters
    assert read_prompt_list(written(tmp_path, name, text.format(mark))) == [f"a{mark}b", "c"]


def test_bad_prompts_are_named_or_left_out(tmp_path):
    path = written(tmp_path, "a.txt", "first\n\n" + "x" * 50 + "\nlast\n")
    with pytest.raises(
        ConfigError, match=r"2 of 4 prompts.*a\.txt:2 is empty; .*a\.txt:3 has 50 characters, at most 40.*--skip_bad_prompts"
    ):
        read_prompt_list(path, max_chars=40)
    assert read_prompt_list(path, max_chars=40, skip_bad=True) == ["first", "last"]
    assert read_prompt_list(path, max_chars=50, skip_bad=True)[1] == "x" * 50


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.json", b'["one", "two"]', r"a\.json would be read line by line"),
        ("a.txt", b"one\ncaf\xe9\n", r"a\.txt:2 is not UTF-8 .*iconv -f LATIN1 -t UTF-8 .*a\.utf8\.txt"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.txt", b"one\n&nbsp;\n\0\n\xe2\x80\x8b\n", "3 of 4 prompts cannot be used: .*:2 is empty; .*:3 is empty; .*:4 is empty"),
        ("a.jsonl", b"[" * 100000, "a.jsonl:1 is not JSON"),
        ("a.jsonl", b"9" * 5000, "a.jsonl:1 is not JSON"),
        ("a.csv", b"id,words\n1,x\n", "header with a column prompt or caption or text, got id, words"),
        ("a.csv", b"prompt\na cat, on a mat\n", r"a\.csv:2 has 2 fields, the header 1; put a prompt with a comma in quotes"),
        ("a.csv", b'prompt,id\n"open, 1\nb,2\n', r"a\.csv:3 .*unexpected end of data"),
        pytest.param("a.csv", b'prompt\n"' + b"x" * 200000 + b'"\n', r"a\.csv:.*field larger", id="huge field"),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1 needs a string under prompt"),
        ("a.jsonl", b"{", "a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"prompt": ""}', "is empty"),
    ],
)
def test_unusable_files(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        read_prompt_list(tmp_path / name)
    with pytest.raises(ConfigError, match="no prompt file at"):
        read_prompt_list(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="is a folder or a device, not a prompt file"):
        read_prompt_list(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_what_an_editor_puts_before_the_text_is_no_part_of_it(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("caf\xe9\r\ntwo\r\n\r\n".encode(encoding))
    assert read_prompt_list(tmp_path / "a.txt") == ["caf\xe9", "two"]
