"""Every experiment composes; names, keys and the numbers of the published rows stay as they are."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from rcm.configs import registry_distill
from rcm.configs.compose import Run, compose_run, options
from rcm.configs.convert import known_paths, plain
from rcm.configs.schema import MODEL_VARIANTS, TrainConfig
from rcm.core.errors import ConfigError

HERE = Path(__file__).parent
TF_NAMES = [n for n in registry_distill.experiment_names() if not n.endswith("_debug")]
DEBUG_NAMES = [n for n in registry_distill.experiment_names() if n.endswith("_debug")]
SMALL = "causal_wan2pt1_1pt3B_res480p_t2v_"


def golden(file: str, lines: list[str]) -> None:
    """Compare with a recorded list; RCM_UPDATE_GOLDEN=1 records it."""
    path = HERE / file
    if os.environ.get("RCM_UPDATE_GOLDEN"):
        path.write_text("\n".join(lines) + "\n")
        pytest.skip("golden file rewritten: read its diff")
    assert lines == path.read_text().splitlines()


DIGESTS = HERE / "digests.json"
FROZEN = json.loads(DIGESTS.read_text())
"""`keys`: the keys that existed when the digests were first taken. `digests`: that of every
experiment's plain config.
"""


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of a plain config; a group stands for itself as {}, so that its presence
    counts.
    """
    if not isinstance(node, dict):
        return {path: node}
    found = {path: {}} if path else {}
    for key, value in node.items():
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


def digest(run: Run) -> str:
    """SHA-256 of the composed config as canonical JSON.

    Keys that were added since the freeze count only where they differ from their default: adding a
    key moves no digest, while a value that an experiment composes to cannot change unseen. (A
    default of a newer key is held by override_keys.txt.)
    """
    family = MODEL_VARIANTS[run.config.model.name]
    defaults = {**known_paths(TrainConfig), **known_paths(family, path="model.config")}
    old = set(FROZEN["keys"])
    kept = {k: v for k, v in leaves(plain(run.config)).items() if k in old or v != ({} if _is_group(defaults[k]) else plain(defaults[k]))}
    return sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _run(name: str) -> Run:
    return compose_run([f"experiment={name}"], environ={}, world_size=None, require_inputs=False)


def test_a_digest_is_recorded_for_every_experiment() -> None:
    if os.environ.get("RCM_UPDATE_GOLDEN"):
        taken = {name: digest(_run(name)) for name in sorted(registry_distill.experiment_names())}
        DIGESTS.write_text(json.dumps({"keys": FROZEN["keys"], "digests": taken}, indent=0) + "\n")
        pytest.skip("golden file rewritten: no line of an older experiment may have changed")
    assert set(FROZEN["digests"]) == set(registry_distill.experiment_names())


def _repeats(name: str) -> bool:
    """Whether one experiment of the row differs in its block pattern alone."""
    return "_c1-4" in name or "_c1-1_replayed" in name


def _composes(name: str) -> None:
    run = _run(name)
    assert run.experiment == run.config.job.name == name
    assert digest(run) == FROZEN["digests"][name], f"{name} composes to another config than the recorded one"
    model = run.config.model.config
    for suffix, sizes in (("c1-1", (1, 1)), ("c3-3", (3, 3)), ("c1-4", (1, 4))):
        if f"_{suffix}" in name:
            assert (model.first_chunk_t, model.chunk_t) == sizes
    assert getattr(model, "replayed_training", False) == ("_replayed" in name)
    assert (run.config.trainer.max_iter == 25) == name.endswith("_debug")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * _repeats(name)) for name in TF_NAMES])
def test_every_experiment_composes(name: str) -> None:
    _composes(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEBUG_NAMES)
def test_every_debug_variant_composes(name: str) -> None:
    _composes(name)


@pytest.mark.parametrize("name", [f"{SMALL}sf_dmd_2step_c3-3_replayed_debug", "wan2pt1_14B_res480p_t2v_rCM_debug", "toy_tf_scm_c1-4_debug"])
def test_debug_variants_of_each_family_compose(name: str) -> None:
    _composes(name)


def test_experiment_names_are_the_recorded_ones() -> None:
    golden("experiments.txt", sorted(registry_distill.experiment_names()))


def test_rows_and_files_are_the_same() -> None:
    files = {p.stem for p in (registry_distill.config_dir() / "experiment").glob("*.yaml")}
    assert files == {row.name for row in registry_distill.ROWS}
    assert set(options("experiment")) == files | set(registry_distill.experiment_names())


def test_every_row_says_how_it_is_run() -> None:
    for path in (registry_distill.config_dir() / "experiment").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# @package _global_\n# ")
        assert f"experiment={path.stem}" in text
        if not path.stem.startswith("toy_"):
            assert "Cost:" in text
            assert "Expected" in text or "Its use" in text


def test_override_keys_and_defaults_are_the_recorded_ones() -> None:
    lines = []
    for variant, cls in MODEL_VARIANTS.items():
        lines += [f"{variant} {k} = {plain(v)!r}" for k, v in known_paths(cls, path="M").items() if not _is_group(v)]
    rest = {k: v for k, v in known_paths(TrainConfig).items() if not k.startswith("model.config")}
    lines += [f"{k} = {plain(v)!r}" for k, v in rest.items() if not _is_group(v)]
    golden("override_keys.txt", sorted(lines))


def _is_group(value: object) -> bool:
    return hasattr(value, "__dataclass_fields__")


MODEL_KEYS = """
fsdp_shard_size net.sac_config.mode cm_type net_fake_score loss_scale loss_scale_dmd dmd_fix_timesteps training_type
replayed_training first_chunk_t chunk_t context_from_last_step context_from_last_step_start_chunk
sf_simulation_steps_per_chunk sf_backward_timestep_schedules backward_timesteps student_ckpt teacher_ckpt
causal_teacher_ckpt bidirectional_teacher_ckpt fake_score_ckpt tokenizer.vae_pth text_encoder_path neg_embed_path
optimizer_fake_score.lr ema.enabled ema.rate ema.iteration_shift tangent_warmup teacher_guidance grad_clip sigma_max p_G
p_D student_update_freq sigma_data precision fd_type fd_size max_simulation_steps_fake state_ch state_t resolution
rectified_flow_t_scaling_factor use_rf_scm dcm_total_steps dcm_skipping_interval_steps dcm_timestep_shift
text_encoder_class input_data_key input_latent_key input_caption_key bidirectional_guidance causal_guidance
loss_scale_fake_score sample_timestep_shift shift3_backward df_timestep_strategy loss_weighting
"""
OTHER_KEYS = """
model_parallel.context_parallel_size trainer.max_iter trainer.grad_accum_iter trainer.logging_iter optimizer.lr
optimizer.weight_decay optimizer.betas optimizer.eps scheduler.warm_up_steps scheduler.f_start scheduler.f_max
scheduler.f_min checkpoint.save_iter checkpoint.load_path checkpoint.load_training_state
dataloader_train.tar_path_pattern dataloader_train.batch_size dataloader_train.num_workers job.project job.group
job.name
"""


def test_every_public_key_exists() -> None:
    """docs/reference/training.md: keys that users know must keep working."""
    public = {f"model.config.{key}" for key in MODEL_KEYS.split()} | set(OTHER_KEYS.split())
    assert len(public) > 60
    assert not public - set(known_paths(TrainConfig))


ROW_NUMBERS = {
    "wan2pt1_1pt3B_res480p_t2v_rCM": {
        "optimizer.lr": 2e-6,
        "optimizer.betas": (0.0, 0.999),
        "optimizer.weight_decay": 0.01,
        "M.optimizer_fake_score.lr": 4e-7,
        "M.p_G.p_mean": 0.7,
        "M.p_D.law": "uniform_shift",
        "M.student_update_freq": 5,
        "M.tangent_warmup": 1000,
        "M.state_t": 20,
        "M.sigma_max": 80.0,
        "M.fsdp_shard_size": 4,
        "model_parallel.context_parallel_size": 1,
        "M.net.sac_config.mode": "block_wise",
        "checkpoint.save_iter": 500,
        "trainer.max_iter": 100_000,
        "trainer.logging_iter": 50,
        "M.teacher_guidance": 5.0,
        "trainer.sampling.run_at_start": True,
    },
    "wan2pt1_14B_res480p_t2v_rCM": {
        "optimizer.lr": 1e-6,
        "M.optimizer_fake_score.lr": 1e-7,
        "M.p_G.p_mean": 1.5,
        "M.student_update_freq": 10,
        "M.tangent_warmup": 0,
        "M.state_t": 21,
        "M.sigma_max": 200.0,
        "M.fsdp_shard_size": 32,
        "model_parallel.context_parallel_size": 8,
        "M.net.sac_config.mode": "mm_only",
        "checkpoint.save_iter": 250,
        "M.net_teacher.preset": "14B",
    },
    SMALL + "tf_c3-3": {
        "optimizer.lr": 1e-5,
        "optimizer.betas": (0.9, 0.999),
        "M.p_G.law": "uniform_shift",
        "M.p_G.shift": 5.0,
        "M.loss_weighting": "gaussian_bell",
        "M.fsdp_shard_size": 4,
        "checkpoint.save_iter": 1000,
        "trainer.sampling.every_n": 5000,
        "M.state_t": 21,
        "M.ema.rate": 0.1,
    },
    SMALL + "df_c1-1": {"M.training_type": "df", "M.loss_weighting": "none", "M.df_timestep_strategy": "random"},
    "causal_wan2pt1_14B_res480p_t2v_tf_c1-4": {
        "M.net.preset": "14B",
        "M.fsdp_shard_size": 32,
        "model_parallel.context_parallel_size": 8,
        "M.net.sac_config.mode": "block_wise",
        "checkpoint.save_iter": 500,
        "trainer.sampling.every_n": 2500,
    },
    "causal_wan2pt1_14B_res480p_t2v_df_c1-4": {"M.net.sac_config.mode": "mm_only"},
    SMALL + "tf_dcm_c3-3": {
        "optimizer.lr": 2e-6,
        "optimizer.betas": (0.0, 0.999),
        "M.net_causal_teacher.preset": "14B",
        "M.causal_guidance": 3.0,
        "M.dcm_total_steps": 48,
        "M.sample_timestep_shift": 3.0,
        "M.fsdp_shard_size": 32,
        "model_parallel.context_parallel_size": 4,
        "checkpoint.save_iter": 500,
    },
    SMALL + "tf_scm_c1-1": {"M.p_G.law": "lognormal", "M.p_G.p_mean": -0.8, "M.p_G.p_std": 1.6, "M.tangent_warmup": 1000},
    SMALL + "sf_dmd_c1-1": {
        "optimizer.lr": 2e-6,
        "M.optimizer_fake_score.lr": 4e-7,
        "M.optimizer_fake_score.betas": (0.0, 0.999),
        "M.student_update_freq": 6,
        "M.max_simulation_steps_fake": 4,
        "M.net_bidirectional_teacher.preset": "14B",
        "M.net_fake_score.preset": "14B",
        "M.net.preset": "1.3B",
        "M.bidirectional_guidance": 5.0,
        "M.backward_timesteps": (15 / 16, 5 / 6, 5 / 8),
        "checkpoint.save_iter": 50,
        "trainer.sampling.every_n": 50,
        "trainer.sampling.ema_every_n": 100,
        "M.sigma_max": 1600.0,
    },
    SMALL + "sf_dmd_1step_c1-1": {
        "M.sf_simulation_steps_per_chunk": (4, 1),
        "M.sf_backward_timestep_schedules": ((15 / 16, 5 / 6, 5 / 8), ()),
    },
    SMALL + "sf_dmd_2step_c3-3": {
        "M.sf_simulation_steps_per_chunk": (4, 2),
        "M.sf_backward_timestep_schedules": ((15 / 16, 5 / 6, 5 / 8), (5 / 6,)),
    },
    SMALL + "sf_dmd_2step_noisy_ctx_c3-3": {
        "M.sf_backward_timestep_schedules": ((15 / 16, 5 / 6, 5 / 8), (5 / 8,)),
        "M.context_from_last_step": True,
        "M.context_from_last_step_start_chunk": 1,
    },
}


@pytest.mark.parametrize("name", ROW_NUMBERS)
def test_published_rows_have_the_published_numbers(name: str) -> None:
    """docs/reference/training.md#experiments, Causal_rCM.md section 10."""
    config = compose_run([f"experiment={name}"], environ={}, world_size=None, require_inputs=False).config
    for key, expected in ROW_NUMBERS[name].items():
        node: object = config
        for part in key.replace("M.", "model.config.", 1).split("."):
            node = getattr(node, part)
        assert node == expected, key


@pytest.mark.parametrize("name", [row.name for row in registry_distill.ROWS if row.causal])
def test_bare_causal_names_refuse_to_run(name: str) -> None:
    with pytest.raises(ConfigError, match=r"template.*first_chunk_t=0, chunk_t=0.*_c1-1, _c3-3 or _c1-4"):
        compose_run([f"experiment={name}"], environ={}, world_size=None, require_inputs=False)


def test_a_pattern_can_also_be_chosen_as_a_part() -> None:
    run = compose_run(["experiment=toy_tf", "pattern=c1-4"], environ={}, world_size=1)
    assert (run.config.model.config.first_chunk_t, run.config.model.config.chunk_t) == (1, 4)
