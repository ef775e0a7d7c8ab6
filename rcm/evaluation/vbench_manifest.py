"""What is known of a folder of videos: settings, runs, a record each, in `<folder>_run`.

Beside and not inside: VBench takes the suffix of whatever entry it lists first, and finds no video
if that is a JSON file. Runs of other settings are refused, as videos would mix.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rcm.core.errors import ConfigError
from rcm.core.records import Record
from rcm.evaluation.vbench_results import read_json
from rcm.pipelines.video_io import VideoError, probe
from rcm.storage.identity import content_identity
from rcm.storage.pickle_file import is_archive
from rcm.storage.state_dicts import flatten
from rcm.train.describe import installed_versions, write_atomically
from rcm.train.export import find_model_directory

MANIFEST, EVAL_INFO = "manifest.json", "vbench_eval_info.json"
FORMAT = 1
_ENDS = 1 << 20


@dataclass(frozen=True)
class VideoRecord(Record):
    """How one file was made: number of the sample, seed of its generator, text given to the model,
    bytes and SHA-256 of the file, frames and seconds of sampling (None for a file whose run was
    killed before it could say), SHA-256 of its first frame's file, time (Unix) of the record.
    """

    file: str
    sample: int
    seed: int
    text: str
    bytes: int
    sha256: str
    frames: int | None = None
    seconds: float | None = None
    image: str | None = None
    recorded: float = field(default_factory=time.time)


class RunFolder:
    """A folder of videos and its records. `rank` names the record file this process appends to."""

    def __init__(self, videos: str | Path, *, rank: int = 0) -> None:
        self.videos = Path(videos)
        self.records = beside(self.videos)
        self._rank = rank
        self._known: dict[str, VideoRecord] = {}
        self._log: IO[str] | None = None

    def begin(self, settings: Mapping[str, Any], *, run: Mapping[str, Any]) -> None:
        """Settle that this run belongs here, and hold its part of the folder until `close`; the
        first rank to come writes settings, the leading one appends `run`.

        `ConfigError` names the first setting that differs from that of the videos which are there,
        or says that another process holds this part.
        """
        plain = json.loads(json.dumps(settings))
        # looked for before the manifest, which whoever comes first writes before any video
        foreign = any(self.videos.glob("*.mp4"))
        if foreign and not (self.records / MANIFEST).is_file():
            raise ConfigError(
                f"{self.videos} holds videos but no record of their settings ({self.records});"
                " choose another --output_dir"
            )
        self._hold()
        with self._alone():
            before = read_manifest(self.records) if (self.records / MANIFEST).is_file() else None
            if before is not None:
                _require_same(before["settings"], plain, self.videos)
            about = before or {"format": FORMAT, "settings": plain, "runs": [], "videos": {}}
            if self._rank == 0:
                started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                entry = {"started": started, "commit": code_commit()}
                about["runs"].append({**entry, "versions": installed_versions(), **run})
            if self._rank == 0 or before is None:
                self._write(about)
        self.videos.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.staging, ignore_errors=True)  # what a kill has left there is no video
        self._known = _recorded(self.records)

    def close(self) -> None:
        """Let other processes have this part of the folder."""
        if self._log is not None:
            self._log.close()

    @property
    def staging(self) -> Path:
        """Where a video is written until it is whole: beside the videos, on their disk."""
        return self.records / f"writing_rank{self._rank}"

    def place(self, staged: Path) -> Path:
        """Move a whole file from `staging` to its place among the videos, at once."""
        target = self.videos / staged.name
        os.replace(staged, target)
        return target

    def has(
        self, file: str, *, text: str, seed: int, sample: int, image: str | None = None
    ) -> bool:
        """Whether `file` is there, whole; one that plays and whose run died gets a record.

        `ConfigError` for one of another text, seed or first frame (`image`, its SHA-256),
        `VideoError` for another size than recorded.
        """
        path = self.videos / file
        if not path.is_file():
            return False
        record = self._known.get(file)
        if record is None:
            try:
                probe(path)
            except VideoError:
                return False
            size, digest = path.stat().st_size, file_sha256(path)
            self.add(VideoRecord(file, sample, seed, text, size, digest, image=image))
            return True
        for what, theirs, mine in (
            ("seed", record.seed, seed),
            ("prompt text", record.text, text),
            ("first frame", record.image or image, image),
        ):
            if theirs != mine:
                told = f"{str(theirs)[:60]!r}, now {str(mine)[:60]!r}"
                raise ConfigError(
                    f"{path} was made from another {what} ({told}); choose another --output_dir"
                )
        require_unaltered(self.videos, {file: asdict(record)})
        return True

    def add(self, record: VideoRecord) -> None:
        """Append a record, on a new line: one that a kill has cut spoils no other."""
        assert self._log is not None  # begun
        self._log.write("\n" + json.dumps(asdict(record), ensure_ascii=False))
        self._log.flush()
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
        with self._alone():
            self._write(located, EVAL_INFO)
            self._write(read_manifest(self.records))
        return True

    def _hold(self) -> None:
        """Lock the record file of this rank; the system forgets it with the process."""
        self.records.mkdir(parents=True, exist_ok=True)
        path = self.records / f"videos_rank{self._rank}.jsonl"
        log = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            raise ConfigError(
                f"{self.videos} is being sampled by another process at this moment (it holds"
                f" {path}); wait for it, or choose another --output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks: nothing can be said
        self._log = log

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No two ranks write what they share at once, where the file system has locks."""
        with (self.records / ".lock").open("a") as file:  # NFS locks only what may be written
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, content: object, name: str = MANIFEST) -> None:
        write_atomically(self.records / name, json.dumps(content, ensure_ascii=False, indent=1))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run, whose folder of videos or of records is given, with the videos that
    were recorded up to now.
    """
    folder = Path(folder)
    path = next((f / MANIFEST for f in (folder, beside(folder)) if (f / MANIFEST).is_file()), None)
    if path is None:
        raise ConfigError(
            f"no {MANIFEST} in {folder} or {folder.name}_run beside it: not a folder of"
            " scripts.vbench_sample"
        )
    manifest = read_json(path, what="manifest")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path} has format {found}, this version reads {FORMAT}")
    kinds = {"settings": dict, "runs": list, "videos": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if wrong:
        raise ConfigError(f"{path} is damaged: it has no {' and no '.join(wrong)}")
    try:
        listed = {name: _record(told) for name, told in manifest["videos"].items()}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: it has a video that is none ({error})") from error
    videos = listed | _recorded(path.parent)
    return {**manifest, "videos": {name: asdict(videos[name]) for name in sorted(videos)}}


def require_unaltered(videos: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """`VideoError` for a file of another size than recorded; `records` of `read_manifest`."""
    for name, record in records.items():
        path = videos / name
        if path.is_file() and path.stat().st_size != record["bytes"]:
            raise VideoError(
                f"{path} has {path.stat().st_size} bytes, {record['bytes']} were written; delete it"
                " to have it made again"
            )


def beside(videos: Path, suffix: str = "_run") -> Path:
    """What lies beside a folder of videos, `suffix` behind its name: its records."""
    folder = Path(os.path.abspath(videos)) if videos.name in ("", "..") else videos
    if not folder.name:
        raise ConfigError(f"nothing can lie beside {videos}; choose a folder of videos in it")
    return folder.with_name(folder.name + suffix)


def _recorded(records: Path) -> dict[str, VideoRecord]:
    """By file, the last record of each: a video that was deleted may be made again by another rank.
    A line cut by a kill is no record, and its video is looked at again.
    """
    found: list[VideoRecord] = []
    for path in sorted(records.glob("videos_rank*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, TypeError):
                found.append(_record(json.loads(line)))
    return {record.file: record for record in sorted(found, key=lambda record: record.recorded)}


def _record(told: Any) -> VideoRecord:
    """ValueError or TypeError for what is none."""
    return VideoRecord(**{"recorded": 0.0, **told})  # older ones have no time, and come first


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
    """The commit of this code, "+changes" if files differ; None outside its own repository, such as
    for a package that is installed inside another project's.
    """
    root = Path(__file__).resolve().parents[2]
    words = ["git", "-C", str(root), f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    words += ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if told.returncode else told.stdout.strip()


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    old, new = flatten(before), flatten(now)
    # what only the new ones tell was not noted by the version that wrote the old ones
    differing = [key for key in old if old[key] != new.get(key)]
    if differing:
        key = differing[0]
        more = "" if len(differing) == 1 else f" (also different: {', '.join(differing[1:6])})"
        raise ConfigError(
            f"{folder} was sampled with {key}={old.get(key)!r}, now it is {new.get(key)!r}{more};"
            " repeat that run's settings, or choose another --output_dir"
        )
