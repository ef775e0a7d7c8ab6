"""Registered configs and a short way to compose one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rcm.configs import registry_distill
from rcm.configs.compose import Run, compose_run

Composer = Callable[..., Run]


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    registry_distill.register()


@pytest.fixture
def composed() -> Composer:
    """`composed("experiment=...", ...)`: a run without the machine's environment, ranks or
    files.
    """

    def make(*overrides: str, environ: dict[str, str] | None = None, world_size: int | None = None, require_inputs: bool = False) -> Run:
        return compose_run(overrides, environ=environ or {}, world_size=world_size, require_inputs=require_inputs)

    return make
