"""Pickles read without executing anything: what a pickle names is noted, never imported and never
called.

A pickle is a program for a stack machine whose instructions may import any object and call it. This
reader knows the instructions that build plain values; where a file names a class or a function, it
is compared with a list of exact names and becomes a `Named`, and where it would be called, the call
is noted as a `Made`. What these stand for is for the caller to say, who builds its own objects from
them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from rcm.core.errors import CheckpointError

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET"
    " NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT"
    " SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE"
    " EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT"
    " GLOBAL STACK_GLOBAL BINPERSID"
)
"""Those of plain values."""
_DICTS = ("collections.OrderedDict",)
MOST_BYTES = 1 << 28
"""Of a pickle: names and shapes; 256 MiB is a million tensors."""


class Stranger(CheckpointError):
    """The pickle names something that is not on the list; `name` is what."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"it needs Python objects other than tensors ({name}), which are not executed"
        )
        self.name = name


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A class, function or constant that the file names; not imported."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What calling `kind` with `arguments`, then giving it `state`, would make; not made."""

    kind: str
    arguments: tuple[Any, ...]
    state: Any = field(default=None)


def read_inert(
    stream: BinaryIO, *, names: Collection[str], storages: Callable[[Any], Any] | None = None
) -> Any:
    """The next pickle of `stream` as dicts, lists, tuples, strings, numbers, None, `Named` and
    `Made`; ordered dicts as dicts.

    `names`: the "module.name" that it may name. `storages` is given each persistent id (plain
    values too) and returns what stands for it. Raises `Stranger` for another name,
    `pickle.UnpicklingError` or any other exception for what is no pickle of plain values.
    """
    reader = _Reader(_Bounded(stream))
    reader.names, reader.storages = names, storages
    return reader.load()


class _Bounded:
    """A stream's next pickle. A length that it states is compared with what is left before any
    memory is taken for it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        at = stream.tell()
        self.stream, self.left = stream, min(stream.seek(0, io.SEEK_END) - at, MOST_BYTES)
        stream.seek(at)

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise pickle.UnpicklingError(f"it ends inside a value of {count} bytes")
        self.left -= count
        return self.stream.read(count)

    def readline(self) -> bytes:
        line = self.stream.readline(self.left)
        self.left -= len(line)
        return line


class _Instructions(dict):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(
            f"it has the instruction {bytes([code])!r}, which plain values do not need"
        )


def _require_key(key: Any) -> None:
    """Tuples in tuples, each twice, have hashes and texts that take forever."""
    if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
        raise pickle.UnpicklingError("it has a key of nested tuples")


# the one in Python: its memo is a dict, so a forged index takes no memory
class _Reader(pickle._Unpickler):
    names: Collection[str]
    storages: Callable[[Any], Any] | None
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Named:
        full = f"{module}.{name}"
        if full not in self.names:
            raise Stranger(full)
        return Named(full)

    def persistent_load(self, pid: Any) -> Any:
        if self.storages is None:
            raise pickle.UnpicklingError("it refers to objects outside itself")
        return self.storages(pid)

    def make(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Named) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that it does not name")
        if kind.name in _DICTS:
            pairs: list[Any] = list(*arguments[:1])
            for key, _ in pairs:
                _require_key(key)
            self.append(dict(pairs))
        else:
            self.append(Made(kind.name, arguments))

    def set_items(self) -> None:
        entries = self.pop_mark()
        for key in entries[::2]:
            _require_key(key)
        self.stack[-1].update(zip(entries[::2], entries[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _require_key(key)
        self.stack[-1].update({key: value})

    def give_state(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Made):
            made.state = state
        # an ordered dict's attributes (versions of modules) are left out
        elif not isinstance(made, dict):
            raise pickle.UnpicklingError(f"it gives a {type(made).__name__} a state")

    dispatch = _Instructions(
        {
            **{
                code: pickle._Unpickler.dispatch[code]
                for name in _INSTRUCTIONS.split()
                for code in getattr(pickle, name)
            },
            pickle.REDUCE[0]: make,
            pickle.NEWOBJ[0]: make,
            pickle.BUILD[0]: give_state,
            pickle.SETITEM[0]: set_item,
            pickle.SETITEMS[0]: set_items,
        }
    )
