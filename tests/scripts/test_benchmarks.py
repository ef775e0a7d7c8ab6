"""What benchmarks have in common: they refuse without a card, check before they time, and a command
that fails ends with a status that says so.
"""

from __future__ import annotations

import ast
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from rcm.core.errors import ConfigError
from scripts import bench_measure, bench_stream_runs
from tests.hygiene.source import ROOT, files, name, tree

ON_CARDS = ["attention", "fp8_attention", "kv_codec", "policies", "stream", "stream_cache", "stream_ranks", "train_step", "vae"]


@pytest.mark.parametrize("bench", ON_CARDS)
def test_refused_without_a_card_in_one_sentence(bench: str, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert import_module(f"scripts.bench_{bench}").main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: bench_{bench} needs a CUDA device") and said.count("\n") == 1
    assert not list(tmp_path.iterdir()), "it left a file"


TINY = ["--size", "tiny"]
LITTLE = ["--latents", "2x3x4x5", "--text", "6x7", "--samples", "18", "--seconds", "0.01", "--workers", "0"]


@pytest.mark.parametrize(
    ("bench", "words", "refusal"),
    [
        ("scale", ["--report", "--json", "none.json"], "none.json is none"),
        ("attention", ["--frames", "6"], "--frames 6 is no whole number of blocks of c3-3"),
        ("fp8_attention", ["--only", "zz"], "--only zz is part of no name; choose from bf16, gluon"),
        ("kv_bias", ["--frames", "1"], "no pass has 16 tokens in its past; give more --frames"),
        ("policies", ["--size", "0x0"], "--size 0x0 (HxW) must be multiples of 16"),
        ("stream_ranks", ["--sizes", "7B"], "--sizes: unknown '7B'; choose from 1.3B, 14B"),
        ("vae", ["--frames", "80"], "--frames 80 must be 1 + 4 k, at least 37"),
        ("vae", ["--width", "836"], "--width 836 must be a multiple of 8"),
        ("data", ["--folder", "nowhere"], "nowhere is no folder"),
        ("data", [*LITTLE, "--workers", "0", "-1"], "--workers -1 must be at least 0"),
        ("data", [*LITTLE, "--latents", "2x3"], "--latents takes four sizes"),
        ("data", [*LITTLE, "--latents", "2x0x1x1"], "is not sizes joined by x"),
        ("data", [*LITTLE, "--index", "10", "--shards", "3"], "choose a divisor"),
        ("data", [*LITTLE, "--data", "/nowhere/*.tar"], "change --data"),
        ("data", [*LITTLE, "--batch", "99"], "18 samples do not fill one global batch of 99"),
        ("checkpoint", ["--folder", "nowhere"], "nowhere is no folder"),
        ("checkpoint", [*TINY, "--blocks", "3"], "--blocks 3 must be in 1 to the 2 of tiny"),
        ("checkpoint", ["--size", "7B"], "invalid choice"),
        ("multi_gpu", ["--device", "cpu", "--dim", "130", "--truth", "x.pt"], "--dim 130 must be a multiple of 128"),
        ("memory", [], "bench_memory needs a CUDA device; give a small experiment, or --predict"),
    ],
)
def test_what_nothing_can_be_done_with_is_refused(bench, words, refusal, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = import_module(f"scripts.bench_{bench}").main(words)
    except SystemExit as end:  # argparse's
        status = end.code
    said = capsys.readouterr().err
    assert status == 2 and refusal in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir()), "it left a file"


def test_no_command_forgets_its_status() -> None:
    """`main()` alone at the end of a file would end with 0 whatever it returned."""
    found = []
    for path in files("rcm", "scripts", "examples", "evaluation"):
        for node in tree(path).body if "__main__" in path.read_text() else ():
            if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                bare = [ast.unparse(step) for step in node.body if isinstance(step, ast.Expr)]
                found += [f"{name(path)}: {step}" for step in bare if not step.startswith(("sys.exit(", "raise "))]
    assert not found
    assert (ROOT / "scripts" / "bench_stream.py").read_text().endswith("sys.exit(main())\n")


def test_checks_come_before_times(capsys) -> None:
    assert bench_measure.require({"sum": (1e-3, 1e-2)}) == {"sum": 1e-3}
    for wrong in (2e-2, float("nan")):
        with pytest.raises(bench_measure.CheckFailed, match="above budget, so nothing is timed: sum"):
            bench_measure.require({"sum": (wrong, 1e-2), "other": (0.0, 0.0)})
    assert "sum" in capsys.readouterr().out


def test_errors_are_relative_and_nan_is_the_largest() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert bench_measure.relative(truth + torch.tensor([0.0, 0.5]), truth) == pytest.approx(0.1)
    assert bench_measure.relative(truth * float("nan"), truth) == float("inf")


def test_a_part_that_fails_leaves_the_others_their_numbers(capsys) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("no such kernel\nand more")

    assert bench_measure.attempted(broken) == {"error": "RuntimeError: no such kernel"}
    assert bench_measure.attempted(lambda: {"ms": 1.0}) == {"ms": 1.0}

    def wrong() -> dict[str, float]:
        return bench_measure.require({"latents": (1.0, 0.1)})

    with pytest.raises(bench_measure.CheckFailed):  # nothing that rests on it is timed
        bench_measure.attempted(wrong)


def test_latents_are_timed_when_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk without pixels is handed out while the card still works on it: its own stamp is that
    of its issue.
    """
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.02))
    pixels, latents = torch.zeros(1, 3, 4, 2, 2), torch.zeros(1, 16, 1, 2, 2)
    chunks = [SimpleNamespace(seconds=1.0, images=pixels, frames=pixels)]
    chunks += [SimpleNamespace(seconds=2.0, images=None, frames=latents), None]
    found = bench_stream_runs.watch(SimpleNamespace(step=iter(chunks).__next__))
    assert found["stamps"][0] == pytest.approx(1, abs=0.01) and found["stamps"][1] >= 2.02
    assert found["frames"] == [4, 1] and found["fps"] == 5 / found["stamps"][1]


def test_parts_are_chosen_by_name() -> None:
    assert bench_measure.chosen_parts("b,a", ["a", "b"]) == ["b", "a"]
    with pytest.raises(ConfigError, match="--parts: unknown 'c'; choose from a, b"):
        bench_measure.chosen_parts("a,c", ["a", "b"])


def test_quantiles_and_words() -> None:
    assert [bench_measure.quantile([3, 1, 2, 4], q) for q in (0.0, 0.5, 0.99)] == [1, 3, 4]
    assert bench_measure.in_words({"ms": 1.23456, "n": 3, "work": "x"}, without=("work",)) == "ms 1.235  n 3"
