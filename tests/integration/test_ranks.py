"""The training command on two ranks: sharded, replicated and context-parallel runs agree with one
rank and with each other, and resume exactly; torchrun starts it in both forms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.integration.entry import everything, launch, lines, same, small, write_network
from tests.integration.test_resume import SELF_FORCED, command, finish, teacher_forced
from tests.support.dist import run_ranks

M = "model.config."
CONTEXT = "model_parallel.context_parallel_size=2"
SHARD = M + "fsdp_shard_size=2"
FORMS = {"long": ["--config=rcm/configs/registry_distill.py", "--"], "short": []}

pytestmark = pytest.mark.dist


def exit_codes(commands: list[list[str]]) -> list[int]:
    """On a rank of an existing process group: run the training command once per list of words."""
    os.environ.update(WORLD_SIZE=str(torch.distributed.get_world_size()), RANK=str(torch.distributed.get_rank()))
    return [launch(*words) for words in commands]


def scm(job: Path, start: Path, *more: str, iterations: int = 3, stage: str = "tf_scm") -> list[str]:
    """Tangents through a cache, with a guided teacher, in float64."""
    return [
        f"experiment=toy_{stage}_c3-3",
        *small(job, roles=("net", "net_causal_teacher"), iterations=iterations),
        M + f"student_ckpt={start}",
        M + f"causal_teacher_ckpt={start}",
        M + "causal_guidance=2",
        M + "tangent_warmup=0",
        "precision=fp64",
        *more,
    ]


def dmd(job: Path, start: Path, *more: str, iterations: int = 3) -> list[str]:
    """A replayed rollout with student and critic, in float64."""
    return [
        "experiment=toy_sf_dmd_2step_c3-3_replayed",
        *small(job, roles=SELF_FORCED, iterations=iterations),
        M + f"student_ckpt={start}",
        M + f"bidirectional_teacher_ckpt={start}",
        M + "bidirectional_guidance=2",
        M + "student_update_freq=2",
        "precision=fp64",
        *more,
    ]


def close(a: Path, b: Path, *, rel: float) -> None:
    """The same numbers in every line, up to `rel`."""
    for mine, theirs in zip(lines(a), lines(b), strict=True):
        assert mine == pytest.approx(theirs, rel=rel)


def exact_on_two_ranks(folder: Path, start: Path, *more: str, critic: Sequence[str] = ()) -> None:
    """Tangents and rollouts: context parallelism is one rank, sharded is replicated, stopped is
    unbroken. `critic`: more words where there is one.
    """
    both = [*more, *critic]
    assert launch(*scm(folder / "scm_one", start, *more)) == launch(*dmd(folder / "dmd_one", start, *both)) == 0
    commands = [
        scm(folder / "scm_context", start, CONTEXT, *more),
        scm(folder / "scm_shard", start, SHARD, *more),
        scm(folder / "scm_replica", start, *more),
        dmd(folder / "dmd_context", start, CONTEXT, *both),
        dmd(folder / "dmd_parts", start, CONTEXT, *both, iterations=2),
        dmd(folder / "dmd_parts", start, CONTEXT, *both),
    ]
    assert run_ranks(2, exit_codes, commands, tmp_path=folder) == [[0] * len(commands)] * 2
    close(folder / "scm_context", folder / "scm_one", rel=1e-6)
    close(folder / "dmd_context", folder / "dmd_one", rel=1e-6)
    close(folder / "scm_shard", folder / "scm_replica", rel=1e-6)
    assert lines(folder / "scm_shard")[0] != lines(folder / "scm_one")[0], "two data ranks read other samples than one"
    assert lines(folder / "dmd_parts") == lines(folder / "dmd_context")
    assert same(everything(folder / "dmd_parts"), everything(folder / "dmd_context"))


def alike_in_every_layout(folder: Path, words: Callable[..., list[str]], *commands: list[str]) -> None:
    """`words(job, *more)` with a sequence on two ranks is as on one, sharded as replicated;
    `commands` run behind them.
    """
    assert launch(*words(folder / "one")) == 0
    layouts = {"context": [CONTEXT], "shard": [SHARD], "replica": []}
    commands = (*(words(folder / name, *more) for name, more in layouts.items()), *commands)
    assert run_ranks(2, exit_codes, list(commands), tmp_path=folder) == [[0] * len(commands)] * 2
    close(folder / "context", folder / "one", rel=1e-6)
    close(folder / "shard", folder / "replica", rel=1e-6)
    assert lines(folder / "shard")[0] != lines(folder / "one")[0], "two data ranks read other samples than one"


@pytest.mark.slow
def test_two_ranks_equal_one_and_resume_exactly(tmp_path: Path) -> None:
    exact_on_two_ranks(tmp_path, write_network(tmp_path / "start.safetensors", seed=3))


@pytest.mark.slow
def test_long_rollouts_are_as_long_on_every_rank(tmp_path: Path) -> None:
    """Sharded ranks gather weights together: a place drawn for each data rank would leave one of
    them waiting.
    """
    start, long = write_network(tmp_path / "start.safetensors", seed=3), M + "long_tuning={frames:18,window_blocks:2,sink_blocks:1}"
    alike_in_every_layout(tmp_path, lambda job, *more: dmd(job, start, long, *more))


def test_torchrun_starts_the_published_form(tmp_path: Path) -> None:
    """`torchrun --nproc_per_node=2 -m scripts.train --config=... -- experiment=...
    model_parallel.context_parallel_size=2`.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(*teacher_forced(one, "precision=fp64", iterations=3)) == 0
    finish(command(*FORMS["long"], *teacher_forced(two, "precision=fp64", CONTEXT, iterations=3), ranks=2))
    close(two, one, rel=1e-6)


@pytest.mark.slow
def test_torchrun_resumes_in_the_short_form(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(command(*FORMS["long"], *teacher_forced(whole, CONTEXT), ranks=2))
    finish(command(*FORMS["short"], *teacher_forced(parts, CONTEXT, iterations=3), ranks=2))
    finish(command(*FORMS["short"], *teacher_forced(parts, CONTEXT), ranks=2))
    assert lines(parts) == lines(whole)
    assert same(everything(parts), everything(whole))


@pytest.mark.slow
def test_a_refused_config_ends_every_rank_with_one_sentence(tmp_path: Path) -> None:
    process = command(*teacher_forced(tmp_path / "job", "model_parallel.context_parallel_size=3"), ranks=2)
    _, told = process.communicate(timeout=300)
    assert process.returncode != 0
    assert told.count("error: ") == 1 and "context_parallel_size" in told
    assert not (tmp_path / "job").exists()
