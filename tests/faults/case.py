"""Fault injection: a hostile or an unlucky input meets the package, which refuses it in one
sentence, at once, with nothing executed.

To add cases, write `tests/faults/test_<what>.py`:

    CASES = [
        Fault("nan", kind="edge values", refusal="--fps.*finite", main=stream_main, argv=lambda d:
        ["--fps", "nan"]), Fault("list", kind="malformed descriptions", refusal="is not a
        checkpoint", call=lambda d: describe(write(d, "[]"))), Fault("full", kind="full disk",
        refusal="No space", module="scripts.dcp_to_pth", argv=lambda d: [...], slow=True),
    ]

    @each(CASES)
    def test_refused(case: Fault, tmp_path: Path) -> None:
        case.check(tmp_path)

`kind` is the class under which a case is counted; `name` is unique inside it. A case runs in one of
three ways, each below `folder`, an empty directory that `call` and `argv` get as their only
argument and where they write what they need:

    call            in this process: must raise one of `ERRORS`, nothing else
    main + argv     a command's main(argv) in this process: status other than 0, the refusal in what
                    it prints
    module + argv   `python -m module ...` in a process of its own (seconds: importing torch): the
                    same, and killed at the deadline

`refusal` is a regular expression that the sentence must match; None for an input that must be
accepted (leftovers that stop no save): then success is required. A hostile file leaves its mark at
`canary(folder)` if it is executed (`Bomb`). `deadline` is in seconds; `slow=True` keeps a case out
of `make test` (anything above 10 s). `after`, called with the folder, looks at what is left ("the
old file is still whole"). A test that does not fit the table (two ranks, kills at random points)
calls `count(request, kind, verdict)` instead.

The counts per class stand at the end of the pytest run (tests/conftest.py): cases, tracebacks,
executions, hangs, exit 0 on failure; all but the first must be 0.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest

from rcm.core.errors import CheckpointError, ConfigError
from rcm.pipelines.video_io import VideoError

ROOT = Path(__file__).resolve().parents[2]
ERRORS = (CheckpointError, ConfigError, VideoError, OSError)
"""What a library call may raise for a user's mistake."""
PATIENCE = 10
"""Times its deadline that a case may take by the clock: a busy machine is no hang."""
VERDICTS = ("traceback", "execution", "hang", "exit 0", "unclear")
"""What a failed case did: raised what is no refusal, ran code of the file, passed its deadline,
reported success, said something else.
"""
PROPERTY = "fault"
MOST_CHARACTERS = 1200
_UNFIT = ("Traceback", "weights_only=False", "weights_only`")


class Bomb:
    """Unpickled without an allow list, makes the folder `path` and becomes `value`."""

    def __init__(self, path: Path, value: object = None) -> None:
        self.path, self.value = path, value

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _explode, (str(self.path), self.value)


def _explode(path: str, value: object) -> object:
    os.makedirs(path, exist_ok=True)
    return value


def canary(folder: Path) -> Path:
    """The path that exists once a hostile file was executed."""
    return folder / "executed"


def kept_folder() -> Path:
    """An empty folder that lasts as long as this process: for what many cases copy."""
    folder = Path(tempfile.mkdtemp(prefix="rcm_faults_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Broken(AssertionError):
    """A case that did not end in its refusal; `verdict` is one of `VERDICTS`."""

    def __init__(self, verdict: str, words: str) -> None:
        super().__init__(f"{verdict}: {words}")
        self.verdict = verdict


@dataclass(frozen=True)
class Fault:
    """One input and what must come of it; see the module."""

    name: str
    kind: str = field(kw_only=True)
    refusal: str | None = field(kw_only=True)
    call: Callable[[Path], object] | None = field(kw_only=True, default=None)
    main: Callable[[Sequence[str]], int | None] | None = field(kw_only=True, default=None)
    module: str = field(kw_only=True, default="")
    argv: Callable[[Path], Sequence[object]] = field(kw_only=True, default=lambda folder: ())
    after: Callable[[Path], object] | None = field(kw_only=True, default=None)
    environment: Mapping[str, str] = field(kw_only=True, default_factory=dict)
    deadline: float = field(kw_only=True, default=20.0)
    slow: bool = field(kw_only=True, default=False)

    def check(self, folder: Path) -> None:
        """Run the case; raises `Broken` unless it ended as it must."""
        if sum((self.call is not None, self.main is not None, bool(self.module))) != 1:
            raise TypeError(f"case {self.name!r} needs exactly one of call, main, module")
        status, told = self._called(folder) if self.call else self._run_here(folder) if self.main else self._run_apart(folder)
        if canary(folder).exists():
            raise Broken("execution", f"the file's code ran; status {status}: {told[-400:]}")
        if any(word in told for word in _UNFIT):
            raise Broken("traceback", told[-3000:])
        if self.refusal is None:
            if status:
                raise Broken("unclear", f"should be accepted, ended with {status}: {told[-1500:]}")
        elif status == 0:
            raise Broken("exit 0", f"nothing was refused: {told[-400:]!r}")
        elif not re.search(self.refusal, told):
            raise Broken("unclear", f"expected {self.refusal!r}, got: {told[-1500:]}")
        if self.after is not None:
            self.after(folder)

    def _called(self, folder: Path) -> tuple[int, str]:
        """(1, the message) of a call that raised, (0, "") of one that returned."""
        try:
            with within(self.deadline):
                self.call(folder)
        except (Broken, pytest.skip.Exception):
            raise
        except ERRORS as error:
            told = str(error)
            if "\n" in told.strip() or len(told) > MOST_CHARACTERS:
                raise Broken("unclear", f"not one sentence: {told[:1500]!r}") from error
            return 1, told
        except BaseException as error:
            raise Broken("traceback", f"{type(error).__name__}: {str(error)[:1500]}") from error
        return 0, ""

    def _run_here(self, folder: Path) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        words = [str(word) for word in self.argv(folder)]
        try:
            with contextlib.ExitStack() as around:
                patch = around.enter_context(pytest.MonkeyPatch.context())
                for name, value in self.environment.items():
                    patch.setenv(name, value)
                for context in (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(self.deadline)):
                    around.enter_context(context)
                status = self.main(words)
        except (Broken, pytest.skip.Exception):
            raise
        except SystemExit as leaving:  # argparse
            status = leaving.code
            if isinstance(status, str):
                err.write(status)
                status = 1
        except BaseException as error:
            raise Broken("traceback", f"{type(error).__name__}: {str(error)[:1500]}") from error
        return int(status or 0), f"{err.getvalue()}\n{out.getvalue()}"

    def _run_apart(self, folder: Path) -> tuple[int, str]:
        command = [sys.executable, "-m", self.module, *(str(word) for word in self.argv(folder))]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=PATIENCE * self.deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
            raise Broken("hang", f"still running after {PATIENCE * self.deadline:g} s: {err[-1500:]}") from None
        return process.returncode, f"{err}\n{out}"


def each(cases: Iterable[Fault]) -> pytest.MarkDecorator:
    """Parametrise a test over `case`, ids "kind: name", slow ones marked."""
    listed = list(cases)
    twice = [f"{kind}: {name}" for (kind, name), n in Counter((case.kind, case.name) for case in listed).items() if n > 1]
    if twice:
        raise ValueError(f"cases of the same name: {', '.join(twice)}")
    marked = [pytest.param(case, id=f"{case.kind}: {case.name}", marks=[pytest.mark.slow] if case.slow else []) for case in listed]
    return pytest.mark.parametrize("case", marked)


def count(request: pytest.FixtureRequest, kind: str, verdict: str = "") -> None:
    """Count the running test under `kind`; `verdict` (of `VERDICTS`) where it is broken. For tests
    that use no `Fault`.
    """
    request.node.user_properties[:] = [p for p in request.node.user_properties if p[0] != PROPERTY]
    request.node.user_properties.append((PROPERTY, (kind, verdict)))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `Broken("hang")` when the body takes longer, of processor time or `PATIENCE` times that
    (seen between Python instructions; main thread only, else no deadline).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    worked, begun = time.process_time(), time.monotonic()

    def late(number: int, frame: FrameType | None) -> None:
        if time.process_time() - worked >= seconds or time.monotonic() - begun >= PATIENCE * seconds:
            raise Broken("hang", f"still running after {time.monotonic() - begun:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def table(outcomes: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of counts per class from (kind, verdict) pairs, verdict "" for a case that passed."""
    counts: dict[str, Counter[str]] = {}
    for kind, verdict in outcomes:
        counts.setdefault(kind, Counter())[verdict] += 1
    width = max(map(len, (*counts, "all")), default=0)
    head = f"{'':<{width}}  cases  " + "  ".join(VERDICTS)
    rows = [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]
    lines = [head]
    for kind, found in rows:
        lines.append(f"{kind:<{width}}  {found.total():>5}  " + "  ".join(f"{found[verdict]:>{len(verdict)}}" for verdict in VERDICTS))
    return lines
