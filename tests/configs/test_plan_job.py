"""Runs as the planner sees them: forwards of a rollout, guidance, caches."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest

from rcm.configs import registry_distill
from rcm.configs.compose import Run, compose_run
from rcm.configs.plan_job import Rollouts, plan_job
from rcm.train.planner_card import H200
from rcm.train.planner_job import Job, Pass, parameter_shapes
from rcm.train.planner_memory import PassMemory
from rcm.train.planner_time import pass_cost

SMALL = "causal_wan2pt1_1pt3B_res480p_t2v_"
ONE = ["model.config.fsdp_shard_size=1", "model_parallel.context_parallel_size=1"]


@cache
def job(experiment: str, *overrides: str, rollouts: Rollouts = "longest") -> Job:
    registry_distill.register()
    run: Run = compose_run([f"experiment={experiment}", *ONE, *overrides], world_size=None, require_inputs=False)
    return plan_job(run, ranks=1, rollouts=rollouts)


def passes(planned: Job, role: str) -> dict[str, Pass]:
    return {step.name: step for phase in planned.phases if phase.role == role for step in phase.passes}


def test_forwards_of_a_rollout_over_seven_chunks():
    """Four steps in the first chunk, two in later ones, a context pass after all but the last
    (Causal_rCM.md section 6).
    """
    longest, mean = job(SMALL + "sf_dmd_2step_c3-3"), job(SMALL + "sf_dmd_2step_c3-3", rollouts="mean")
    assert passes(longest, "fake_score")["rollout"].repeats == (5, 3, 3, 3, 3, 3, 2)
    # the last step of each has the gradient
    assert passes(longest, "student")["rollout"].repeats == (4, 2, 2, 2, 2, 2, 1)
    # 1 to 4 steps, at most 2 in later chunks
    assert passes(mean, "fake_score")["rollout"].repeats == (3.5, *(2.75,) * 5, 1.75)
    assert [phase.share for phase in mean.phases] == pytest.approx([1 / 6, 5 / 6])


def test_noisy_context_saves_the_context_pass_where_no_gradient_is_kept():
    noisy = job(SMALL + "sf_dmd_2step_noisy_ctx_c3-3", "model.config.context_from_last_step_start_chunk=0")
    clean = job(SMALL + "sf_dmd_2step_c3-3")
    critic, student = (
        (sum(passes(noisy, role)["rollout"].repeats), sum(passes(clean, role)["rollout"].repeats)) for role in ("fake_score", "student")
    )
    assert critic[0] == critic[1] - 6 and student[0] == student[1]


def test_replayed_rollouts_back_propagate_chunk_by_chunk():
    plain, replayed = job(SMALL + "sf_dmd_c3-3"), job(SMALL + "sf_dmd_c3-3_replayed")
    trained = [[step for step in planned.phases[0].passes if step.mode == "train"] for planned in (plain, replayed)]
    assert [len(steps) for steps in trained] == [1, 7] and trained[0][0].layouts == tuple(step.layouts[0] for step in trained[1])
    assert (plain.phases[0].terms, replayed.phases[0].terms) == (1, 7)
    assert job(SMALL + "tf_scm_sf_dmd_c3-3_replayed").phases[0].terms == 8


def test_rollouts_longer_than_what_is_judged():
    """Seven blocks at most, of which three are judged, ending with block 2 to 6; a chunk sees one
    block beside its own, and one sink.
    """
    longest, mean = job("toy_sf_dmd_long_c3-3"), job("toy_sf_dmd_long_c3-3", rollouts="mean")
    assert passes(longest, "fake_score")["rollout"].repeats == (5, 5, 5, 5, 5, 5, 4)
    assert passes(longest, "student")["rollout"].repeats == (5, 5, 5, 5, 4, 4, 3)
    # 1 to 4 steps; block b is in min(5, 7 - b) of 5 rollouts, from 2 on it ends one
    made = passes(mean, "fake_score")["rollout"].repeats
    assert made == pytest.approx([3.5, 3.5, 3.3, 2.6, 1.9, 1.2, 0.5])
    last = passes(longest, "student")["rollout's last steps"]
    assert [layout.frame_index for layout in last.layouts] == [(12, 13, 14), (15, 16, 17), (18, 19, 20)]
    assert last.cached == (2 + 1) * 3 + 9
    assert job("toy_sf_dmd_long_c3-3_replayed").phases[0].terms == 3


def test_two_times_take_the_passes_of_one():
    """TF-MeanFlow's are TF-sCM's; the student has the embedding of the second time beside its other
    parameters.
    """
    two, one = (job(f"toy_{kind}_c3-3") for kind in ("tf_meanflow", "tf_scm"))
    assert two.phases == one.phases
    (student, teacher), width = (net.config for net in two.nets), 160
    assert student.two_times and not teacher.two_times
    counts = [sum(math.prod(shape) for _, shape in parameter_shapes(config)) for config in (student, teacher)]
    assert counts[0] - counts[1] == (64 + 1 + width + 1) * width


def test_a_fake_score_that_nobody_asks_is_in_no_plan():
    """As in training, which builds none."""
    nets = job("toy_rCM", "model.config.loss_scale_dmd=0").nets
    assert {net.role for net in nets} == {"student", "teacher"}


def test_a_discriminator_looks_at_real_videos_and_passes_gradients_back():
    """Two looks at a real video, to the last block that is read; a gradient to the input alone in
    student phases. Nothing else moves.
    """
    plain, gan = job(SMALL + "sf_dmd_c3-3"), job(SMALL + "sf_dmd_c3-3", "model.config.gan={loss_scale:0.01,blocks:[3,15]}")
    whole, looks = passes(plain, "fake_score")["fake score"], passes(gan, "fake_score")["fake score"]
    assert looks == replace(whole, layouts=whole.layouts * 3, reach=(40, 16, 16))
    asked = passes(gan, "student")["fake score"]
    assert asked.inputs and asked == replace(passes(plain, "student")["fake score"], mode="train", inputs=True)
    assert gan.net("fake_score") == replace(plain.net("fake_score"), head=2 * (2 * 5120 + 5121 * 256) + 2 * 256 + 1)
    exact = job("toy_sf_dmd_c3-3", "model.config.gan={loss_scale:0.01,r1:off}")
    assert passes(exact, "fake_score")["fake score"].reach == (4, 4)
    costs = [{step.role: pass_cost(found, H200, step).flops for step in found.phases[0].passes} for found in (plain, gan)]
    # forward, recomputed, and the gradient of the input: as dear for products, dearer for attention
    assert 3 < costs[1]["fake_score"] / costs[0]["fake_score"] < 4.5
    assert costs[1]["student"] == costs[0]["student"]


def test_guidance_doubles_the_teachers_passes():
    for scale, count in ((3.0, 2.0), (1.0, 1.0)):
        teacher = passes(job(SMALL + "tf_scm_c3-3", f"model.config.causal_guidance={scale}"), "student")["causal teacher"]
        assert teacher.repeats == (count,)
    dcm = job(SMALL + "tf_dcm_c3-3", "model.config.dcm_skipping_interval_steps=3")
    assert passes(dcm, "student")["causal teacher"].repeats == (6.0,)


@pytest.mark.parametrize(("net", "bytes_per_frame"), [("wan2pt1_1pt3b", 287_539_200), ("wan2pt1_14b", 1_277_952_000)])
def test_cache_bytes_are_the_published_ones(net, bytes_per_frame):
    """docs/reference/wan.md#cost: keys and values of a latent frame in all layers, bfloat16,
    480p.
    """
    planned = job(SMALL + "sf_dmd_c3-3", f"net={net}")
    (cache,) = PassMemory(planned, passes(planned, "fake_score")["rollout"]).held()
    assert cache.bytes == 21 * bytes_per_frame
    shared = replace(planned, ranks=4, context=4, shard=4)
    (cache,) = PassMemory(shared, passes(shared, "fake_score")["rollout"]).held()
    assert cache.bytes == 21 * bytes_per_frame / 4


@pytest.mark.parametrize(
    ("fd_type", "modes"), [(0, ["tangent"]), (1, ["tangent", "infer"]), (2, ["infer"])], ids=["exact", "semi-continuous", "discrete"]
)
def test_finite_differences_of_the_bidirectional_tangent(fd_type, modes):
    planned = job("wan2pt1_1pt3B_res480p_t2v_rCM", f"model.config.fd_type={fd_type}", "model.config.time_precision=float32")
    found = [step for step in planned.phases[0].passes if step.name.startswith("student's")]
    assert [step.mode for step in found] == modes
    assert sum(sum(step.repeats or (1,)) for step in found) == (1 if fd_type == 0 else 2)
