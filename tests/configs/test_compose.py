"""What composition hands over: values, precedence, the record; and the conversion under it."""

from __future__ import annotations

import dataclasses

import pytest

from rcm.configs.build import description
from rcm.configs.convert import known_paths, plain, read
from rcm.configs.network import parameter_count, wan_config
from rcm.configs.schema import ModelNode, TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import NetConfig, TokenizerConfig
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import ConfigError
from rcm.diffusion.time_sampling import TimeLawConfig

M = "model.config."
TF = "experiment=toy_tf_c3-3"


def test_command_line_wins_over_experiment(composed) -> None:
    config = composed(TF, "optimizer.lr=3e-4", M + "p_G={law:lognormal,p_mean:0.5,shift:5.0}", "trainer.max_iter=1e3").config
    assert config.optimizer.lr == 3e-4
    assert config.model.config.p_G == TimeLawConfig(law="lognormal", p_mean=0.5)
    assert config.trainer.max_iter == 1000
    assert isinstance(config.trainer.max_iter, int)


def test_the_last_experiment_is_the_one_and_names_the_run(composed) -> None:
    run = composed("experiment=toy_tf_c3-3", "experiment=toy_df_c1-1")
    assert (run.experiment, run.config.job.name) == ("toy_df_c1-1", "toy_df_c1-1")
    assert run.config.model.config.stage == "df"


def test_keys_may_carry_a_plus(composed) -> None:
    assert composed(TF, "++trainer.max_iter=3").config.trainer.max_iter == 3


def test_fractions_are_numbers(composed) -> None:
    config = composed("experiment=toy_sf_dmd_c3-3", M + "backward_timesteps=[15/16,3/4,1/8]").config
    assert config.model.config.backward_timesteps == (15 / 16, 3 / 4, 1 / 8)


def test_shift3_is_resolved_into_times(composed) -> None:
    assert composed("experiment=toy_sf_dmd_c3-3", M + "shift3_backward=True").config.model.config.backward_timesteps == (0.9, 0.75, 0.5)


def test_families_of_keys(composed) -> None:
    assert isinstance(composed("experiment=toy_rCM").config.model.config, RCMConfig)
    assert isinstance(composed(TF).config.model.config, CausalConfig)


def test_consistency_alone(composed) -> None:
    assert composed("experiment=toy_rCM", M + "net_fake_score=null").config.model.config.net_fake_score is None


def test_the_result_is_frozen_and_the_run_is_named(composed) -> None:
    run = composed(TF, "job.group=demo")
    assert (run.config.job.project, run.config.job.group, run.config.job.name) == ("rcm", "demo", "toy_tf_c3-3")
    assert composed(TF, "job.name=2026").config.job.name == "2026"
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.config.trainer.max_iter = 1


@pytest.mark.parametrize(
    ("variable", "key", "value", "other", "fallback"),
    [
        ("IMAGINAIRE_OUTPUT_ROOT", "job.output_root", "disk", "mine", "outputs"),
        ("RCM_ATTENTION_BACKEND", M + "attention_backend", "sdpa", "reference", "auto"),
        ("RCM_FLEX_BACKEND", M + "flex_backend", "triton", "flash", "auto"),
        ("WANDB_MODE", "job.wandb_mode", "offline", "online", "disabled"),
        ("WANDB_PROJECT", "job.wandb_project", "theirs", "ours", "rcm"),
        ("WANDB_ENTITY", "job.wandb_entity", "team", "me", ""),
    ],
)
def test_config_wins_over_environment_and_the_record_says_so(composed, variable, key, value, other, fallback) -> None:
    def used(run):
        node = run.config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    # it has no effect elsewhere
    base = (TF, M + "attention_backend=flex") if variable == "RCM_FLEX_BACKEND" else (TF,)
    assert used(composed(*base)) == fallback
    assert not composed(*base).environment
    by_environment = composed(*base, environ={variable: value})
    assert used(by_environment) == value
    assert [dataclasses.astuple(u) for u in by_environment.environment] == [(variable, key, value, "environment")]
    by_config = composed(*base, f"{key}={other}", environ={variable: value})
    assert used(by_config) == other
    assert [u.decided_by for u in by_config.environment] == ["config"]
    assert by_config.record()["environment"][0]["value"] == other


def test_a_bad_variable_is_named(composed) -> None:
    with pytest.raises(ConfigError, match=r"environment variable RCM_ATTENTION_BACKEND: attention_backend='fast' must be one of"):
        composed(TF, environ={"RCM_ATTENTION_BACKEND": "fast"})


def test_a_variable_without_effect_is_refused(composed) -> None:
    with pytest.raises(ConfigError, match=r"flex_backend=flash \(or RCM_FLEX_BACKEND\) has no effect with attention_backend=sdpa"):
        composed(TF, M + "attention_backend=sdpa", environ={"RCM_FLEX_BACKEND": "flash"})


def test_compiled_blocks_and_a_compiled_attention_exclude_each_other(composed) -> None:
    with pytest.raises(ConfigError, match=r"attention_backend=flex_triton compiles a kernel of its own, which model.config.compile=True"):
        composed(TF, M + "attention_backend=flex_triton", M + "compile=True")


def test_no_secret_enters_the_record(composed) -> None:
    assert "hunter2" not in composed(TF, environ={"WANDB_API_KEY": "hunter2"}).to_yaml()


def test_record_reads_back(composed) -> None:
    run = composed("experiment=toy_sf_dmd_2step_noisy_ctx_c3-3_replayed")
    assert read(TrainConfig, run.record()["config"]) == run.config


def test_every_default_reads_back() -> None:
    for config in (CausalConfig(), RCMConfig(), TrainConfig()):
        assert read(type(config), plain(config)) == config


def test_a_tagged_group_needs_its_tag() -> None:
    with pytest.raises(ConfigError, match=r"name=None must be one of fsdp_t2v_causal, fsdp_t2v_distill_rcm"):
        read(ModelNode, {"config": {}})


def test_known_paths_reach_optional_groups_and_both_families() -> None:
    known = known_paths(TrainConfig)
    assert {
        "model.config.net_fake_score.dim",
        "model.config.cm_type",
        "model.config.chunk_t",
        "model.config.net_teacher.sac_config.mode",
    } <= set(known)


def test_net_numbers_replace_those_of_the_preset() -> None:
    wan = wan_config(NetConfig(preset="1.3B", num_layers=2))
    assert (wan.num_layers, wan.dim) == (2, 1536)


@pytest.mark.parametrize(("preset", "count"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_parameter_counts_on_meta(preset: str, count: int) -> None:
    """docs/reference/wan.md#sizes."""
    assert parameter_count(NetConfig(preset=preset)) == count


EXTREMES = {
    "toy_tf_c1-1": {
        "causal_guidance": (0, 1000), "sample_timestep_shift": (0.001, 1000), "sigma_max": (1e-300, 1e9), "net.max_frames": (9, 2**14),
        "tokenizer.gain": (1e-300, 1e6), "tokenizer.boost": (1e-300, 1e6), "tokenizer.centre": (-1e6, 1e6), "net.num_layers": (1, 1000),
    },
    "toy_bidirectional": {"bidirectional_guidance": (0, 1000), "sample_timestep_shift": (0.001, 1000)},
}  # fmt: skip


@pytest.mark.parametrize("experiment", EXTREMES)
def test_checkpoints_can_be_opened_at_the_ends_of_every_number_they_tell(composed, experiment: str) -> None:
    for end in (0, 1):
        words = [f"model.config.{key}={ends[end]}" for key, ends in EXTREMES[experiment].items()]
        description(composed(f"experiment={experiment}", *words))
    for key, (_, most) in EXTREMES[experiment].items():
        *group, name = key.split(".")
        node = {"net": NetConfig, "tokenizer": TokenizerConfig}[group[0]] if group else CausalConfig
        with pytest.raises(ConfigError, match=rf"{name}=.* must be (at most|in 1 to)"):
            node(**{name: most + 1})


@pytest.mark.parametrize(
    ("word", "why"), [("latent_hw=[4096,4096]", "latent_shape .* more than"), ("sigma_max=10", "raise sigma_max above 15")]
)
def test_what_no_checkpoint_can_tell_is_refused_before_training(composed, word: str, why: str) -> None:
    """What is accepted alone and cannot be sampled together."""
    with pytest.raises(ConfigError, match=f"this run cannot be described: .*{why}"):
        composed("experiment=toy_sf_dmd_c1-1", f"model.config.{word}")
