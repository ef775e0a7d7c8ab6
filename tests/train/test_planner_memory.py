"""The planner's bytes against allocations of the real methods at full size, counted without
memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from rcm.configs import registry_distill
from rcm.configs.compose import Run, compose_run
from rcm.configs.network import networks
from rcm.configs.plan_job import plan_job
from rcm.configs.schema_common import CommonModelConfig
from rcm.configs.schema_gan import GanConfig
from rcm.nets.wan.config import PRESETS
from rcm.nets.wan.model import WanDiT
from rcm.parallel.checkpointing import MODES, SACConfig
from rcm.train.memory_trace import MemoryTrace
from rcm.train.planner import predict
from rcm.train.planner_card import H200
from rcm.train.planner_job import Job, NetPlan, Pass, PhasePlan, numbers, parameter_shapes
from rcm.train.planner_memory import gathered_terms, gradient_terms, held_terms
from tests.support.weightless import silence_kernels, traced_peak

SMALL = "causal_wan2pt1_1pt3B_res480p_t2v_"
LONGEST = 3
"""Index of the update with four rollout steps."""


@cache
def composed(*overrides: str) -> Run:
    registry_distill.register()
    return compose_run(overrides, world_size=None, require_inputs=False)


def unsharded(run: Run) -> Job:
    """One rank with bfloat16 throughout, so that nothing is FSDP2's."""
    plain = plan_job(replace_layout(run), ranks=1, rollouts="longest")
    return replace(plain, param_bytes=2, compute_bytes=2, reduce_bytes=2)


def replace_layout(run: Run) -> Run:
    parallel = replace(run.config.model_parallel, context_parallel_size=1)
    run = replace(run, config=replace(run.config, model_parallel=parallel))
    return with_model(run, replace(run.config.model.config, fsdp_shard_size=1))


def with_model(run: Run, model: CommonModelConfig) -> Run:
    return replace(run, config=replace(run.config, model=replace(run.config.model, config=model)))


CASES = [
    (SMALL + "tf_c3-3", "student", {"layers": 6}),
    (SMALL + "tf_c3-3", "student", {"mode": "none"}),
    (SMALL + "tf_c1-1", "student", {"mode": "mm_only"}),
    ("causal_wan2pt1_14B_res480p_t2v_df_c1-4", "student", {"mode": "mm_only"}),
    (SMALL + "tf_c3-3", "student", {"mode": "block_wise_keep_attention"}),
    (SMALL + "tf_c3-3", "student", {"mode": "block_wise_keep_attention_mlp"}),
    (SMALL + "tf_c3-3", "student", {"layers": 7, "every": 3}),
    (SMALL + "tf_c3-3", "student", {"layers": 6, "mode": "block_wise_keep_attention", "every": 4}),
    (SMALL + "sf_dmd_c3-3", "student", {"mode": "mm_only", "every": 2}),
    (SMALL + "tf_dcm_c3-3", "student", {}),
    (SMALL + "tf_scm_c3-3", "student", {}),
    (SMALL + "sf_dmd_2step_c3-3", "student", {}),
    (SMALL + "sf_dmd_c1-4", "student", {"mode": "none"}),
    (SMALL + "sf_dmd_c3-3_replayed", "student", {}),
    (SMALL + "sf_dmd_c3-3", "fake_score", {}),
    (SMALL + "sf_dmd_c3-3", "student", {"gan": GanConfig(loss_scale=0.01)}),
    (SMALL + "sf_dmd_c3-3_replayed", "student", {"gan": GanConfig(loss_scale=0.01)}),
    (SMALL + "sf_dmd_c3-3", "fake_score", {"layers": 4, "gan": GanConfig(loss_scale=0.01, blocks=(1,))}),
    ("wan2pt1_1pt3B_res480p_t2v_rCM", "student", {}),
    ("wan2pt1_14B_res480p_t2v_rCM", "student", {"cm_type": "dcm"}),
    ("wan2pt1_14B_res480p_t2v_rCM", "fake_score", {"mode": "mm_only"}),
    *((SMALL + "tf_dcm_lora_c3-3", "student", {"mode": mode}) for mode in MODES),
    (SMALL + "sf_dmd_lora_c3-3", "student", {}),
    ("wan2pt1_14B_res480p_t2v_rCM_lora", "student", {}),
    ("wan2pt1_14B_res480p_t2v_rCM_lora", "fake_score", {}),
]
"""Experiment, whose iteration, and: `layers` of every network, its recompute `mode` of `every` so
many blocks, another `cm_type`, a `gan`.
"""


@pytest.mark.parametrize(("experiment", "role", "changes"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_activations_of_the_real_methods(monkeypatch, experiment, role, changes):
    """Peak beside the weights, gradients in bfloat16 included, at full width and length, within 8
    percent.
    """
    silence_kernels(monkeypatch)
    run = composed(f"experiment={experiment}")
    model, layers = run.config.model.config, changes.get("layers", 2)
    nets = {}
    for key, net in networks(model).items():
        sac = SACConfig(changes.get("mode", net.sac_config.mode), changes.get("every", 1))
        nets[key] = replace(net, num_layers=layers, sac_config=sac)
    more = {key: changes[key] for key in ("cm_type", "gan") if key in changes}
    run = with_model(run, replace(model, tangent_warmup=0, fsdp_shard_size=1, **nets, **more))
    found = predict(unsharded(run), H200)
    phase = next(phase for phase in found.phases if phase.role == role)
    assert phase.peak - found.state_bytes == pytest.approx(traced_peak(run, role, index=LONGEST), rel=0.08)


@pytest.mark.parametrize(("preset", "count"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584), ("A14B", 14_288_901_184)])
@pytest.mark.parametrize("shard", [1, 4, 7, 32])
def test_parameter_bytes_are_exact(preset, count, shard):
    net = NetPlan("student", PRESETS[preset], trained=True, averaged=True)
    with torch.device("meta"):
        shapes = WanDiT(PRESETS[preset]).state_dict().values()
    # what FSDP2 leaves on rank 0
    first = sum(tensor.chunk(shard, dim=0)[0].numel() for tensor in shapes)
    assert net.elements() == count and net.elements(shard=shard) == first
    assert 0.97 < numbers(net.config).blocks / count < 1
    job = Job("job", (net, replace(net, role="teacher", trained=False)), (), 1, ranks=2 * shard, shard=shard)
    sizes = [term.bytes for term in held_terms(job, "card")]
    assert sizes == [4 * first, 8 * first, 4 * first, 2 * first]


def test_adapters_lie_on_one_base():
    """14B rCM with adapters of rank 64 on one rank: one frozen base, two sets of factors with
    optimisers, one average.
    """
    job = plan_job(replace_layout(composed("experiment=wan2pt1_14B_res480p_t2v_rCM_lora")), ranks=1)
    rank, (dim, hidden) = job.net("student").rank, (5120, 13824)
    factors = 40 * rank * (8 * 2 * dim + 2 * (dim + hidden))
    assert rank and job.net("student").trained_elements() == factors
    found = {term.name: term.bytes for term in held_terms(job, "card")}
    assert found.pop("student weights") == 2 * 14_288_491_584
    assert found == {
        "student adapters": 4 * factors,
        "student optimiser": 8 * factors,
        "student average": 4 * factors,
        "fake_score adapters": 4 * factors,
        "fake_score optimiser": 8 * factors,
    }


def tiny_job(**changes) -> Job:
    from rcm.nets.layout import TokenLayout

    student = NetPlan("student", PRESETS["tiny"], trained=True, averaged=True)
    step = Pass("student", "student", "train", (TokenLayout.bidirectional(3, grid=(2, 5)),))
    return replace(Job("tiny", (student,), (PhasePlan("student", (step,)),), latent_elements=16 * 3 * 4 * 10), **changes)


def test_a_network_of_one_block_is_gathered_once():
    job = tiny_job(ranks=2, keep_gathered=10**9)
    net, phase = replace(job.nets[0], config=replace(PRESETS["tiny"], num_layers=1)), replace(job.phases[0], rollout=True)
    job = replace(job, nets=(net,), phases=(phase,))
    terms = {term.name: term.bytes for term in gathered_terms(job, phase, phase.passes[0])}
    assert terms == {"gathered parameters": 2 * net.elements(), "student kept gathered": 0}


def test_a_case_computed_by_hand():
    """Tiny network, width 64, hidden 128, 2 layers of 4 heads of 16, one sample of 30 tokens,
    bfloat16, one rank, nothing recomputed.
    """
    count = sum(torch.Size(shape).numel() for _, shape in parameter_shapes(PRESETS["tiny"]))
    block = sum(torch.Size(shape).numel() for name, shape in parameter_shapes(PRESETS["tiny"]) if name.startswith("blocks.0."))
    block_stored = 30 * 2 * ((1 + 16) * 64 + 2 * 128)
    # time matrices, text, last rows, head's rows
    around = 4 * 7 * 64 * 64 + 16 * 2 * (32 + 3 * 64) + 30 * 2 * 64 + 4 * 30 * 64
    head = 30 * 2 * 64 + 4 * 30 * 64
    in_block = 30 * 2 * ((1 + 18) * 64 + 3 * 128)
    tables = 4 * 30 * 3 * 16
    gathered = 2 * (2 * block + count - 2 * block)
    latents = 8 * 4 * 16 * 3 * 4 * 10
    last = block_stored + around - head + in_block + 4 * block
    # gradients of the second block, and on their way
    first = 4 * 7 * 64 * 64 + 16 * 2 * (32 + 3 * 64) + in_block + 4 * block + 4 * block
    found = predict(tiny_job(), H200)
    assert found.state_bytes == 16 * count
    assert found.peak - found.state_bytes == gathered + latents + tables + max(last, first)


def test_more_of_anything_costs_more():
    base = predict(composed_job(), H200)
    assert predict(composed_job(batch=2), H200).peak > base.peak
    # gradients wait whole for the last micro-batch
    assert predict(composed_job(accumulation=2), H200).peak > base.peak
    wider = {name: predict(composed_job(ranks=8, shard=shard, context=cp), H200) for name, (shard, cp) in LAYOUTS.items()}
    assert wider["8x1"].state_bytes < wider["4x1"].state_bytes < wider["1x1"].state_bytes
    assert wider["4x4"].peak < wider["4x2"].peak < wider["4x1"].peak
    modes = [predict(composed_job().with_recompute(mode), H200) for mode in reversed(MODES)]
    assert all(a.peak < b.peak and a.seconds > b.seconds for a, b in pairwise(modes))


LAYOUTS = {"1x1": (1, 1), "4x1": (4, 1), "8x1": (8, 1), "4x2": (4, 2), "4x4": (4, 4)}


@cache
def base_job() -> Job:
    return plan_job(replace_layout(composed(f"experiment={SMALL}tf_c3-3")), ranks=1)


def composed_job(**changes) -> Job:
    return replace(base_job(), **changes)


def test_the_trace_counts_what_is_alive():
    x = torch.zeros(1000)
    trace = MemoryTrace([x])
    with trace.watching():
        y = x + 1
        view = y.view(10, 100)
        del y
        assert trace.current == 8000  # the view keeps its storage
        del view
        assert (trace.current, trace.peak) == (4000, 8000)
        trace.reset_peak()
        big = torch.empty(500)
        big.untyped_storage().resize_(0)
        assert (trace.current, trace.peak) == (4000, 6000)


def test_gradients_reduced_after_every_term_are_shards():
    """trainer.gradient_sync=each: nothing is ever held whole; the difference is the whole gradient
    less a shard of it.
    """
    run = composed("experiment=wan2pt1_14B_res480p_t2v_rCM")
    each = plan_job(run, ranks=64)
    assert each.gradient_sync == "each"
    last = replace(each, gradient_sync="last")
    phase = next(phase for phase in each.phases if phase.role == "student" and phase.terms > 1)
    whole, shard = 4 * 14_288_491_584, 4 * each.net("student").elements(shard=32)
    assert gradient_terms(last, phase, earlier=True)[0] == whole
    assert gradient_terms(each, phase, earlier=True)[:2] == (shard, shard)
    assert gradient_terms(each, phase, earlier=False)[0] == 0
