"""Save and load everything that training changes, with torch.distributed.checkpoint (DCP).

    <job>/checkpoints/latest_checkpoint.txt          name of the newest complete checkpoint
    <job>/checkpoints/iter_000000500/rcm.json        self-description /model/          net.*,
                                    net_ema.*, net_fake_score.* /optim_net/, /optim_fake_score/
                                    optimiser state by slot and parameter name /scheduler/
                                    update counts /trainer/        iteration, data positions

A checkpoint is written under another name and renamed when complete; `latest_checkpoint.txt`
changes last, atomically. A save that is killed or finds no space therefore leaves the previous
checkpoint in use; one that fails removes what it wrote. Loading is strict and collective; the world
size may differ from the one that saved.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loguru import logger
from torch.distributed.checkpoint.api import CheckpointException

from rcm.core.errors import CheckpointError, PeerGone
from rcm.core.files import discard, put_in_place
from rcm.parallel.agree import agree, is_lost_peer, on_first, shared, together
from rcm.parallel.mesh import ParallelDims
from rcm.parallel.threads import HELD
from rcm.storage.dcp_folder import reason_of
from rcm.storage.inside import pointed_at
from rcm.train.continuity import Settings
from rcm.train.describe import FILE_NAME, Description, write_atomically
from rcm.train.export import find_model_directory
from rcm.train.host_copies import HostCopies
from rcm.train.resume import Taken
from rcm.train.snapshot import Part, Positioned, capture, gather_positions, restore
from rcm.train.state import TrainState
from rcm.train.stragglers import OwnTime

LATEST = "latest_checkpoint.txt"
_SAVED = re.compile(r"iter_\d{9,}")
"""Folders that a save makes; others, such as a copy kept by hand, are never removed."""


class Checkpointer:
    """Saves and loads a run's state under `<job>/checkpoints`.

    `description`: what every checkpoint says about itself. `settings`: what a run that continues
    from one must share. `keep_last`: keep only that many newest checkpoints (0: all).
    `asynchronous`: `save` returns once the state is copied to host memory, which is kept for the
    next copy; errors of the write surface at the next `save` or at `wait`. `own`: counts the
    seconds of this rank's own part.
    """

    def __init__(
        self,
        job: str | Path,
        *,
        dims: ParallelDims,
        description: Description,
        settings: Settings = Settings(),
        keep_last: int = 0,
        asynchronous: bool = False,
        own: OwnTime | None = None,
    ) -> None:
        self.root = Path(job) / "checkpoints"
        self.dims, self.description, self.settings = dims, description, settings
        self.keep_last, self.asynchronous, self.own = keep_last, asynchronous, own or OwnTime()
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._copies: defaultdict[str, HostCopies] = defaultdict(HostCopies)
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: TrainState, *, loader: Positioned | None = None) -> Path:
        """Write a checkpoint of `state` (and the loader's position) and return its directory.
        Collective; `state` is never changed.

        Raises OSError with the path when the disk is full or not writable, CheckpointError for
        other failures; the previous checkpoint stays in use.
        """
        self.wait()
        parts = capture(
            state, positions=gather_positions(loader, self.dims), settings=self.settings
        )
        final = self.root / f"iter_{state.iteration:09d}"
        unfinished = self.root / f".writing_{final.name}"
        description = self.description.at(state.iteration)
        self._on_first(lambda: _clear(self.root, unfinished), group=None)
        write = self._write_later if self.asynchronous else self._write
        futures: list[Any] = []
        try:
            for name, part in parts.items():
                futures.append(_together(partial(write, name, part, unfinished), path=unfinished))
        except Exception as error:
            self._begin(_drain, futures)
            if not isinstance(error, PeerGone):  # what has begun may wait for the lost rank
                self.settle()
            self._give_up(unfinished, error, group=None)
            raise
        if not self.asynchronous:
            self._finish_with(unfinished, final, description, problem=None, group=None)
            return final
        finishing = self._group("finish")
        self._begin(self._finish, futures, unfinished, final, description, finishing)
        return final

    def _begin(self, action: Callable[..., None], *arguments: Any) -> None:
        self._writer = threading.Thread(target=action, args=arguments, name=HELD)
        self._writer.start()

    def settle(self, *, seconds: float | None = None) -> None:
        """Block until no write is running, or `seconds` are over. What went wrong in it is kept for
        `wait`.
        """
        if self._writer is not None:
            self._writer.join(seconds)
            if not self._writer.is_alive():
                self._writer = None

    def wait(self) -> None:
        """Block until an asynchronous save has finished; raise what went wrong in it."""
        self.settle()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def latest(self) -> Path | None:
        """Directory of the newest complete checkpoint, None if there is none. CheckpointError if it
        is named but gone.
        """
        pointer = self.root / LATEST
        if not pointer.is_file():
            return None
        found = pointed_at(pointer)
        if not found.is_dir():
            raise CheckpointError(
                f"{pointer} names {found.name}, which does not exist; write the name of an existing"
                " iter_* directory into it"
            )
        return found

    def load(
        self,
        state: TrainState,
        *,
        loader: Positioned | None = None,
        path: str | Path | None = None,
        taken: Taken = Taken(),
    ) -> Path | None:
        """Restore the parts `taken` of `state` and the loader's position from `path` (a checkpoint,
        or a job: its newest), or from the latest checkpoint; None when there is none. Collective.

        Raises CheckpointError for another network (both named), missing or unexpected keys, wrong
        shapes, or a damaged file; ConfigError for settings or data that do not continue the run.
        """
        self.wait()
        find = self.latest if path is None else lambda: _checkpoint_at(Path(path))
        found = shared(on_first(find))
        if found is None:
            return None
        together(
            lambda: self._require_continues(Description.read(found / FILE_NAME), source=str(found))
        )
        _translated(
            lambda: restore(
                state, found, loader=loader, dims=self.dims, settings=self.settings, taken=taken
            ),
            path=found,
        )
        return found

    def _require_continues(self, stored: Description, *, source: str) -> None:
        self.description.require_same_network(stored, source=source)
        self.description.require_same_adapters(stored, source=source)

    def _write(self, name: str, part: Part, unfinished: Path) -> None:
        dcp.save(
            part,
            storage_writer=_TimedWriter(unfinished / name, own=self.own),
            no_dist=not dist.is_initialized(),
        )

    def _write_later(self, name: str, part: Part, unfinished: Path) -> Any:
        group = self._group(name)
        with self.own.counted("checkpoint"):  # copies to the host; the rest is in the background
            return dcp.async_save(
                part,
                checkpoint_id=str(unfinished / name),
                async_stager=self._copies[name],
                process_group=group,
                no_dist=not dist.is_initialized(),
            )

    def _group(self, name: str) -> dist.ProcessGroup | None:
        """A gloo group of all ranks for background collectives of one kind; made on first use, in
        the same order on every rank.
        """
        if not dist.is_initialized():
            return None
        if name not in self._groups:
            self._groups[name] = dist.new_group(backend="gloo")
        return self._groups[name]

    def _finish(
        self,
        futures: list[Any],
        unfinished: Path,
        final: Path,
        description: Description,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Body of the writer thread: wait for all parts on all ranks, then publish."""
        try:
            problem = None
            for future in futures:
                try:
                    future.result()
                except BaseException as error:
                    problem = _readable(error, path=unfinished)
            self._finish_with(unfinished, final, description, problem=problem, group=group)
        except Exception as error:
            self._failure = error

    def _finish_with(
        self,
        unfinished: Path,
        final: Path,
        description: Description,
        *,
        problem: Exception | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Publish when all parts are written everywhere; else remove them and raise the first
        `problem`.
        """
        try:
            agree(problem, group=group)
            self._on_first(lambda: self._publish(unfinished, final, description), group=group)
        except Exception as error:
            self._give_up(unfinished, error, group=group)
            raise

    def _give_up(
        self, unfinished: Path, error: Exception, *, group: dist.ProcessGroup | None
    ) -> None:
        """Remove a save that failed, so that it takes no space from the next one. No rank goes on
        before; a lost peer is not waited for.
        """
        if self.dims.rank == 0:
            with contextlib.suppress(OSError):  # the reason of the failure counts
                discard(unfinished)
        if not isinstance(error, PeerGone):
            agree(None, group=group)

    def _on_first(self, action: Callable[[], None], *, group: dist.ProcessGroup | None) -> None:
        """Run `action` on rank 0 and let every rank share its outcome."""
        problem = None
        if self.dims.rank == 0:
            try:
                action()
            except Exception as error:
                problem = _readable(error, path=self.root)
        agree(problem, group=group)

    def _publish(self, unfinished: Path, final: Path, description: Description) -> None:
        description.write(unfinished / FILE_NAME)
        put_in_place(unfinished, final)
        pointer = self.root / LATEST
        if pointer.is_dir():
            discard(pointer)
        write_atomically(pointer, final.name + "\n")
        if self.keep_last > 0:
            saved = (d for d in self.root.iterdir() if _SAVED.fullmatch(d.name) and d.is_dir())
            older = sorted(d for d in saved if d != final)
            for directory in older[: max(0, len(older) + 1 - self.keep_last)]:
                _retire(directory)
        logger.info("saved {}", final)


class _TimedWriter(dcp.FileSystemWriter):
    """DCP's writer of files, which counts the seconds of this rank's own files."""

    def __init__(self, path: Path, *, own: OwnTime) -> None:
        super().__init__(path)
        self._own = own

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As its base."""
        with self._own.counted("checkpoint"):
            return super().write_data(plan, planner)


def _checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, the one around its `model/`, or a job's newest.
    `CheckpointError` for a folder that is none of these.
    """
    model = find_model_directory(path)
    if model is None and not (path / FILE_NAME).is_file():
        raise CheckpointError(
            f"{path} is no checkpoint; give its iter_* folder, or the folder of the job"
        )
    return path if model is None or model.name != "model" else model.parent


def _clear(root: Path, unfinished: Path) -> None:
    """Make room for a new save: drop leftovers of killed ones, whatever they are."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".replaced_iter_*"):
        with contextlib.suppress(OSError):
            discard(leftover)
    for leftover in root.glob(".writing_iter_*"):
        discard(leftover)
    unfinished.mkdir()


def _retire(directory: Path) -> None:
    """Remove an old checkpoint, first from its name, so that none is left half. One that cannot be
    removed, as network file systems refuse while somebody reads it, is no reason to end a run.
    """
    away = directory.with_name(f".replaced_{directory.name}")
    try:
        directory.rename(away)
        discard(away)
    except OSError as error:
        told = "{} cannot be removed now ({}); the next save tries again"
        logger.warning(told, directory, error.strerror or error)


def _drain(futures: list[Any]) -> None:
    """Wait for background writes whose outcome no longer matters."""
    for future in futures:
        if future is not None:
            future.exception()


def _together(action: Callable[[], Any], *, path: Path) -> Any:
    """Run `action`, a step of a collective operation; a failure on any rank is raised on every
    rank, so that none waits for the others.
    """
    result, problem = None, None
    try:
        result = action()
    except (CheckpointException, Exception) as error:
        problem = _readable(error, path=path)
    agree(problem)
    return result


def _translated(action: Callable[[], Any], *, path: Path) -> Any:
    """Run `action`; DCP's failures become OSError or CheckpointError about `path`."""
    try:
        return action()
    except (CheckpointException, OSError) as error:
        raise _readable(error, path=path) from error


def _readable(error: BaseException, *, path: Path) -> Exception:
    """An OSError that names `path` if the system refused, else a CheckpointError; CheckpointErrors
    pass.
    """
    error = reason_of(error, path=path)
    if is_lost_peer(error):
        return PeerGone(
            f"another rank of this launch ended while {path} was written or read; the previous"
            " checkpoint stays in use"
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return OSError(
            error.errno,
            f"{reason}: checkpoint not written or read completely; the previous checkpoint is"
            " untouched",
            str(error.filename or path),
        )
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"{path}: {type(error).__name__}: {error}")
