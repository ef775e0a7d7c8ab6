"""The scaling benchmark without GPUs: its FLOPs against hand counts, its clocks, its file, rows
that run out of memory, and whole runs of tiny networks on gloo ranks.
"""

from __future__ import annotations

import json
import os
import runpy
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from rcm.configs.cli import DEFAULT_REGISTRY, load_registry
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.train.planner_card import H200
from scripts import bench_scale, bench_scale_run
from scripts.bench_scale import main
from scripts.bench_scale_flops import PEAK, mfu
from scripts.bench_scale_report import Ledger, measured_record
from scripts.bench_scale_rows import ROWS, Planned, Row, chosen, composed, planned
from scripts.bench_scale_run import Attempt, Iteration, attempt, kernel_times, middle_indices, scripted_phases
from tests.support.dist import run_ranks

S, FRAMES, CHUNKS, TEXT = 1560, 21, 7, 512
SMALL = {"E": 1536, "H": 8960, "layers": 30}
LARGE = {"E": 5120, "H": 13824, "layers": 40}


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def plan_of(name: str, *, ranks: int = 1, **changes) -> Planned:
    load_registry(DEFAULT_REGISTRY)
    defaults = {"on": H200, "tiny": False, "fused": True}
    return planned(row_named(name), ranks=ranks, **{**defaults, **changes})


def products(E: int, H: int, layers: int, *, tokens: int) -> tuple[float, float]:
    """Linear layers, and attention to the text: two FLOPs per multiply-add."""
    linear = tokens * (2 * 6 * E * E + 2 * 2 * E * H) + 2 * 2 * TEXT * E * E  # q k v o q o, MLP; text k v
    return layers * linear, layers * 2 * 2 * tokens * TEXT * E


def scores(E: int, H: int, layers: int, *, pairs: float) -> float:
    """Scores and results of self-attention over that many (query, key) pairs."""
    return layers * 2 * 2 * pairs * E


BLOCKS = [9 * S * S * (i + 1) for i in range(CHUNKS)]
"""Pairs of the queries of chunk i: three frames that see i chunks before them and their own."""


def test_flops_of_teacher_forcing_by_hand() -> None:
    for net, name in ((SMALL, "tf_diffusion-1.3B-one"),):
        linear, cross = products(**net, tokens=2 * FRAMES * S)
        expected = 3 * (linear + cross + scores(**net, pairs=2 * sum(BLOCKS)))
        assert plan_of(name).flops == {"student": pytest.approx(expected, rel=1e-12)}


def test_flops_of_continuous_consistency_by_hand() -> None:
    """Guided 14B teacher, clean half into the cache, noisy half with tangents over it, and the
    gradient.
    """
    packed, half = 2 * FRAMES * S, FRAMES * S
    teacher = 2 * (sum(products(**LARGE, tokens=packed)) + scores(**LARGE, pairs=2 * sum(BLOCKS)))
    context = sum(products(**SMALL, tokens=half)) + scores(**SMALL, pairs=sum(BLOCKS))
    own = CHUNKS * 9 * S * S
    tangent = 2 * sum(products(**SMALL, tokens=half))
    tangent += scores(**SMALL, pairs=3 * own + 2 * (sum(BLOCKS) - own))  # six and four products of two
    gradient = 3 * (sum(products(**SMALL, tokens=packed)) + scores(**SMALL, pairs=2 * sum(BLOCKS)))
    found = plan_of("tf_scm-1.3B-one").flops["student"]
    assert found == pytest.approx(teacher + context + tangent + gradient, rel=1e-12)


def test_flops_of_self_forcing_by_hand_and_replay_adds_none() -> None:
    chunk = [(sum(products(**SMALL, tokens=3 * S)), scores(**SMALL, pairs=pairs)) for pairs in BLOCKS]
    forward = [linear + attention for linear, attention in chunk]
    whole = sum(products(**SMALL, tokens=FRAMES * S)) + scores(**SMALL, pairs=(FRAMES * S) ** 2)
    steps = 2.5  # the mean of one to four
    rollout = (steps - 1) * sum(forward) + sum(forward[:-1])  # each chunk but the last enters the cache
    last = sum(
        3 * linear + attention * (3 - i / (i + 1)) for i, (linear, attention) in enumerate(chunk)
    )  # keys of i chunks before have no gradient
    found = plan_of("sf_dmd-1.3B-one-small_roles").flops
    assert found["student"] == pytest.approx(rollout + last + 3 * whole, rel=1e-12)
    assert found["fake_score"] == pytest.approx(rollout + sum(forward) + 3 * whole, rel=1e-12)
    assert plan_of("sf_dmd_replayed-1.3B-one-small_roles").flops == pytest.approx(found)


def test_recomputation_and_layout_change_no_model_flops() -> None:
    base = plan_of("tf_diffusion-14B-ulysses4", ranks=4).flops["student"]
    for name in (
        "tf_diffusion-14B-ulysses4-keep_attention_mlp",
        "tf_diffusion-14B-ulysses4-bf16_reduce",
    ):
        assert plan_of(name, ranks=4).flops["student"] == base
    assert plan_of("tf_diffusion-14B-fsdp", ranks=4).flops["student"] == 4 * base  # samples
    assert plan_of("tf_diffusion-14B-ulysses4-accumulate2_each", ranks=4).flops["student"] == 2 * base
    assert mfu(2 * PEAK, seconds=1.0, gpus=4) == 0.5


def test_communication_is_a_union_of_intervals_minus_what_runs_beside_it() -> None:
    spans = [
        ("gemm", 0, 10_000_000),
        ("ncclDevKernel_AllGather_RING_LL(x)", 5_000_000, 15_000_000),
        ("ncclDevKernel_SendRecv(x)", 14_000_000, 20_000_000),
        ("gemm", 18_000_000, 19_000_000),
    ]
    assert kernel_times(spans) == {
        "nccl_ms": 15.0,
        "exposed_ms": 9.0,
        "busy_ms": 20.0,
        "AllGather_ms": 10.0,
        "SendRecv_ms": 6.0,
    }
    assert kernel_times([])["busy_ms"] == 0


@pytest.mark.parametrize("name", ["sf_dmd-1.3B-one-small_roles", "rcm-1.3B-one"])
def test_measured_rollouts_are_as_long_as_a_cycle_on_the_mean(name: str) -> None:
    indices = middle_indices(plan_of(name, tiny=True).run, 2)
    assert sum(index + 1 for index in indices) / 2 == 2.5


def test_a_row_that_is_tight_is_planned_without_the_average() -> None:
    whole = plan_of("tf_diffusion-14B-ulysses4", ranks=4)
    tight = plan_of("tf_diffusion-14B-ulysses4", ranks=4, on=Namespace(**{**vars(H200), "gib": 75}))
    assert whole.lean == () and "ema.enabled=False" in tight.lean[0]
    saved = whole.prediction.peak - tight.prediction.peak
    assert saved == pytest.approx(4 * 14_288_491_584 / 4, rel=1e-3)


def test_rows_by_number_of_ranks_and_by_name() -> None:
    assert {row.layout for row in chosen(None, ranks=1)[0]} == {"one"}
    assert {row.layout for row in chosen(None, ranks=2)[0]} == {"fsdp", "ulysses2"}
    assert {row.layout for row in chosen(None, ranks=4)[0]} == {"fsdp", "ulysses2", "ulysses4", "hsdp"}
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    found, unknown = chosen("tf_scm-14B-ulysses4,nothing,tf_scm*,tf_diffusion-1.3B-hsdp", ranks=4)
    assert unknown == ["nothing"]
    assert found[0].name == "tf_scm-14B-ulysses4" and found[-1].name == "tf_diffusion-1.3B-hsdp"
    with pytest.raises(ConfigError, match="no such row on 2 rank"):
        chosen("tf_scm-14B-ulysses4", ranks=2)


def test_what_a_row_says() -> None:
    """A student and a fake score on two ranks: the slowest counts, kinds weigh by their share."""
    plan = plan_of("sf_dmd-1.3B-fsdp", ranks=2, tiny=True)
    kernels = {"nccl_ms": 500.0, "exposed_ms": 250.0, "busy_ms": 900.0}
    ends = [
        Attempt(
            "measured",
            iterations=(
                Iteration("student", 1, 5.0 + rank, 2**30, 2**31, 0),
                Iteration("fake_score", 1, 1.0, 2**30, 2**31, 0),
                Iteration("student", 2, 7.0, (3 + rank) * 2**30, 2**32, 1),
                Iteration("fake_score", 2, 2.0, 2**30, 2**31, 0),
                # under the profiler, whose time is the profiler's, too
                Iteration("student", 1, 8.0, 2**30, 2**31, 0, kernels),
                Iteration("fake_score", 1, 3.0, 2**30, 2**31, 0, kernels),
            ),
        )
        for rank in range(2)
    ]
    record = measured_record(plan.prediction, plan.flops, ends)
    assert record["kinds"]["student"]["seconds"] == 6.5 and record["kinds"]["fake_score"]["seconds"] == 1.5
    assert record["kinds"]["student"]["peak_gib"] == [3.0, 4.0] and record["peak_gib"] == 4.0
    assert record["kinds"]["student"]["allocator_retries"] == 2
    seconds = 6.5 / 6 + 1.5 * 5 / 6
    assert record["seconds"] == pytest.approx(seconds) and record["global_batch"] == 2
    assert record["tokens_per_s"] == pytest.approx(2 * 6 * 8 * 8 / seconds)  # 6 frames of 16 x 16 cells
    assert record["nccl_share"] == pytest.approx(0.5 / (8 / 6 + 3 * 5 / 6))
    flops = plan.flops["student"] / 6 + plan.flops["fake_score"] * 5 / 6
    assert record["mfu"] == pytest.approx(flops / (seconds * 2 * 989.4e12))
    assert json.loads(json.dumps(record)) == record


def test_the_file_keeps_what_was_measured(tmp_path: Path) -> None:
    path, device = tmp_path / "rows.json", torch.device("cpu")
    file = OutputFile.claim(path)
    Ledger(file, device=device).end({"row": "a", "ranks": 2, "status": "measured", "seconds": 1.0})
    later = Ledger(file, device=device)
    later.end({"row": "a", "ranks": 2, "status": "not run", "why": "budget"})
    later.end({"row": "a", "ranks": 4, "status": "measured", "seconds": 2.0})
    later.end({"row": "b", "ranks": 2, "status": "failed"})
    later.end({"row": "b", "ranks": 2, "status": "measured", "seconds": 3.0})
    told = {(r["row"], r["ranks"]): r["status"] for r in json.loads(path.read_text())["rows"]}
    assert told == {("a", 2): "measured", ("a", 4): "measured", ("b", 2): "measured"}
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no file of bench_scale"):
        Ledger(file)


def test_what_goes_wrong_is_told_and_nothing_is_raised(monkeypatch) -> None:
    run = plan_of("tf_diffusion-1.3B-one", tiny=True).run
    for error, status in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), "out of memory"),
        (ValueError("odd"), "failed"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(bench_scale_run, "_train", fail)
        found = attempt(run, dims=None, device=torch.device("cpu"), roles=["student"])
        assert found.status == status and str(error).splitlines()[0] in found.why and not found.iterations
    monkeypatch.setattr(bench_scale_run, "_train", lambda *_, **__: "interrupted")
    assert attempt(run, dims=None, device=torch.device("cpu"), roles=["student"]).status == "stopped"


def _scarce(path: str) -> tuple[int, dict[str, str]]:
    """Two rows: the second rank runs out of memory in the first."""
    real = bench_scale.attempt

    def fake(run, **options):
        if run.config.model_parallel.context_parallel_size > 1:
            return real(run, **options)
        alone = torch.distributed.get_rank() == 1
        return Attempt("out of memory", "OutOfMemoryError: of one rank") if alone else Attempt("measured")

    bench_scale.attempt = fake
    status = main(
        [
            *TINY,
            "--gpus",
            "2",
            "--repeats",
            "1",
            "--rows",
            "tf_diffusion-1.3B-fsdp,tf_diffusion-1.3B-ulysses2",
            "--json",
            path,
        ]
    )
    return status, {r["row"]: r["status"] for r in json.loads(Path(path).read_text())["rows"]}


TINY = ["--device", "cpu", "--small"]


@pytest.mark.dist
def test_a_rank_without_memory_ends_its_row_alone(tmp_path: Path) -> None:
    for status, rows in run_ranks(2, _scarce, str(tmp_path / "rows.json"), tmp_path=tmp_path):
        assert status == 0
        expected = {
            "tf_diffusion-1.3B-fsdp": "out of memory",
            "tf_diffusion-1.3B-ulysses2": "measured",
        }
        assert rows == expected
    record = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert record["predicted"]["peak_gib"] > 0 and "of one rank" in record["why"]


def ran(*words: str) -> int:
    """Exit status in this rank's group."""
    return main([*TINY, *words])


@pytest.mark.parametrize(("name", "beside"), [("gan", ("gan_head",)), ("small_roles", ())])
def test_the_head_of_a_discriminator_is_updated_beside_its_network(name: str, beside: tuple[str, ...]) -> None:
    load_registry(DEFAULT_REGISTRY)
    run = composed(row_named(f"sf_dmd_replayed-1.3B-one-{name}"), ranks=1, tiny=True)
    roles = [phase.roles for phase in scripted_phases(run, ["student", "fake_score"], [0])]
    assert roles == [("student",), ("fake_score", *beside)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "rows"),
    [
        (1, "sf_dmd_replayed-1.3B-one-gan,sf_dmd_replayed-1.3B-one-lora"),
        (2, "tf_scm-1.3B-ulysses2"),
        (4, "sf_dmd-1.3B-ulysses4,tf_diffusion-1.3B-hsdp,tf_diffusion-1.3B-fsdp-bf16_reduce"),
    ],
)
def test_whole_rows_on_gloo_ranks(tmp_path: Path, ranks: int, rows: str) -> None:
    path = tmp_path / "rows.json"
    words = ["--gpus", str(ranks), "--rows", rows, "--json", str(path)]
    assert run_ranks(ranks, ran, *words, tmp_path=tmp_path) == [0] * ranks
    found = json.loads(path.read_text())["rows"]
    assert [record["row"] for record in found] == rows.split(",")
    for record in found:
        assert record["status"] == "measured" and record["ranks"] == ranks
        kinds = record["kinds"]
        assert set(kinds) == ({"student", "fake_score"} if "sf_dmd" in record["row"] else {"student"})
        assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
        for kind in kinds.values():
            assert len(kind["samples_s"]) == 2 and len(kind["peak_gib"]) == ranks
            assert 0.7 < kind["predicted_peak_gib"] / max(kind["peak_gib"]) < 1.3, record["row"]
        assert record["seconds"] > 0 and record["words"][0].startswith("experiment=causal_wan2pt1")
        assert {"gpu", "torch", "date"} <= record["machine"].keys()


def test_rows_are_left_out_in_a_word(tmp_path: Path, capsys) -> None:
    """Too little time: the file says so, and the exit status is 0."""
    path = tmp_path / "rows.json"
    row = ["--rows", "tf_diffusion-1.3B-one", "--json", str(path)]
    assert main([*TINY, *row, "--budget", "5"]) == 0
    record = json.loads(path.read_text())["rows"][0]
    assert record["status"] == "not run" and "--budget 5" in record["why"]
    assert "--budget 5" in capsys.readouterr().out
    assert main(["--report", "--json", str(path)]) == 0 and "not run" in capsys.readouterr().out


def test_commands_that_need_no_gpu(capsys) -> None:
    assert main(["--list", "--gpus", "4"]) == 0
    assert "tf_scm-14B-ulysses4" in capsys.readouterr().out
    assert main(["--plan-only", "--gpus", "4", "--gpu", "h100", "--rows", "sf_dmd-14B*"]) == 0
    assert "DOES NOT FIT without the average" in capsys.readouterr().out
    for words, told in (
        (["--report"], "--json"),
        (["--rows", "nothing"], "no such row"),
        ([*TINY, "--gpus", "2", "--rows", "tf_scm-1.3B-fsdp"], "torchrun --nproc_per_node=2"),
        (
            ["--rows", "tf_diffusion-1.3B-one"],
            "needs CUDA" if not torch.cuda.is_available() else "",
        ),
    ):
        if told:
            assert main(words) == 2 and told in capsys.readouterr().err


def test_multicast_is_off_before_any_group_is_made(monkeypatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "")  # as another test may leave it
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    runpy.run_path(bench_scale.__file__)
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
