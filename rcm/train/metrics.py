"""Numbers of a run: accumulated on the device, read and averaged over ranks only when logged,
written to sinks.

Sinks: JSON lines in the job directory, always; wandb when asked. Neither influences training.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.errors import ConfigError, first_line
from rcm.core.files import discard
from rcm.train.describe import write_atomically


class Averages:
    """Running means of named scalars; `add` never synchronises, `collect` does once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Count `values` (scalars, on any device) once more each."""
        for name, value in values.items():
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def collect(self, *, device: torch.device | str, world_size: int = 1) -> dict[str, float]:
        """Means since the last call, over the world, by sorted name; then forget. Collective: every
        rank has seen the same names.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack(
            [torch.as_tensor(self._sums[n], dtype=torch.float64, device=device) for n in names]
        )
        if world_size > 1:
            dist.all_reduce(sums)
        counts = [self._counts[n] * world_size for n in names]
        self._sums, self._counts = {}, {}
        return {
            name: total / count
            for name, total, count in zip(names, sums.tolist(), counts, strict=True)
        }


class Sink(Protocol):
    """Where logged numbers go; only rank 0 has sinks."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after iteration `step`."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object per logged iteration, a line each, written at once.

    On resume, lines after `resumed_at` (iterations that will be run again) and a torn last line are
    dropped, so no step appears twice.
    """

    def __init__(self, path: str | Path, *, resumed_at: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [
                line
                for line in self.path.read_text(errors="replace").splitlines()
                if _step_of(line) <= resumed_at
            ]
            write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. Raises OSError with the path when the disk is full."""
        with _naming(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        with _naming(self.path):
            self._file.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the system refuses about an open file comes without its name."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: numbers of the run not written; the last checkpoint is in use",
            str(path),
        ) from error


def _step_of(line: str) -> float:
    """Step of a line; infinite for one that was torn by a crash or is none of this file, so that
    it is dropped.
    """
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


class Wandb:
    """Weights & Biases; `mode` "online", "offline" (no network needed) or "disabled". `entity` ""
    is wandb's own default.

    A run that goes on in `directory` goes on in wandb too: the run's id is kept in a file there.
    ConfigError when the package is missing (what to install), when `mode` is online and there is no
    key, or with wandb's reason when it refuses.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str,
        directory: str | Path,
        mode: Literal["online", "offline"] = "online",
        config: Mapping[str, Any] | None = None,
        entity: str = "",
        group: str = "",
    ) -> None:
        require_wandb(mode)
        import wandb

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        place: dict[str, Any] = {
            "project": project,
            "name": name,
            "entity": entity or None,
            "group": group or None,
        }
        try:
            self._run = wandb.init(
                **place,
                dir=str(directory),
                mode=mode,
                config=dict(config or {}),
                id=_run_id(directory / WANDB_ID),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb refuses ({first_line(error)}); mend its settings, or choose"
                " job.wandb_mode=offline"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


WANDB_ID = "wandb_id.txt"
"""Name of the file in a job's folder that keeps the id of its wandb run."""


def require_wandb(mode: str) -> None:
    """ConfigError where logging to wandb in `mode` cannot work: without the package, or online
    without a key (looked for, not read).
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "logging to wandb was asked for, but the package is missing: pip install 'rcm[wandb]',"
            " or set job.wandb_mode=disabled"
        )
    if mode != "online" or any(
        os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    ):
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if not known:
        raise ConfigError(
            f"job.wandb_mode=online needs a key for {host}: run `wandb login`, set WANDB_API_KEY,"
            " or choose job.wandb_mode=offline"
        )


def _run_id(path: Path) -> str:
    """The id kept at `path`, or a new one that is kept there now."""
    if path.is_file() and (kept := path.read_text(errors="replace").strip()).isalnum():
        return kept
    discard(path)
    fresh = uuid.uuid4().hex[:12]
    write_atomically(path, fresh + "\n")
    return fresh
