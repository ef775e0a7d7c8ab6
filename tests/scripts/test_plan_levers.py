"""Ways to save memory in the planner: bytes against real tensors and real iterations, the search
against all choices, and the command that it prints.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex

import pytest

from rcm.configs import registry_distill
from rcm.configs.cli import main as train
from rcm.configs.compose import compose_run
from rcm.configs.plan_job import plan_job
from rcm.configs.plan_search import LADDER, MACHINES, Search
from rcm.core.errors import ConfigError
from rcm.nets.frozen_fp8 import round_linears_
from rcm.nets.lora import AdaptedNet, attach
from rcm.nets.wan.adapters import LAYERS
from rcm.nets.wan.config import PRESETS, WanConfig
from rcm.nets.wan.model import WanDiT
from rcm.train import planner_memory
from rcm.train.optim import AdamWConfig
from rcm.train.planner import predict, propose
from rcm.train.planner_card import GIB, card
from rcm.train.planner_job import Job, NetPlan, PhasePlan
from rcm.train.planner_memory import held_terms, host_bytes, moment_bytes, total
from scripts import bench_memory
from scripts.plan import main
from tests.scripts.test_plan import small

SF = "experiment=causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3"
SMALL_ROLES = ["net_bidirectional_teacher=wan2pt1_1pt3b", "net_fake_score=wan2pt1_1pt3b"]
SIZES = WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=2, text_dim=64, text_len=16, freq_dim=32)


def job(**changes: object) -> Job:
    nets = (NetPlan("student", SIZES, True, True), NetPlan("teacher", SIZES, False))
    return Job("job", nets, (PhasePlan("student", ()),), 1, **changes)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8", "float8"])
def test_moments_take_what_the_optimiser_allocates(states: str) -> None:
    if states in ("int8", "float8"):
        pytest.importorskip("torchao.optim")
    net = WanDiT(SIZES, attention="reference")
    optimizer = AdamWConfig(states=states).build(net.parameters(), host=True)
    found = sum(value.nbytes for p in net.parameters() for name, value in optimizer.blank_state(p).items() if name != "step")
    plan = NetPlan("student", SIZES, trained=True, states=states)
    assert moment_bytes(Job("job", (plan,), (), 1), plan) == found


@pytest.mark.parametrize("rank", [8, 32, 48])
@pytest.mark.parametrize("states", ["bfloat16", "int8"])
def test_moments_of_adapters_take_what_the_optimiser_allocates(states: str, rank: int) -> None:
    """Rows of B are of the rank, which may have no block of 32; they stay wide."""
    pytest.importorskip("torchao.optim")
    net = WanDiT(SIZES, attention="reference")
    attach(net, LAYERS, roles=["student"], rank=rank, alpha=rank)
    own = list(AdaptedNet(net, "student").parameters())
    optimizer = AdamWConfig(states=states).build(own, host=True)
    found = sum(value.nbytes for p in own for name, value in optimizer.blank_state(p).items() if name != "step")
    plan = NetPlan("student", SIZES, trained=True, states=states, rank=rank, layers=LAYERS)
    assert moment_bytes(Job("job", (plan,), (), 1), plan) == found


def test_eight_bit_states_need_no_package_to_be_planned() -> None:
    """A quarter of the wide ones at full size, scales and narrow tensors included."""
    wide, coded = (NetPlan("student", PRESETS["14B"], True, states=s) for s in ("float32", "int8"))
    plan = Job("job", (wide,), (), 1)
    assert 0.25 < moment_bytes(plan, coded) / moment_bytes(plan, wide) < 0.26


def test_rounded_weights_take_what_the_network_holds() -> None:
    net = WanDiT(SIZES, attention="reference").requires_grad_(False).bfloat16()
    round_linears_(net, "fp8_storage")
    found = sum(p.nbytes for p in net.parameters())
    plan = job(frozen_weights="fp8_storage")
    assert total(held_terms(plan, "card", {"teacher"})) == found
    full = NetPlan("teacher", PRESETS["14B"], False)
    plain, rounded = (Job("j", (full,), (), 1, frozen_weights=w) for w in ("compute", "fp8_storage"))
    assert 0.5 < total(held_terms(rounded, "card")) / total(held_terms(plain, "card")) < 0.53


def test_what_waits_on_the_host_is_not_on_the_card() -> None:
    plain = job()
    count = plain.net("student").elements()
    names = {term.name: term.bytes for term in held_terms(plain, "card")}
    assert host_bytes(plain) == 0 and sum(names.values()) == 18 * count
    away = job(host_states=True)
    assert total(held_terms(away, "card")) == 6 * count and host_bytes(away) == 12 * count
    idle = job(idle_roles=True)
    assert {term.name for term in held_terms(idle, "card")} == {"student optimiser", "student average"}
    assert host_bytes(idle) == 6 * count
    lives = job(host_parameters=True)
    assert {term.name for term in held_terms(lives, "card")} == {"teacher weights"}
    # FSDP2 takes memory for gradients from torch, which hands pinned memory out in powers of two
    net = WanDiT(plain.net("student").config, attention="reference")
    gradients = sum(4 * 2 ** math.ceil(math.log2(p.numel())) for p in net.parameters())
    assert 4 * count < gradients < 8 * count
    assert host_bytes(lives) == (4 + 12) * count + gradients


LEVERS = ["trainer.offload.states=True", "trainer.offload.idle_roles=True", "model.config.frozen_weights=fp8_storage"]
HALF = ["optimizer.states=bfloat16", "model.config.optimizer_fake_score.states=bfloat16"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([*LEVERS, *HALF], id="all"),
        pytest.param(HALF, id="half", marks=pytest.mark.slow),
        pytest.param(["model.config.frozen_weights=fp8"], id="products", marks=pytest.mark.slow),
    ],
)
def test_real_iterations_need_what_was_predicted(tmp_path, monkeypatch, more: list[str]) -> None:
    """As `tests.scripts.test_plan`, on the CPU, where moments pass no bus."""
    monkeypatch.setattr(planner_memory, "BUCKET", 1)
    nets = ("net", "net_fake_score", "net_bidirectional_teacher")
    words = ["experiment=causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_2step_c3-3_replayed", *small(*nets), *more]
    assert bench_memory.main(["--case", "small", "--json", str(tmp_path / "rows.json"), *words]) == 0
    for row in json.loads((tmp_path / "rows.json").read_text())["rows"]:
        assert row["predicted_peak"] == pytest.approx(row["peak"], rel=0.1), row


def search(*words: str) -> Search:
    registry_distill.register()
    return Search(lambda more: compose_run([*words, *more], world_size=None, require_inputs=False))


@pytest.mark.slow
def test_no_fewer_levers_would_do() -> None:
    """1.3B throughout on 24 GB: the choice fits, and none that lacks one of its levers does."""
    searched, on = search(SF, *SMALL_ROLES), card("rtx4090")
    found = searched.found(on, ranks=1)
    assert found.proposal.best is not None and found.levers
    for count in range(len(found.levers)):
        for fewer in itertools.combinations(found.levers, count):
            assert propose(searched.job(fewer, ranks=1), on).best is None, fewer


@pytest.mark.slow
def test_levers_that_a_run_refuses_are_passed_over() -> None:
    """Adapters lie on one base, which is never idle; the search goes on without."""
    searched = search("experiment=causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_lora_c3-3")
    refused = [lever for lever in LADDER if "idle_roles" in lever.words[0]]
    with pytest.raises(ConfigError):
        searched.job(tuple(refused), ranks=1)
    found = searched.found(card("rtx4090"), ranks=1)
    assert not set(refused) & set(found.levers)


def test_machines_go_from_small_to_large() -> None:
    sizes = [ranks * on.gib for ranks, on in MACHINES]
    assert sizes == sorted(sizes) and len(sizes) == 16


def test_the_smallest_machine_and_its_command(tmp_path, capsys) -> None:
    assert main(["--smallest", SF, *SMALL_ROLES, "--json", str(tmp_path / "plan.json")]) == 0
    told = capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())["machines"]
    assert [row["fits"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert (rows[-1]["gpus"], rows[-1]["gpu"]) == (1, "rtx4090")
    line = re.search(r"train so:\n +(torchrun .*)\n", told).group(1)
    start, words = shlex.split(line)[:5], shlex.split(line)[5:]
    assert start == ["torchrun", "--nproc_per_node=1", "-m", "rcm", "train"]
    run = compose_run(words, world_size=1, require_inputs=False)
    found = predict(plan_job(run, ranks=1), card("rtx4090"))
    assert found.fits and found.peak == pytest.approx(rows[-1]["peak_bytes"])
    assert f"{found.host / GIB:.2f} GiB of host memory" in told


@pytest.mark.slow
def test_machines_of_one_kind_alone(capsys) -> None:
    assert main(["--smallest", SF, "gpu=rtx4090", "gpus=1"]) == 0
    told = capsys.readouterr().out
    assert "none of these machines trains it" in told and "l40s" not in told
    assert "adapters instead of all weights (docs/lora.md) need less: model.config.lora.rank=64" in told


def test_words_that_the_layout_replaces_are_not_told_twice(capsys) -> None:
    words = ["experiment=toy_sf_dmd_c3-3", "trainer.grad_accum_iter=2", "trainer.offload.states=True"]
    assert main(words) == 0
    line = re.search(r"train so:\n +(torchrun .*)\n", capsys.readouterr().out).group(1)
    assert line.count("trainer.grad_accum_iter=") == 1 and line.count("trainer.offload.states=") == 1


@pytest.mark.parametrize(("ranks", "machines"), [(8, None), (12, "--nnodes=2")])
def test_the_command_starts_as_many_ranks_with_the_same_registry(capsys, monkeypatch, ranks: int, machines: str | None) -> None:
    assert main(["--config=rcm.configs.registry_distill", "experiment=toy_tf_c3-3", f"gpus={ranks}"]) == 0
    line = re.search(r"train so:\n +torchrun (.*) -m rcm train (.*)\n", capsys.readouterr().out)
    counts = dict(word.split("=") for word in line[1].split())
    assert int(counts.pop("--nproc_per_node")) * int(counts.get("--nnodes", 1)) == ranks
    assert line[1].startswith(machines or "--nproc_per_node")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert "--config=rcm.configs.registry_distill" in line[2]
    assert train(["--dryrun", *shlex.split(line[2])]) == 0
