"""What is known of a folder of videos: settings, runs, a record each, in `<folder>_run`.

Beside and not inside: VBench takes the suffix of whatever entry it lists first, and finds no video
if that is a JSON file. Runs of other settings are refused, as videos would mix.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.pipelines.video_io import VideoError
from rcm.storage.identity import content_identity
from rcm.storage.pickle_file import is_archive
from rcm.storage.state_dicts import flatten
from rcm.train.describe import installed_versions, write_atomically
from rcm.train.export import find_model_directory

MANIFEST, EVAL_INFO = "manifest.json", "vbench_eval_info.json"
FORMAT = 1
_ENDS = 1 << 20


@dataclass(frozen=True)
class VideoRecord:
    """How one file was made: number of the sample, seed of its generator, text given to the model,
    bytes and SHA-256 of the file, frames and seconds of sampling (None for a file whose run was
    killed before it could say).
    """

    file: str
    sample: int
    seed: int
    text: str
    bytes: int
    sha256: str
    frames: int | None = None
    seconds: float | None = None


class RunFolder:
    """A folder of videos and its records. `rank` names the record file this process appends to."""

    def __init__(self, videos: str | Path, *, rank: int = 0) -> None:
        self.videos = Path(videos)
        self.records = self.videos.with_name(f"{self.videos.name}_run")
        self._rank = rank
        self._known: dict[str, VideoRecord] = {}

    def begin(self, settings: Mapping[str, Any], *, run: Mapping[str, Any]) -> None:
        """Settle that this run belongs here; the leading rank writes settings and appends `run`.

        `ConfigError` names the first setting that differs from that of the videos which are there.
        """
        plain = json.loads(json.dumps(settings))
        before = read_manifest(self.records) if (self.records / MANIFEST).is_file() else None
        if before is None and any(self.videos.glob("*.mp4")):
            raise ConfigError(
                f"{self.videos} holds videos but no record of their settings ({self.records});"
                " choose another --output_dir"
            )
        if before is not None:
            _require_same(before["settings"], plain, self.videos)
        if self._rank == 0:
            old = before or {}
            entry = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": code_commit()}
            runs = [*old.get("runs", []), {**entry, "versions": installed_versions(), **run}]
            about = {"format": FORMAT, "settings": plain, "runs": runs}
            self._write({**about, "videos": old.get("videos", {})})
        self.videos.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.staging, ignore_errors=True)  # what a kill has left there is no video
        self._known = self._recorded()

    @property
    def staging(self) -> Path:
        """Where a video is written until it is whole: beside the videos, on their disk."""
        return self.records / f"writing_rank{self._rank}"

    def place(self, staged: Path) -> Path:
        """Move a whole file from `staging` to its place among the videos, at once."""
        target = self.videos / staged.name
        os.replace(staged, target)
        return target

    def has(self, file: str, *, text: str, seed: int, sample: int) -> bool:
        """Whether `file` is there, whole; a file whose run died gets a record.

        `ConfigError` for one of another text or seed, `VideoError` for another size than recorded.
        """
        path = self.videos / file
        if not path.is_file():
            return False
        record = self._known.get(file)
        if record is None:
            self.add(VideoRecord(file, sample, seed, text, path.stat().st_size, file_sha256(path)))
            return True
        if (record.text, record.seed) != (text, seed):
            what, mine, theirs = "prompt text", repr(text[:60]), repr(record.text[:60])
            if record.seed != seed:
                what, mine, theirs = "seed", str(seed), str(record.seed)
            raise ConfigError(
                f"{path} was made from another {what} ({theirs}, now {mine}); choose another"
                " --output_dir"
            )
        if path.stat().st_size != record.bytes:
            raise VideoError(
                f"{path} has {path.stat().st_size} bytes, {record.bytes} were written; delete it to"
                " have it made again"
            )
        return True

    def add(self, record: VideoRecord) -> None:
        """Append a record, on a new line: one that a kill has cut spoils no other."""
        self.records.mkdir(parents=True, exist_ok=True)
        with (self.records / f"videos_rank{self._rank}.jsonl").open("a", encoding="utf-8") as out:
            out.write("\n" + json.dumps(asdict(record), ensure_ascii=False))
        self._known[record.file] = record

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """If every video of `rows` is there, write vbench_eval_info.json and the list of videos.

        Any rank may call it; the last one to end finds all. Returns whether the suite is complete.
        """
        shutil.rmtree(self.staging, ignore_errors=True)  # empty by now; it does no harm
        names = [name for row in rows for name in row["video_list"]]
        if not all((self.videos / name).is_file() for name in names):
            return False
        located = [
            {**row, "video_list": [str(self.videos / name) for name in row["video_list"]]}
            for row in rows
        ]
        self._write(located, EVAL_INFO)
        manifest, records = read_manifest(self.records), self._recorded()
        manifest["videos"] = {name: asdict(records[name]) for name in sorted(records)}
        self._write(manifest)
        return True

    def _recorded(self) -> dict[str, VideoRecord]:
        found: dict[str, VideoRecord] = {}
        for path in sorted(self.records.glob("videos_rank*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                # else cut by a kill: no record, and its video is hashed again
                if line.endswith("}"):
                    record = VideoRecord(**json.loads(line))
                    found[record.file] = record
        return found

    def _write(self, content: object, name: str = MANIFEST) -> None:
        self.records.mkdir(parents=True, exist_ok=True)
        write_atomically(self.records / name, json.dumps(content, ensure_ascii=False, indent=1))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run, whose folder of videos or of records is given."""
    folder = Path(folder)
    candidates = (folder / MANIFEST, folder.with_name(f"{folder.name}_run") / MANIFEST)
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"no {MANIFEST} in {folder} or {folder.name}_run beside it: not a folder of"
            " scripts.vbench_sample"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ConfigError(f"{path} has format {found}, this version reads {FORMAT}")
    return manifest


def checkpoint_digest(path: str | Path) -> str:
    """A hash of the weights at `path`, the same for a copy of them. A torch pickle is told by the
    checksums inside it; of other files and folders (DCP, safetensors) names, sizes and the first
    and last MiB of each file are read.
    """
    path = Path(path)
    if path.is_file() and is_archive(path):
        return content_identity(path)
    root = (find_model_directory(path) or path) if path.is_dir() else path
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(_ENDS))
            if size > _ENDS:
                data.seek(max(_ENDS, size - _ENDS))
                digest.update(data.read(_ENDS))
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """In hex."""
    with Path(path).open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def code_commit() -> str | None:
    """The commit of this code, "+changes" if files differ; None outside a repository."""
    words = ["git", "-C", str(Path(__file__).resolve().parents[2]), "describe", "--always"]
    words += ["--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if told.returncode else told.stdout.strip()


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    old, new = flatten(before), flatten(now)
    differing = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    if differing:
        key = differing[0]
        more = "" if len(differing) == 1 else f" (also different: {', '.join(differing[1:6])})"
        raise ConfigError(
            f"{folder} was sampled with {key}={old.get(key)!r}, now it is {new.get(key)!r}{more};"
            " repeat that run's settings, or choose another --output_dir"
        )
