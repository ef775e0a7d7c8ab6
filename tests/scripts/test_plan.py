"""The planner's command, and its measurement on small networks on the CPU."""

from __future__ import annotations

import json

import pytest

from rcm.configs import registry_distill
from rcm.configs.compose import compose_run
from rcm.configs.network import parameter_count
from rcm.configs.plan_job import plan_job
from rcm.configs.plan_search import Search, words_of
from rcm.parallel.checkpointing import KEEP_PRODUCTS, SACConfig
from rcm.train.planner import layouts, predict, propose
from rcm.train.planner_card import H200
from scripts import bench_memory
from scripts.plan import main

SCM = "experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3"


def planned_names() -> list[str]:
    """Every row, in one pattern, without debug variants; the toy's replayed ones left out."""
    names = [name for row in registry_distill.ROWS for name in registry_distill.variants(row)]
    skipped = ("_debug", "c1-1", "c1-4")
    return [name for name in names if not any(word in name for word in skipped) and not ("toy" in name and "replayed" in name)]


@pytest.mark.slow
def test_every_experiment_can_be_planned():
    registry_distill.register()
    names = planned_names()
    assert len(names) > 30
    for name in names:
        run = compose_run([f"experiment={name}"], world_size=None, require_inputs=False)
        model = run.config.model.config
        job = plan_job(run, ranks=max(model.fsdp_shard_size, run.config.model_parallel.context_parallel_size))
        found = predict(job, H200)
        assert 0 < found.state_bytes < found.peak and found.seconds > 0, name
        assert sum(phase.share for phase in found.phases) == pytest.approx(1)
        assert job.net("student").elements() == parameter_count(model.net)
        assert {phase.role for phase in found.phases} == {net.role for net in job.nets if net.trained}
        assert {step.role for phase in job.phases for step in phase.passes} == {net.role for net in job.nets}, name


def test_the_command_explains_and_proposes(tmp_path, capsys):
    assert main([SCM, "gpus=32", "--json", str(tmp_path / "plan.json"), "gpu=h100", "global_batch=32"]) == 0
    told = capsys.readouterr().out
    for part in (
        "student optimiser",
        "causal teacher (infer)",
        "student's tangent",
        "gathered parameters",
        "as configured:",
        "proposed",
        "=> needs",
    ):
        assert part in told, part
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["configured"]["layout"]["fsdp_shard_size"] == 32 and record["proposed"]["fits"]
    keys = dict(key.split("=") for key in record["proposed"]["keys"])
    # the keys are the config's own
    run = compose_run([SCM, *record["proposed"]["keys"]], world_size=32, require_inputs=False)
    layout = plan_job(run, ranks=32)
    assert layout.global_batch == 32 and layout.shard_ranks == int(keys["model.config.fsdp_shard_size"])
    assert predict(layout, H200).peak == pytest.approx(record["proposed"]["peak_bytes"])


def test_proposed_keys_undo_a_choice_of_blocks_that_would_have_no_effect(capsys):
    words = ["experiment=toy_tf_c3-3", "model.config.net.sac_config.mode=block_wise", "model.config.net.sac_config.every_n_blocks=2"]
    assert main([*words, "--as-is"]) == 0
    assert "recompute block_wise (2 of 4 blocks)" in capsys.readouterr().out
    job = plan_job(compose_run(words), ranks=1)
    keys = words_of((), job.with_recompute("none"))
    assert compose_run([*words, *keys]).config.model.config.net.sac_config == SACConfig("none", 1)


def test_a_job_that_does_not_fit_hears_what_would(capsys):
    assert main(["experiment=causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3", "gpus=1", "memory_gib=16"]) == 0
    told = capsys.readouterr().out
    assert "nothing fits 16 GiB" in told and "what would fit" in told and "gpus=" in told
    assert "replayed_training=True" in told and "lora.rank" in told
    assert "not possible as configured: 1 ranks do not divide" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([SCM, "gpus=none"], "gpus=none must be a whole number"),
        ([SCM, "gpus=\u00b2"], "gpus=\u00b2 must be a whole number"),
        ([SCM, "gpu=v100"], "unknown gpu='v100'"),
        ([SCM, "memory_gib=much"], "memory_gib=much is not a number"),
        (["experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf"], "template"),
        ([SCM, "model.config.nett=1"], "model.config.nett"),
        ([SCM, "gpus=32", "global_batch=1"], "no layout of 32 ranks"),
        ([SCM, "gpus=3", "--as-is"], "3 ranks do not divide"),
        (
            [SCM, "gpu=a100-80", "model.config.frozen_weights=fp8"],
            "gpu=a100-80 has 8.0 and the run bfloat16; set model.config.frozen_weights=fp8_storage",
        ),
    ],
)
def test_bad_requests_say_what_to_change(capsys, words, told):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error


def small(*keys: str) -> list[str]:
    """Sizes at which states, activations and caches weigh alike."""
    sizes = {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 3, "text_dim": 64, "text_len": 16, "freq_dim": 32}
    video = ["model.config.latent_hw=[16,24]", "model.config.state_t=6"]
    return [*(f"model.config.{key}.{name}={value}" for key in keys for name, value in sizes.items()), *video, *bench_memory.ONE_CARD]


@pytest.mark.parametrize(
    ("experiment", "nets", "more"),
    [
        pytest.param(
            "tf_c3-3", ("net",), ["dataloader_train.batch_size=2", "trainer.grad_accum_iter=2"], id="accumulated", marks=pytest.mark.slow
        ),
        pytest.param("sf_dmd_2step_c3-3_replayed", ("net", "net_fake_score", "net_bidirectional_teacher"), [], id="replayed"),
    ],
)
def test_real_iterations_need_what_was_predicted(tmp_path, capsys, experiment, nets, more):
    """Through FSDP2 and the training step, on the CPU with the plain formulas: within 10
    percent.
    """
    words = [f"experiment=causal_wan2pt1_1pt3B_res480p_t2v_{experiment}", *small(*nets), *more]
    assert bench_memory.main(["--case", "small", "--json", str(tmp_path / "rows.json"), *words]) == 0
    assert "RANDOM weights" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["role"] for row in rows} == ({"student", "fake_score"} if len(nets) > 1 else {"student"})
    for row in rows:
        assert row["predicted_peak"] == pytest.approx(row["peak"], rel=0.1), row


def test_predictions_of_the_named_cases(capsys):
    assert bench_memory.main(["--predict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("GiB" in line for line in lines)


def test_a_layout_that_the_run_refuses_is_not_proposed():
    """The fastest layout that fits keeps results of products, which compiled code does not have."""
    words = ["experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_c3-3", "model.config.compile=True"]
    search = Search(lambda more: compose_run([*words, *more], world_size=None, require_inputs=False))
    job, card = search.job((), ranks=1), H200
    assert propose(job, card).best.job.net("student").recompute in KEEP_PRODUCTS
    best = search.found(card, ranks=1).proposal.best
    assert best.job.net("student").recompute not in KEEP_PRODUCTS
    compose_run([*words, *words_of((), best.job)], world_size=1, require_inputs=False)
    taken = [laid for laid in layouts(job) if not search.refusal((), laid)]
    assert best.seconds == min(found.seconds for found in (predict(laid, card) for laid in taken) if found.fits)


EXACT = ["experiment=toy_sf_dmd_c3-3", "model.config.gan={loss_scale:0.01,r1:exact}", "model.config.attention_backend=reference"]
EXACT += ["model.config.fused_layers=off", "model.config.precision=float32"]


def test_a_run_that_takes_no_layout_says_why(capsys):
    assert main([*EXACT, "gpus=2"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: this run takes no layout of 2 ranks: model.config.gan.r1=exact")
    assert "not possible as configured: model.config.gan.r1=exact" in told.out
    for words, why in {
        "gpus=3": "goes through 1, 2, 4, 8 cards of h100, h200, l40s, rtx4090; choose gpus= and gpu=",
        "gpu=h20": "choose gpus= and gpu= among them",
        "memory_gib=24": "memory_gib=24 has no effect with --smallest",
    }.items():
        assert main([*EXACT, "--smallest", words]) == 2
        assert why in capsys.readouterr().err
    assert main([*EXACT, "--smallest"]) == 0
    assert "1 x rtx4090" in capsys.readouterr().out
