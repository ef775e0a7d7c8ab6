"""The one reader of text that a user wrote: prompts, captions, lists. What an editor leaves in a
file does not change what it says.
"""

from __future__ import annotations

import codecs
import io
import shlex
from pathlib import Path

from rcm.core.errors import ConfigError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAX_BYTES = 1 << 30
"""Larger files are no text that somebody wrote."""


def read_text(path: str | Path, *, what: str = "text file", knob: str = "") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with their byte order mark; the mark is
    no part of it.

    `ConfigError`, naming `what`, the file and (for bytes that are no text) the line, for a file
    that is missing, no regular file, cannot be read, or is in another encoding, which is not
    guessed; `knob` is the flag or key to change.
    """
    path, advice = Path(path), f"; change {knob}" if knob else ""
    try:
        if not path.is_file():
            raise ConfigError(
                f"{path} is a folder or a device, not a {what}{advice}"
                if path.exists()
                else f"no {what} at {path}{advice}"
            )
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{what} {path} is larger than 1 GiB, which is no text{advice}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}{advice}"
        ) from error
    return _decoded(data, path, what)


def read_lines(path: str | Path, *, what: str = "text file", knob: str = "") -> list[str]:
    """Lines of `read_text`, ended by LF, CR LF or CR and by nothing else; blank lines at the end
    are dropped. Errors of `read_text`.
    """
    return lines_of(read_text(path, what=what, knob=knob))


def lines_of(text: str) -> list[str]:
    """Lines of a text, as `read_lines`: not `splitlines()`, which also cuts at characters that a
    line may contain, such as U+2028.
    """
    lines = [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _decoded(data: bytes, path: Path, what: str) -> str:
    mark, encoding = next(
        ((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8")
    )
    body = data[len(mark) :]
    if encoding == "utf-8" and len(body) >= 8 and body.count(0) * 3 > len(body):
        raise ConfigError(
            f"{what} {path} looks like UTF-16 without a byte order mark; save it as UTF-8"
        )
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ConfigError(
                f"{what} {path} begins as {encoding.upper()} and is not ({error.reason} at byte"
                f" {error.start})"
            ) from error
        line = body.count(b"\n", 0, error.start) + 1
        converted = path.with_name(f"{path.stem}.utf8{path.suffix}")
        raise ConfigError(
            f"{what} {path}:{line} is not UTF-8 ({error.reason}, 0x{body[error.start]:02x}); if it"
            f" is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} >"
            f" {shlex.quote(str(converted))}"
        ) from error
