"""umT5's tokenizer from local files: `tokenizer.json`, else `spiece.model` by sentencepiece.

Files are used as they are; nothing is downloaded. transformers' tokenizer classes, from version 5
on, rebuild normalisation with settings of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcm.core.errors import ConfigError
from rcm.encoders.text_extra import text_extra

FAST_FILE, SLOW_FILE = "tokenizer.json", "spiece.model"
END_TOKEN = "</s>"
BESIDE_WEIGHTS = ("google/umt5-xxl", "umt5-xxl", "tokenizer")  # the last: a diffusers folder


@dataclass(frozen=True)
class Tokens:
    """Ids of a prompt with end-of-sentence, and the part of the prompt that did not fit."""

    ids: list[int]
    cut: str


@dataclass(frozen=True)
class UMT5Tokenizer:
    """Cleaned prompts to ids, made by `open_tokenizer`; `identity` changes with the file."""

    path: Path
    identity: str
    vocab: int
    end_id: int
    pieces: Callable[[str], tuple[list[int], list[int]]]

    def tokens(self, cleaned: str, *, text_len: int) -> Tokens:
        """At most `text_len` ids, the last of them end-of-sentence."""
        ids, starts = self.pieces(cleaned)
        if len(ids) < text_len:
            return Tokens([*ids, self.end_id], "")
        return Tokens([*ids[: text_len - 1], self.end_id], cleaned[starts[text_len - 1] :].lstrip())


def find_tokenizer(given: str | Path | None, *, weights: Path) -> Path:
    """The tokenizer file in the folder (or file) `given`, else in a usual folder beside `weights`.

    `ConfigError` lists the places and says where the files are published.
    """
    places = (
        [Path(given)] if given is not None else [weights.parent / name for name in BESIDE_WEIGHTS]
    )
    for place in places:
        if place.is_file() and place.name in (FAST_FILE, SLOW_FILE):
            return place
        for name in (FAST_FILE, SLOW_FILE):
            if (place / name).is_file():
                return place / name
    target = places[0]
    raise ConfigError(
        f"no umT5 tokenizer ({FAST_FILE} or {SLOW_FILE}) in {', '.join(map(str, places))}; get it"
        " once with: hf download "
        f'google/umt5-xxl --include "tokenizer*" "{SLOW_FILE}" "special_tokens_map.json"'
        f" --local-dir {target}; "
        "or name its folder (--tokenizer_path)"
    )


def open_tokenizer(path: Path) -> UMT5Tokenizer:
    """The tokenizer in a file of `find_tokenizer`; `ConfigError` for a damaged or foreign one."""
    identity = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    read = _from_json if path.name == FAST_FILE else _from_sentencepiece
    return read(path, identity)


def _from_json(path: Path, identity: str) -> UMT5Tokenizer:
    library = text_extra("tokenizers", purpose="umT5's tokenizer")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"{path} is no tokenizer file ({error}); damaged? download it again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end = tokenizer.token_to_id(END_TOKEN)
    if end is None:
        raise ConfigError(
            f"{path} has no end-of-sentence token {END_TOKEN!r}: not umT5's tokenizer"
        )

    def pieces(text: str) -> tuple[list[int], list[int]]:
        # without special tokens: the end-of-sentence id is added here, whatever the file's own
        # template says
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{path} cannot divide {text[:80]!r} ({error}); damaged? download it again"
            ) from error
        return list(encoding.ids), [start for start, _ in encoding.offsets]

    return UMT5Tokenizer(path, identity, tokenizer.get_vocab_size(), end, pieces)


def _from_sentencepiece(path: Path, identity: str) -> UMT5Tokenizer:
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reading {path} needs sentencepiece (pip install sentencepiece), or put {FAST_FILE}"
            " beside it"
        ) from error
    try:
        _require_whole(path.read_bytes())
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{path} is no sentencepiece model ({error}); damaged? download it again"
        ) from error
    if processor.eos_id() < 0:
        raise ConfigError(f"{path} has no end-of-sentence token: not umT5's tokenizer")

    def pieces(text: str) -> tuple[list[int], list[int]]:
        words = processor.encode(text, out_type=str)
        return processor.encode(text, out_type=int), _starts(text, words)

    return UMT5Tokenizer(path, identity, processor.get_piece_size(), processor.eos_id(), pieces)


def _require_whole(model: bytes) -> None:
    """ValueError or LookupError for a sentencepiece model (a protocol buffer) that was cut. The
    library takes one that ends between two pieces for a smaller vocabulary; what trained it, and
    how text is normalised, stand behind all pieces.
    """

    at = 0
    found: set[int] = set()

    def number() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte, at = model[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("it holds a number of more than 64 bits")

    while at < len(model):
        field, kind = divmod(number(), 8)
        found.add(field)
        length = number() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        at += length if kind else 0
    if at > len(model) or not {1, 2, 3} <= found:
        raise ValueError("it was cut: the model's settings, which stand last, are not there")


def _starts(text: str, pieces: Sequence[str]) -> list[int]:
    """Where each piece begins in `text`, up to normalisation: enough to quote what was cut."""
    starts, at = [], -1  # the first piece carries a space that the text does not have
    for piece in pieces:
        starts.append(min(max(at, 0), len(text)))
        at += len(piece)
    return starts
