"""Names that files state of neighbours: an index of shards, a newest checkpoint, DCP pieces."""

from __future__ import annotations

from pathlib import Path

from rcm.core.errors import CheckpointError

_MOST_BYTES = 4096


def is_plain_name(name: object) -> bool:
    """Whether `name` is a plain entry of a folder on any system: no path, drive, "." or ".."."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="surrogatepass")) <= 255
        and name not in (".", "..")
        and not any(c in '/\\:"\0' or c < " " for c in name)
    )


def pointed_at(pointer: Path) -> Path:
    """The neighbour named in the file `pointer`; `CheckpointError` if that is no plain name."""
    with open(pointer, "rb") as file:
        name = file.read(_MOST_BYTES).decode("utf-8", errors="replace").strip()
    if not is_plain_name(name):
        told = "which is no name in its folder; write the name of an iter_* directory into it"
        raise CheckpointError(f"{pointer} holds {name[:80]!r}, {told}")
    return pointer.with_name(name)
