"""Names that files state of their neighbours: an index of its shards, a pointer of the newest
checkpoint, a DCP folder of its pieces.
"""

from __future__ import annotations

from pathlib import Path

from rcm.core.errors import CheckpointError

_MOST_BYTES = 4096


def is_plain_name(name: object) -> bool:
    """Whether `name` is that of an entry of a folder, on any system: no path, no drive, not the
    folder itself or its parent.
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not any(c in '/\\:"\0' or c < " " for c in name)
    )


def pointed_at(pointer: Path) -> Path:
    """The neighbour of `pointer` whose name that file holds. `CheckpointError` unless the content
    is one plain name.
    """
    with open(pointer, "rb") as file:
        name = file.read(_MOST_BYTES).decode("utf-8", errors="replace").strip()
    if not is_plain_name(name):
        told = "which is no name in its folder; write the name of an iter_* directory into it"
        raise CheckpointError(f"{pointer} holds {name[:80]!r}, {told}")
    return pointer.with_name(name)
