"""The advice how to stream a checkpoint works as typed, or is not given."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from rcm.front.commands import COMMANDS
from rcm.inference.stream import main
from rcm.pipelines.described import description_at, stream_command
from rcm.storage.shipped import toy_checkpoint


def test_line_of_the_shipped_checkpoint_streams(tmp_path, monkeypatch, capsys) -> None:
    line = stream_command(toy_checkpoint(), description_at(toy_checkpoint()))
    program, command, *flags = shlex.split(line)
    assert program == "rcm" and COMMANDS[command].module == "rcm.inference.stream"
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 0
    assert capsys.readouterr().err == "", "its prompt has no unknown word"
    assert (tmp_path / "outputs" / "stream.mp4").is_file()


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({"text": {"name": "toy", "words": ["a", "cat", "dog", "runs", "sleeps"]}}, "'a cat dog runs'"),
        ({"text": {"name": "toy"}}, "'a red square moving left'"),
        ({"text": {"name": "umt5"}}, "'a cat on a skateboard'"),
        ({"recipe": None, "sampler": None}, None),
    ],
)
def test_prompt_fits_the_text_encoder(extra: dict, prompt: str | None) -> None:
    found = description_at(toy_checkpoint())
    line = stream_command("my job", replace(found, extra={**found.extra, **extra}))
    assert line == (None if prompt is None else f"rcm stream --ckpt 'my job' --prompt {prompt}")
