"""Files that a run reads: what it still lacks, and what it is given for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rcm.configs.network import networks
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_common import M

_TEACHERS = ("teacher_ckpt", "causal_teacher_ckpt", "bidirectional_teacher_ckpt")


def missing_inputs(config: TrainConfig) -> list[str]:
    """What the run needs from outside and lacks, one sentence per key."""
    model = config.model.config
    weights = dict.fromkeys((*model.checkpoints(), "student_ckpt", "fake_score_ckpt"))
    paths = {f"{M}.{key}": getattr(model, key) for key in weights}
    paths["checkpoint.load_path"] = config.checkpoint.load_path
    paths |= {f"{M}.{key}": getattr(model, key) for key in ("neg_embed_path", "text_encoder_path")}
    absent = (
        f"{key}={path!r} does not exist"
        for key, path in paths.items()
        if path and not Path(path).exists()
    )
    return [*_unset(config), *absent]


def _unset(config: TrainConfig) -> Iterator[str]:
    """Keys that must be given and are empty."""
    model, data = config.model.config, config.dataloader_train
    if not model.allow_random_init:
        for key, why in model.checkpoints().items():
            if not getattr(model, key):
                yield (
                    f"{M}.{key} is empty: {why} (or {M}.allow_random_init=True to start from random"
                    " weights)"
                )
    no_text = not model.text_encoder_path and model.text_encoder_class == "umT5"
    if data.kind in ("latents", "prompts"):
        if not data.tar_path_pattern:
            yield (
                f"dataloader_train.tar_path_pattern is empty: data={data.kind} reads its shards"
                " there (data=fake needs none)"
            )
        if model.guided and not model.neg_embed_path and no_text:
            yield (
                f"{M}.neg_embed_path is empty: guidance needs the negative prompt's embedding, as"
                " `rcm data build --source teacher --write_negative_embedding FILE` writes it (or"
                f" {M}.text_encoder_path)"
            )
    if data.kind == "prompts" and no_text:
        yield (
            f"{M}.text_encoder_path is empty: data=prompts has text alone, which umT5 must encode"
            " (data=latents has embeddings)"
        )
    if data.kind == "toy" and model.learns_trajectories:
        yield (
            "dataloader_train.kind=toy has no ODE trajectories, which"
            f" training_type={model.stage} learns from: data=toy_shards with shards of"
            " scripts.build_ode_pairs (data=fake for a dry run)"
        )


def unread_files(config: TrainConfig) -> list[str]:
    """Keys that name a file or folder which nothing in this run reads: a sentence each."""
    model = config.model.config
    unread = [key for key in _TEACHERS if key not in model.checkpoints()]
    if "net_fake_score" not in networks(model):
        unread.append("fake_score_ckpt")
    if not model.guided:
        unread.append("neg_embed_path")
    files = {f"{M}.{key}": getattr(model, key, "") for key in unread}
    told = "is not read by the stage and networks of this run"
    return [f"{key}={file} {told}" for key, file in files.items() if file]
