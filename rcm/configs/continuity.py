"""Which settings a run shares with the checkpoint it continues, and its ranks with each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rcm.configs.convert import plain
from rcm.configs.network import NETS
from rcm.configs.schema import TrainConfig
from rcm.train.continuity import Settings

M = "model.config"

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
"""What a run may change on the way, with a word: rates and batches, and where frozen weights lie
(they may have been moved).
"""

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
    "trainer.offload",
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
    f"{M}.text_cache",
    f"{M}.tokenizer.vae_pth",
    *(f"{M}.{net}.sac_config" for net in NETS),
)
"""What changes no number of the training but by rounding, or is compared elsewhere (data by their
fingerprint, networks by their sizes).
"""

_OF_RANK_0 = ("job.wandb_mode", "job.wandb_project", "job.wandb_entity", f"{M}.text_cache")
"""What only rank 0 uses, or what may differ from host to host."""


def continued_settings(config: TrainConfig) -> Settings:
    """What a run must share with the checkpoint that it continues."""
    return Settings(
        {key: value for key, value in _flat(plain(config)) if not _below(key, FREE)}, CHANGEABLE
    )


def shared_by_ranks(config: TrainConfig) -> dict[str, Any]:
    """What all ranks of a launch must agree on."""
    return {key: value for key, value in _flat(plain(config)) if not _below(key, _OF_RANK_0)}


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from _flat(value, key)
        else:
            yield key, value


def _below(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
