"""Which weights these are, without reading them."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path

from rcm.core.errors import CheckpointError, first_line
from rcm.storage.pickle_file import is_archive


def content_identity(path: str | Path) -> str:
    """A short hash that changes when the weights at `path` do; reads no weights. `CheckpointError`
    for a damaged archive.

    Of a torch pickle: the names, sizes and checksums in its directory, so a copy or a renamed file
    keeps its identity. Of safetensors, which store no checksum: file names, sizes and modification
    times.
    """
    path = Path(path)
    digest = hashlib.blake2b(digest_size=16)
    if path.is_file() and is_archive(path):
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [
                    f"{e.filename.partition('/')[2]}:{e.file_size}:{e.CRC}"
                    for e in archive.infolist()
                ]
        # NotImplementedError: of a version that zip files do not have
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise CheckpointError(
                f"{path} cannot be read ({first_line(error)}); it is damaged or truncated"
            ) from error
    else:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        entries = [f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    for entry in entries:
        digest.update(f"{entry}\n".encode())
    return digest.hexdigest()
