"""`repeatable` turns torch's deterministic algorithms on for a while, a run for its length."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch

from rcm.configs import build, registry_distill
from rcm.configs.compose import compose_run
from rcm.core.determinism import WORKSPACE, repeatable


def switches() -> tuple[bool, bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture
def unset(monkeypatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")  # so that it is taken back
    monkeypatch.delenv(WORKSPACE)


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_switches_are_those_of_before_when_it_ends_badly(unset, before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        kept = switches()
        with suppress(ZeroDivisionError), repeatable(True):
            found = switches(), os.environ[WORKSPACE]
            raise ZeroDivisionError
        assert found == ((True, False, False), ":4096:8") and switches() == kept
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_changes_unless_asked_for(unset) -> None:
    kept = switches()
    with repeatable(False):
        assert switches() == kept and WORKSPACE not in os.environ


def test_a_workspace_of_the_users_stays(monkeypatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with repeatable(True):
        assert os.environ[WORKSPACE] == ":16:8"


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_is_built_and_trained_under_them(unset, tmp_path, monkeypatch, wanted: bool) -> None:
    class Built(Exception):
        pass

    def stop(*_args, **_words):
        raise Built(torch.are_deterministic_algorithms_enabled())

    monkeypatch.setattr(build, "build_trainer", stop)
    registry_distill.register()
    words = ["experiment=toy_tf_c3-3", f"job.output_root={tmp_path}", f"trainer.deterministic={wanted}"]
    with pytest.raises(Built) as found:
        build.run(compose_run(words, environ={}, world_size=1))
    assert found.value.args == (wanted,) and not torch.are_deterministic_algorithms_enabled()
