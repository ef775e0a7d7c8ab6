"""The examples, the notebook and the programs in the documents run as they stand."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

from tests.hygiene.source import ROOT

EXPECTED = {
    "stream_a_prompt.py": "chunk 0: 1 frames of ",
    "steps_and_noise.py": "4, 2 and 1 steps, from left to right: outputs/steps.mp4",
    "score_a_checkpoint.py": "score 9",
}


def test_every_example_is_listed() -> None:
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert EXPECTED[name] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "last"),
    [("README.md", "8 torch.Size([1, 3, 2, 16, 16])"), ("docs/streaming.md", "at block 21"), ("docs/serve.md", "16, 16])")],
)
def test_the_first_program_of_a_page(page: str, last: str, monkeypatch, capsys) -> None:
    """It ends, and prints what it is there for."""
    monkeypatch.chdir(ROOT)
    program = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[0]
    exec(compile(program, page, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert last in said.splitlines()[-1], said


def cells() -> list[str]:
    notebook = json.loads((ROOT / "examples" / "first_look.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch) -> None:
    """Its cells, one after another, with IPython's display replaced."""
    shown = types.ModuleType("IPython.display")
    shown.Video, shown.display = lambda path, embed: path, lambda item: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "__main__"}
    for source in cells():
        exec(compile(source, "first_look.ipynb", "exec"), space)
    assert os.path.getsize("outputs/notebook.mp4") > 1000
    assert min(space["scores"].values()) > 90
    assert space["model"].loaded.text.unknown_words("a purple dog moving left") == ["purple", "dog"]


def test_notebook_keeps_no_outputs() -> None:
    notebook = json.loads((ROOT / "examples" / "first_look.ipynb").read_text())
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in notebook["cells"] if cell["cell_type"] == "code")
