"""Words that users of the release type mean what they meant, later words win, and a word without a
meaning is refused with the reason.
"""

from __future__ import annotations

import pytest

from rcm.configs.compose import options
from rcm.configs.convert import get_key, known_paths
from rcm.configs.release_words import CALLBACKS, CHOICES, REFUSED, RENAMED
from rcm.configs.schema import TrainConfig
from rcm.core.errors import ConfigError

M = "model.config."
TF, WAN = "experiment=toy_tf_c3-3", "experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_c3-3"
RCM = "experiment=wan2pt1_1pt3B_res480p_t2v_rCM"

MEANT = [
    (TF, ["optimizer=fusedadamw"], {"optimizer.type": "fusedadamw"}),
    (TF, ["optimizer=fusedadamw", "optimizer.lr=3e-4"], {"optimizer.lr": 3e-4}),
    (RCM, ["optimizer_fake_score=fusedadamw"], {M + "optimizer_fake_score.lr": 4e-7}),
    (TF, ["ema=power"], {M + "ema.enabled": True}),
    (TF, [M + "ema.enabled=False", "ema=power"], {M + "ema.enabled": True}),
    (TF, ["ema=power", M + "ema.enabled=False"], {M + "ema.enabled": False}),
    (TF, ["checkpoint=local", "checkpoint.save_iter=7"], {"checkpoint.save_iter": 7}),
    (TF, ["scheduler=lambdalinear", "ckpt_type=dcp_distill", "trainer=distill", "conditioner=text_nodrop"], {}),
    (WAN, ["tokenizer=wan2pt1_tokenizer"], {M + "tokenizer.name": "wan"}),
    (TF, ["tokenizer=wan2pt1_tokenizer"], {M + "tokenizer.name": "wan"}),
    (WAN, ["data_train=webdataset"], {"dataloader_train.kind": "latents"}),
    (WAN, ["data_train=fake"], {"dataloader_train.kind": "fake"}),
    (WAN, ["net=wan2pt1_14B_t2v"], {M + "net.preset": "14B"}),
    (RCM, ["net_teacher=wan2pt1_14B_t2v"], {M + "net_teacher.preset": "14B"}),
    (RCM, ["net=wan2pt1_14B_t2v", "net=wan2pt1_1pt3B_t2v_jvp"], {M + "net.preset": "1.3B"}),
    (WAN, ["callbacks=[viz_online_sampling_distill]"], {"trainer.sampling.every_n": 5000, "trainer.sampling.ema_every_n": 5000}),
    (TF, ["callbacks=viz_online_sampling_distill"], {"trainer.sampling.every_n": 5000}),
    (RCM, ["callbacks=[basic,viz_online_sampling_distill]"], {"trainer.sampling.every_n": 500}),
    (RCM, ["callbacks=[basic]"], {"trainer.callbacks.heart_beat.every_n": 10, "trainer.callbacks.device_monitor.every_n": 50}),
    (RCM, ["callbacks=[basic]", "trainer.logging_iter=7"], {"trainer.callbacks.device_monitor.every_n": 7}),
    (RCM, ["trainer.callbacks.heart_beat.every_n=3", "callbacks=[basic]"], {"trainer.callbacks.heart_beat.every_n": 3}),
    (TF, ["callbacks=[dataloading_speed]"], {"trainer.callbacks.heart_beat.every_n": 0, "trainer.callbacks.device_monitor.every_n": 0}),
    (RCM, ["trainer.callbacks.every_n_sample_reg.every_n=9"], {"trainer.sampling.every_n": 9, "trainer.sampling.ema_every_n": 500}),
    (RCM, ["trainer.callbacks.every_n_sample_ema.every_n=9"], {"trainer.sampling.every_n": 500, "trainer.sampling.ema_every_n": 9}),
    (RCM, ["++trainer.callbacks.every_n_sample_reg.run_at_start=False"], {"trainer.sampling.run_at_start": False}),
    (TF, ["optimizer={lr: 3e-4}"], {"optimizer.lr": 3e-4}),
]
"""Experiment, words, what the config then says."""


@pytest.mark.parametrize(("experiment", "words", "said"), MEANT, ids=lambda value: "_".join(value) if isinstance(value, list) else "")
def test_meant(composed, experiment, words, said) -> None:
    config = composed(experiment, *words).config
    assert {key: get_key(config, key) for key in said} == said


def test_words_that_say_nothing_change_nothing(composed) -> None:
    words = ("optimizer=fusedadamw", "scheduler=lambdalinear", "ema=power", "checkpoint=local", "callbacks=[dataloading_speed]")
    assert composed(RCM, *words).config == composed(RCM).config


@pytest.mark.parametrize(("mode", "expected"), [(None, "online"), ("offline", "offline"), ("disabled", "disabled")])
def test_wandb_is_on_unless_the_environment_says_how(composed, monkeypatch, mode, expected) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert composed(TF, "callbacks=[basic,wandb]").config.job.wandb_mode == expected
    assert composed(TF, "callbacks=[wandb]", "job.wandb_mode=disabled").config.job.wandb_mode == "disabled"


@pytest.mark.parametrize("group", CHOICES)
def test_unknown_choices_list_the_known_ones(composed, group) -> None:
    with pytest.raises(ConfigError, match=f"unknown {group}='adamw8bit'; choose from {', '.join(CHOICES[group])}"):
        composed(TF, f"{group}=adamw8bit")


REFUSALS = [
    ("callbacks=[basic,wnadb]", r"unknown callbacks='wnadb'; choose from basic, dataloading_speed, viz_online"),
    ("callbacks=null", r"callbacks is chosen by name: callbacks=basic"),
    ("callbacks=[]", r"callbacks is chosen by name"),
    ("callbacks=[1]", r"callbacks is chosen by name"),
    ("net=wan2pt1_2B_t2v", r"unknown net='wan2pt1_2B_t2v'; choose from .*wan2pt1_14b"),
    ("optimizer=null", r"unknown optimizer=None; choose from fusedadamw"),
    ("+optimizer=fusedadamw", r"write optimizer=NAME without \+"),
    ("trainer.callbacks.heart_beat.every_n=-1", r"trainer.callbacks.heart_beat.every_n=-1 must be at least 0"),
    ("trainer.callbacks.heart_beat.update_interval_in_minute=3", r"update_interval_in_minute=3.0 has no effect while its every_n=0"),
    ("trainer.callbacks.device_monitor.log_memory_detail=False", r"log_memory_detail=False has no effect while its every_n=0"),
    ("trainer.callbacks.hart_beat.every_n=3", r"key 'trainer.callbacks.hart_beat.every_n'; did you mean trainer.callbacks.heart_beat"),
]


@pytest.mark.parametrize(("word", "message"), REFUSALS, ids=lambda value: value.partition("=")[0])
def test_refused(composed, word, message) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(TF, word)


@pytest.mark.parametrize("key", REFUSED)
def test_what_has_no_meaning_says_why(composed, key) -> None:
    for word in (f"{key}=1", f"++{key}.enabled=true"):
        with pytest.raises(ConfigError, match=f"'{key}.*' of the release has no meaning here: ") as caught:
            composed(TF, word)
        assert "\n" not in str(caught.value)


def test_the_tables_name_keys_and_groups_that_exist() -> None:
    known = known_paths(TrainConfig)
    assert set(options("callbacks")) == set(CALLBACKS)
    assert not [key for key in RENAMED.values() if key not in known]
    assert not [key for key in REFUSED if key in known]
    words = [word.partition("=") for choices in CHOICES.values() for said in choices.values() for word in said]
    assert not [key for key, _, _ in words if key not in known and key != "data"]
    assert {value for key, _, value in words if key == "data"} == set(options("data"))
