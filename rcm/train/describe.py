"""What a checkpoint says about itself, in a small JSON file beside the weights: enough to sample
from the path alone, and to notice a contradiction.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rcm.core.errors import CheckpointError
from rcm.core.files import discard, flush, replacing, write_atomically
from rcm.storage.json_file import parse_json
from rcm.train.description_rules import check_description

FILE_NAME = "rcm.json"
FORMAT = 1
MOST_BYTES = 1 << 22


def installed_versions() -> dict[str, str]:
    """Versions of what computed the weights: rcm, torch, Python."""
    try:
        own = version("rcm")
    except PackageNotFoundError:
        own = "uninstalled"
    return {"rcm": own, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True)
class Description:
    """Self-description of a checkpoint; every value is JSON (numbers, strings, lists, mappings,
    None).

    `stage`: method name (tf, tf_scm, sf_dmd, ...). `network`: fields of the network's
    configuration. `network_name`: its preset or config name. `pattern`: chunk pattern such as
    "c3-3", None for bidirectional. `schedule`: step schedule the student was trained for.
    `noisy_context`: settings of the noisy context, None where unused. `sigma_max`: the sampler's.
    `parent`: checkpoint this run started from. `data_hash`: of the training data. `iteration`:
    finished iterations. `experiment`: configuration name. `extra`: anything else worth keeping.
    """

    stage: str
    network: Mapping[str, Any]
    network_name: str = ""
    pattern: str | None = None
    schedule: Any = None
    noisy_context: Any = None
    sigma_max: float | None = None
    parent: str | None = None
    data_hash: str | None = None
    experiment: str | None = None
    iteration: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def at(self, iteration: int) -> Description:
        """The same description after `iteration` iterations."""
        return replace(self, iteration=iteration)

    def holding(self, weights: str) -> Description:
        """The same description beside one set of weights only: "ema", "reg" (or "live") or
        "fake_score".
        """
        return replace(
            self, extra={**self.extra, "weights": "live" if weights == "reg" else weights}
        )

    def to_json(self) -> str:
        """Indented JSON with a format number. Raises TypeError for a value that is not JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> Description:
        """Parse `to_json`'s output; CheckpointError naming `source` when it is none, of a newer
        format, or breaks the rules of `rcm/train/description_rules.py`.
        """
        values = parse_json(text, source=source)
        if not isinstance(values, dict) or "format" not in values:
            raise CheckpointError(
                f"{source} is not a checkpoint description: it is no object with a format number"
            )
        if (number := values.pop("format")) != FORMAT or isinstance(number, bool):
            raise CheckpointError(
                f"{source} has description format {str(number)[:40]}, this version of rcm reads"
                f" {FORMAT}; use the version that wrote it"
            )
        check_description(values, source=source)
        return cls(**values)

    def write(self, path: Path) -> None:
        """Write atomically: either the old file or the complete new one exists."""
        write_atomically(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read one file; CheckpointError when it does not exist or does not parse."""
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: the checkpoint does not describe itself")
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; a checkpoint's description has at most"
                f" {MOST_BYTES}"
            )
        return cls.from_json(path.read_bytes(), source=str(path))

    def require_same_network(self, other: Description, *, source: str) -> None:
        """Raise CheckpointError naming both networks and every differing field, unless `other`
        (found at `source`) has this network. A field that an older version did not write counts as
        its zero.
        """
        mine, found = _plain(self.network), _plain(other.network)
        different = sorted(
            k for k in set(mine) | set(found) if (mine.get(k) or None) != (found.get(k) or None)
        )
        if different:
            zero = {k: type(found.get(k) or mine[k])() for k in different}
            details = ", ".join(
                f"{k}: {found.get(k) or zero[k]} there, {mine.get(k) or zero[k]} here"
                for k in different
            )
            advice = "choose the matching net or another checkpoint"
            if "two_times" in different:
                advice = "only training_type=tf_meanflow has two times; choose another job.name"
            raise CheckpointError(
                f"{source} holds network {other.network_name or 'of unknown name'!r}, this run has"
                f" {self.network_name or 'of unknown name'!r} ({details}); {advice}"
            )

    def require_same_adapters(self, other: Description, *, source: str) -> None:
        """Raise CheckpointError unless `other` (found at `source`) has the adapters of this run on
        the same weights, or neither has any. It names both sides.
        """
        mine, found = (told.extra.get("adapters") for told in (self, other))
        if mine is None and found is None:
            return
        anew = f"or start from it under another job.name with model.config.student_ckpt={source}"
        if mine is None or found is None:
            what = "all weights" if found is None else f"low-rank adapters of rank {found['rank']}"
            rank = 0 if found is None else found["rank"]
            here = "all weights" if mine is None else f"adapters of rank {mine['rank']}"
            raise CheckpointError(
                f"{source} holds {what}, this run trains {here}; set model.config.lora.rank={rank},"
                f" {anew}"
            )
        mine, found = _plain(mine), _plain(found)
        different = [key for key in ("rank", "alpha", "layers") if mine[key] != found[key]]
        if different:
            told = ", ".join(f"{key}: {found[key]} there, {mine[key]} here" for key in different)
            raise CheckpointError(
                f"{source} holds other low-rank adapters ({told}); set model.config.lora as there,"
                f" {anew}"
            )
        for role in sorted(mine["bases"].keys() & found["bases"].keys()):
            here, there = mine["bases"][role], found["bases"][role]
            if here["digest"] != there["digest"]:
                mend = "give it the weights that they belong to"
                if here["dtype"] != there["dtype"]:
                    mend = f"set model.config.precision={there['dtype']}"
                raise CheckpointError(
                    f"{source} holds adapters of the {role} on the weights of {_base(there)}, this"
                    f" run's are those of {_base(here)}; {mend}, {anew}"
                )


@contextmanager
def replacing_described(target: Path, description: Description | None) -> Iterator[Path]:
    """As `replacing`, with the description beside a file (`<name>.json`): wherever it is stopped,
    no file stands beside the description of another.
    """
    beside, told = (target.with_name(f"{lead}{target.name}.json") for lead in ("", ".writing_"))
    try:
        with replacing(target) as partial:
            if description is not None:  # what can fail comes before the work
                description.write(told)
            yield partial
            if alone := partial.is_file():  # a folder has it inside
                flush(partial)  # and before the older description goes
                discard(beside)
        if alone and description is not None:
            os.replace(told, beside)
    finally:
        with suppress(OSError):  # the reason of a failure counts
            discard(told)


def _base(told: Mapping[str, Any]) -> str:
    return f"{told['path'] or 'a random start'} ({told['dtype']}, digest {told['digest'][:12]})"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would return it (tuples become lists)."""
    return json.loads(json.dumps(dict(values)))
