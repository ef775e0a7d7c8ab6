"""Flags of the commands that open a checkpoint which describes itself, and opening it."""

from __future__ import annotations

import argparse

import torch

from rcm.parallel.threads import settle_threads
from rcm.pipelines.described import PieceFiles
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.storage.shipped import toy_checkpoint

KINDS = {
    "ckpt": "PATH",
    "weights": "ema|reg",
    "device": "str",
    "precision": "fp32|bf16|bf16_fp32_time|fp64",
    "vae_path": "PATH",
    "text_encoder_path": "PATH",
    "tokenizer_path": "DIR",
    "text_cache": "DIR",
    "seed": "int",
    "fps": "float",
}
"""Name -> what the flag takes, as in a table of flags."""

HERE = {"default": "cuda" if torch.cuda.is_available() else "cpu"}
"""For --device."""


def piece_files(flags: argparse.Namespace) -> PieceFiles:
    """Where this machine keeps Wan's VAE and umT5."""
    return PieceFiles(
        vae=flags.vae_path,
        text_encoder=flags.text_encoder_path,
        tokenizer=flags.tokenizer_path,
        text_cache=flags.text_cache,
    )


def open_flagged(flags: argparse.Namespace) -> LoadedModel:
    """The checkpoint of --ckpt, by default the shipped one, with as many threads as it can use."""
    model = open_checkpoint(
        toy_checkpoint() if flags.ckpt is None else flags.ckpt,
        weights=flags.weights,
        device=flags.device,
        precision=flags.precision,
        files=piece_files(flags),
    )
    settle_threads(model.denoiser.net, device=model.device)
    return model
