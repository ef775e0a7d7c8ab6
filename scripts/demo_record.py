"""What a demo has done so far, in one file of its folder: which stages are trained and scored, with
what result, in how many seconds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.train.describe import write_atomically

FILE_NAME = "demo.json"


@dataclass
class Record:
    """`settings`: what the numbers depend on; `seconds`: wall time of all sessions; `stages`: by
    name, {trained, scored, train_seconds, score_seconds, plans: {label: {scores, speed}}, drift}.
    Threads may replace values of an entry while another writes; `stage` alone adds keys.
    """

    folder: Path
    settings: Mapping[str, Any]
    seconds: float = 0.0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Record:
        """That of `folder` (made if needed), or a new one. `ConfigError` for one with other
        settings, or that cannot be read.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            record = cls(folder, settings)
            record.write()
            return record
        try:
            found = json.loads(path.read_text())
            stored, stages = dict(found["settings"]), dict(found["stages"])
            seconds = float(found["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not the record of a demo ({error}); begin anew with --fresh, or choose"
                " another --out"
            ) from error
        other = [key for key in settings if stored.get(key) != settings[key]]
        if other:
            told = ", ".join(
                f"{key} {stored.get(key)} there, {settings[key]} here" for key in other
            )
            raise ConfigError(
                f"{folder} holds a demo with other settings ({told}); begin anew with --fresh, or"
                " choose another --out"
            )
        return cls(folder, settings, seconds, stages)

    def stage(self, name: str) -> dict[str, Any]:
        """The entry of a stage, empty at first."""
        with self._lock:
            empty = {"trained": False, "scored": False, "plans": {}, "drift": {}}
            spent = {"train_seconds": 0.0, "score_seconds": 0.0}
            return self.stages.setdefault(name, empty | spent)

    def is_scored(self, name: str) -> bool:
        """Whether nothing is left to do for a stage."""
        return bool(self.stages.get(name, {}).get("scored"))

    def write(self) -> None:
        """Write the file, whole."""
        with self._lock:
            record = {
                "settings": dict(self.settings),
                "seconds": round(self.seconds, 1),
                "stages": self.stages,
            }
            write_atomically(self.folder / FILE_NAME, json.dumps(record, indent=1) + "\n")
