"""Where the tokenizer is looked for, and what it does with ends and lengths."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rcm.core.errors import ConfigError
from rcm.encoders.umt5_tokenizer import UMT5Tokenizer, find_tokenizer, open_tokenizer
from tests.support.tiny_umt5 import save_tokenizer


class Processor:
    """What the library makes of a model."""

    def eos_id(self) -> int:
        return 1

    def get_piece_size(self) -> int:
        return 40


@pytest.fixture
def tokenizer(tmp_path: Path) -> UMT5Tokenizer:
    return open_tokenizer(save_tokenizer(tmp_path) / "tokenizer.json")


def test_ids_end_with_the_end_of_sentence(tokenizer: UMT5Tokenizer) -> None:
    assert tokenizer.tokens("red square", text_len=9).ids == [4, 5, 1]
    assert tokenizer.tokens("", text_len=9).ids == [1]
    assert tokenizer.tokens("", text_len=1).ids == [1]
    assert (tokenizer.vocab, tokenizer.end_id) == (40, 1)


@pytest.mark.parametrize("room", [3, 4, 5, 6])
def test_a_cut_leaves_room_for_the_end(tokenizer: UMT5Tokenizer, room: int) -> None:
    """Padding and truncation stored in the file do not leak; kept text and cut text make up the
    prompt.
    """
    text = "a red cat moves left"
    tokens = tokenizer.tokens(text, text_len=room)
    assert tokens.ids == [*[8, 4, 9, 6, 7][: room - 1], 1]
    kept = " ".join(text.split()[: room - 1])
    assert text.removeprefix(kept).lstrip() == tokens.cut
    assert bool(tokens.cut) == (room < 6)


def test_places_searched(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    for place in ("tokenizer", "umt5-xxl", "google/umt5-xxl"):  # a later one is preferred
        folder = save_tokenizer(tmp_path / place)
        assert find_tokenizer(None, weights=weights) == folder / "tokenizer.json"
    given = save_tokenizer(tmp_path / "elsewhere")
    assert find_tokenizer(given, weights=weights) == given / "tokenizer.json"
    assert find_tokenizer(given / "tokenizer.json", weights=weights) == given / "tokenizer.json"
    (given / "tokenizer.json").rename(given / "spiece.model")
    assert find_tokenizer(given, weights=weights) == given / "spiece.model"


def test_a_missing_tokenizer_lists_the_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_tokenizer(None, weights=tmp_path / "weights.pth")
    command = "hf download google/umt5-xxl --include"
    for part in ("google/umt5-xxl", "umt5-xxl,", command, f"--local-dir {tmp_path}/google/umt5-xxl"):
        assert part in str(error.value)
    save_tokenizer(tmp_path / "google" / "umt5-xxl")
    # a place that was named is not replaced by another
    with pytest.raises(ConfigError, match="typo"):
        find_tokenizer(tmp_path / "typo", weights=tmp_path / "weights.pth")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path) / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace("</s>", "<eos>"))
    with pytest.raises(ConfigError, match="no end-of-sentence token '</s>'"):
        open_tokenizer(path)
    path.write_text(text[:200])
    with pytest.raises(ConfigError, match="download it again"):
        open_tokenizer(path)


def test_identity_follows_the_file(tmp_path: Path) -> None:
    one = open_tokenizer(save_tokenizer(tmp_path / "one") / "tokenizer.json").identity
    assert one == open_tokenizer(save_tokenizer(tmp_path / "same") / "tokenizer.json").identity
    assert one != open_tokenizer(save_tokenizer(tmp_path / "other", vocab=30) / "tokenizer.json").identity


def test_sentencepiece_models_work_where_it_is_installed(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is optional: tokenizer.json does not need it")
    model = io.BytesIO()
    sentences = ["a red cat moves left", "a square moves", "the cat is red and left", "moves left again"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=34,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = open_tokenizer(tmp_path / "spiece.model")
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("a red cat moves", add_eos=True)
    assert tokenizer.tokens("a red cat moves", text_len=50).ids == expected
    assert tokenizer.tokens("", text_len=5).ids == [1]
    cut = tokenizer.tokens("a red cat moves", text_len=6)
    assert cut.ids == [*expected[:5], 1]
    assert cut.cut and "a red cat moves".endswith(cut.cut)


def test_a_cut_sentencepiece_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces, too, where what is left is a whole model of fewer pieces to the library:
    the settings behind them are missing.
    """
    monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=lambda model_file: Processor()))
    piece = b"\x0a\x07\x0a\x05piece"
    whole = 40 * piece + b"\x12\x02\x20\x28" + b"\x1a\x85\x02" + bytes(261)
    (tmp_path / "spiece.model").write_bytes(whole)
    assert open_tokenizer(tmp_path / "spiece.model").vocab == 40
    for cut in (*range(1, 3 * len(piece)), *range(20 * len(piece), len(whole))):
        (tmp_path / "spiece.model").write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"spiece\.model is no sentencepiece model .*download it again"):
            open_tokenizer(tmp_path / "spiece.model")


def test_a_file_that_knows_no_unknown_letters_is_named(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace('"unk_id"', '"unkid"'))
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot divide '\u017e' \(.*unk_id.*download it again"):
        open_tokenizer(path).tokens("\u017e", text_len=4)


def test_without_sentencepiece_the_other_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"pip install sentencepiece\), or put tokenizer\.json beside it"):
        open_tokenizer(tmp_path / "spiece.model")
