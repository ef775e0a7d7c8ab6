"""Which settings a run shares with the checkpoint it continues, and its ranks with each other."""

from __future__ import annotations

from typing import Any

from rcm.configs.convert import plain
from rcm.configs.network import NETS
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_common import M
from rcm.storage.state_dicts import flatten
from rcm.train.continuity import Settings

CHANGEABLE = (
    "optimizer.lr",
    "scheduler",
    f"{M}.optimizer_fake_score.lr",
    f"{M}.scheduler_fake_score",
    f"{M}.gan.optimizer.lr",
    f"{M}.gan.scheduler",
    f"{M}.grad_clip",
    f"{M}.grad_clip_norm",
    "trainer.grad_accum_iter",
    "trainer.nan_policy",
    "trainer.nan_sample_limit",
    "dataloader_train.batch_size",
    f"{M}.frozen_weights",
    *(f"{M}.{net}.linear_precision" for net in NETS),
    f"{M}.teacher_ckpt",
    f"{M}.causal_teacher_ckpt",
    f"{M}.bidirectional_teacher_ckpt",
    f"{M}.neg_embed_path",
    f"{M}.text_encoder_path",
)
"""What may change on the way, with a word: rates, batches, where frozen weights lie."""

FREE = (
    "job",
    "checkpoint",
    "model_parallel",
    "trainer.max_iter",
    "trainer.logging_iter",
    "trainer.sampling",
    "trainer.callbacks",
    "trainer.progress_bar",
    "trainer.profile_iter",
    "trainer.guard_tangents",
    "trainer.gradient_sync",
    "trainer.keep_gathered_gib",
    "trainer.offload",
    "trainer.deterministic",
    "dataloader_train.tar_path_pattern",
    "dataloader_train.num_workers",
    "dataloader_train.prefetch_factor",
    "dataloader_train.num_videos",
    f"{M}.allow_random_init",
    f"{M}.student_ckpt",
    f"{M}.fake_score_ckpt",
    f"{M}.fsdp_shard_size",
    f"{M}.attention_backend",
    f"{M}.flex_backend",
    f"{M}.jvp_implementation",
    f"{M}.fused_layers",
    f"{M}.compile",
    f"{M}.replayed_training",
    f"{M}.text_cache",
    f"{M}.tokenizer.vae_pth",
    *(f"{M}.{net}.sac_config" for net in NETS),
)
"""What changes numbers by rounding alone, or is compared elsewhere (data, network sizes)."""

_OF_RANK_0 = ("job.wandb_mode", "job.wandb_project", "job.wandb_entity", f"{M}.text_cache")
"""What only rank 0 uses, or what may differ from host to host."""


def continued_settings(config: TrainConfig) -> Settings:
    """What a run must share with the checkpoint that it continues."""
    return Settings(_without(FREE, config), CHANGEABLE)


def shared_by_ranks(config: TrainConfig) -> dict[str, Any]:
    """What all ranks of a launch must agree on."""
    return _without(_OF_RANK_0, config)


def _without(groups: tuple[str, ...], config: TrainConfig) -> dict[str, Any]:
    below = tuple(f"{group}." for group in groups)
    flat = flatten(plain(config))
    return {k: v for k, v in flat.items() if k not in groups and not k.startswith(below)}
