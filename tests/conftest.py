"""Settings of every test: one thread, no network, GPU tests skipped with a reason where there is no
GPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["no_proxy"] = "*"  # servers of tests are on this machine

import gc
import importlib.util
import re
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import processes

OPTIONAL = ("diffusers", "ftfy", "hatchling", "peft", "starlette", "tokenizers", "torchao", "transformers", "uvicorn", "websockets")


def pytest_configure(config: pytest.Config) -> None:
    """Two workers share two cores: more threads per process only make them wait for each other."""
    torch.set_num_threads(1)
    gc.disable()
    # a shell's background job ignores Ctrl-C, and so would all processes of its tests
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A file whose imports ask for an optional package is passed over where that is missing."""
    return _passed_over((yield), collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """As is a test that ends for want of one."""
    return _passed_over((yield), item.path)


def _passed_over(report: Any, path: Path) -> Any:
    missing = report.failed and re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
    if missing and missing[1] in OPTIONAL and importlib.util.find_spec(missing[1]) is None:
        report.outcome = "skipped"
        report.longrepr = (str(path), 1, f"Skipped: needs {missing[1]}: pip install 'rcm[test]'")
    return report


def pytest_collection_finish() -> None:
    """Python's collector passes over the 600,000 objects that imports and collecting have made:
    each full collection (a trainer begins with two) would walk over all of them, for 0.3 s.
    """
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why a GPU test did not run."""
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Draws are those of the fixture and of the test, whatever ran before them in this process."""
    _seed(f"{fixturedef.baseid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """A test draws otherwise than its fixtures."""
    _seed(item.nodeid)


def _seed(name: str) -> None:
    # torch.manual_seed asks every kind of device, for half a millisecond
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(zlib.crc32(name.encode()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts of the fault-injection suite per class of fault."""
    from tests.faults.case import PROPERTY, table

    reports = [r for listed in terminalreporter.stats.values() for r in listed if getattr(r, "when", None) == "call"]
    if outcomes := [value for report in reports for name, value in report.user_properties if name == PROPERTY]:
        terminalreporter.section("injected faults")
        for line in table((kind, verdict) for kind, verdict in outcomes):
            terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def denoiser() -> Any:
    """The tiny network in float64, as streams have it."""
    from rcm.core.dtypes import Precision
    from rcm.nets.denoiser import Denoiser
    from tests.support.tiny_nets import tiny_net

    return Denoiser(tiny_net(), Precision.preset("fp64")).eval_params()


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Messages of level WARNING and above, as they come."""
    from loguru import logger  # kernels and networks are also tested where it is not installed

    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


@pytest.fixture(autouse=True)
def _nobody_listens() -> Iterator[None]:
    """What a command of one test has set up for its log would also print the lines of the next."""
    yield
    if (loguru := sys.modules.get("loguru")) is not None:
        loguru.logger.remove()


@pytest.fixture(autouse=True)
def _same_defaults() -> object:
    """No test leaves torch's default dtype or gradient mode changed for the next one, nor the
    precision of products, which training sets for its process.
    """
    yield
    changed = torch.get_default_dtype() is not torch.float32 or not torch.is_grad_enabled()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(True)
    assert not changed, "the test left torch's default dtype or gradient mode changed"


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    """A job of a failed test would take a core from all later ones."""
    yield
    processes.end_all()
