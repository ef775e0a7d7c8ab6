"""A file or folder that a command will write: looked at once, before the work, and what was looked
at is what is written after it. A look leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcm.core.errors import ConfigError
from rcm.core.files import discard, writing

_PROBE = bytes(4096)


def is_file_of(target: Path, given: object) -> bool:
    """Whether `target` is the file or folder that `given` names, by any of its names, or the
    description beside it, which files with a suffix have (`cpu` is no file, and has no cpu.json).
    """
    given = str(given)
    for name in (given, *([f"{given}.json"] if os.path.splitext(given)[1] else [])):
        with contextlib.suppress(OSError, ValueError):  # one of them is not there, or no name
            if os.path.realpath(target) == os.path.realpath(name) or os.path.samefile(target, name):
                return True
    return False


def require_expanded(path: str | Path, named: str) -> None:
    """`ConfigError` for a name that begins with ~, which no shell expands behind a '=' or in
    quotes; `named` is what the sentence calls it.
    """
    if str(path) == "~" or str(path).startswith("~/"):
        home = os.path.expanduser(str(path))
        raise ConfigError(f"{named} would be in a folder called ~; write {home}")


def require_folder(path: Path, named: str) -> None:
    """`ConfigError` unless files can be written to the folder `path`, which need not be there;
    `named` is what the sentence calls it.
    """
    require_expanded(path, named)
    try:
        place_for(path)
    except OSError as error:
        raise ConfigError(f"{named}: {error.strerror}; choose another folder") from error


def place_for(folder: Path) -> Path:
    """`folder`, or what is there above it; `OSError` where no files can be written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if there.is_symlink() and not there.exists():
        raise OSError(errno.ELOOP, f"{there} is a link that leads nowhere, or in a circle")
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{there} is write-protected")
    return there


@dataclass(frozen=True)
class OutputFile:
    """`path` is absolute, links followed; `given` as the user wrote it, for messages. Made by
    `claim`.
    """

    path: Path
    given: str

    def __str__(self) -> str:
        return self.given

    @classmethod
    def claim(
        cls, given: str | Path | OutputFile, *, suffix: str | Sequence[str] = (), knob: str = ""
    ) -> OutputFile:
        """The target, once it is clear that a file can be made there; folders above it are made
        when it is written.

        `ConfigError` for a name that no file can have, or of a suffix other than `suffix` (or one
        of them); `OSError` with the path for a folder, a device, a place without permission or
        without room. A file that is there stays as it is.
        """
        if isinstance(given, OutputFile):
            return given
        text, named = str(given), f"{knob} {str(given)!r}" if knob else f"{str(given)!r}"
        if not text.strip() or "\0" in text:
            raise ConfigError(f"{named} is no name of a file")
        require_expanded(text, named)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{named} is not UTF-8; choose another name") from error
        suffixes = (suffix,) if isinstance(suffix, str) else tuple(suffix)
        if suffixes and Path(text).suffix.lower() not in suffixes:
            raise ConfigError(
                f"{knob + ' ' if knob else ''}{text} must end in {' or '.join(suffixes)}"
            )
        with writing(text, f"{f'{knob}: ' if knob else ''}cannot write there"):
            target = cls(Path(os.path.realpath(text)), text)
            target._probe()
        return target

    def _probe(self) -> None:
        if os.path.lexists(self.path):
            mode = self.path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "is a device or a pipe, no file")
            if not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, "the file is write-protected")
        there, most = place_for(self.path.parent), os.pathconf("/", "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > most for part in self.path.relative_to(there).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        probe = there / f".{secrets.token_hex(6)}.partial"
        try:
            with open(probe, "wb") as file:
                file.write(_PROBE)
                file.flush()
                os.fsync(file.fileno())
        finally:
            # the reason that it cannot be removed is the one already being raised
            with contextlib.suppress(OSError):
                discard(probe)

    def temporary(self) -> Path:
        """A new name beside the target, of the same suffix, short enough for any file system; the
        folder for it is made.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        suffix = self.path.suffix if len(self.path.suffix) < 16 else ""
        return self.path.parent / f".{secrets.token_hex(6)}.partial{suffix}"

    @contextlib.contextmanager
    def replacing(self) -> Iterator[Path]:
        """A new path beside the target, for any program to write to; renamed onto the target when
        the block ends well, else removed. An older file stays until then.
        """
        temporary = self.temporary()
        try:
            yield temporary
            os.replace(temporary, self.path)
        finally:
            # the reason that it cannot be removed is the one already being raised
            with contextlib.suppress(OSError):
                discard(temporary)

    def write(self, data: bytes | str) -> None:
        """All of `data` (text as UTF-8), flushed to disk, under its name at once; an `OSError`
        carries the path.
        """
        content = data.encode() if isinstance(data, str) else data
        with (
            writing(self.given, "cannot write"),
            self.replacing() as temporary,
            open(temporary, "wb") as file,
        ):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
