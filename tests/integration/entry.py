"""The training entry point at the smallest size: overrides of a run, checkpoints to start from, and
what a run left behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcm.configs import cli
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.convert import to_wan
from rcm.nets.wan.model import WanDiT
from rcm.train.export import read_weights
from tests.support.tiny_checkpoint import LATENT_SHAPE

FRAMES = {"c1-1": 3, "c3-3": 6, "c1-4": 9}
"""Pattern to latent frames: two blocks or more, and no more than that."""

SIZES = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 1, "in_dim": 4, "out_dim": 4, "text_dim": 8, "text_len": 4, "freq_dim": 16}
ROLES = ("net", "net_teacher", "net_causal_teacher", "net_bidirectional_teacher", "net_fake_score")


def small(job: Path, *, frames: int = 6, iterations: int = 3, roles: Iterable[str] = ("net",)) -> list[str]:
    """Overrides that shrink any toy experiment: one layer of width 32, latents of 4 x frames x 4 x
    4, deterministic random data, files below `job`'s parent in a folder of `job`'s name. `roles`:
    networks of the run; they all get the same sizes.
    """
    return [
        "data=fake",
        *(f"model.config.{role}.{size}={value}" for role in roles for size, value in SIZES.items()),
        "model.config.state_ch=4",
        f"model.config.state_t={frames}",
        "model.config.latent_hw=[4,4]",
        "model.config.tokenizer.name=wan",
        "model.config.text_encoder_class=umT5",
        "dataloader_train.batch_size=1",
        "dataloader_train.num_videos=5",
        "optimizer.weight_decay=0",
        "scheduler.warm_up_steps=1",
        f"trainer.max_iter={iterations}",
        "trainer.logging_iter=1",
        "trainer.progress_bar=False",
        "checkpoint.save_iter=1000",
        f"job.output_root={job.parent}",
        "job.project=",
        "job.group=",
        f"job.name={job.name}",
    ]


def launch(*overrides: str) -> int:
    """Exit code of the training command with these words, run in this process."""
    return cli.main(overrides)


def train_on(shards: Path, job: Path, experiment: str, *more: str, iterations: int = 2) -> int:
    """Exit code of training a tiny network on shards of latents of `tiny_checkpoint`."""
    sizes = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 1, "text_dim": 24, "freq_dim": 16}
    return cli.main(
        [
            f"experiment={experiment}",
            f"dataloader_train.tar_path_pattern={shards}/*.tar",
            *(f"model.config.net.{key}={value}" for key, value in sizes.items()),
            f"model.config.state_t={LATENT_SHAPE[1]}",
            "dataloader_train.batch_size=2",
            f"trainer.max_iter={iterations}",
            "trainer.logging_iter=1",
            "trainer.progress_bar=False",
            f"job.output_root={job.parent}",
            "job.project=",
            "job.group=",
            f"job.name={job.name}",
            *more,
        ]
    )


def write_network(path: Path, *, seed: int = 0, **sizes: int) -> Path:
    """A file of random weights under `net.*`, with no zero anywhere (the output head included), for
    a network of `SIZES` and `sizes`.
    """
    net = WanDiT(WanConfig(**{**SIZES, **sizes}))
    generator = torch.Generator().manual_seed(seed)
    state = {name: random_like(value, generator) for name, value in net.state_dict().items()}
    save_file({f"net.{name}": value for name, value in state.items()}, path)
    return path


def random_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep activations near unit size: matrices by fan-in, gains around 1, the rest
    small.
    """
    draw = torch.randn(value.shape, generator=generator)
    return 1 + 0.2 * draw if value.dim() == 1 and value.mean() == 1 else draw * (value.shape[-1] ** -0.5 if value.dim() == 2 else 0.3)


def lines(job: Path) -> list[dict[str, float]]:
    """What was logged, without the clock."""
    records = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def weights(job: Path, role: str = "reg") -> dict[str, Tensor]:
    """Full weights of a job's newest checkpoint ("reg", "ema" or "fake_score")."""
    return read_weights(job, weights=role)


def stored(path: Path) -> dict[str, Tensor]:
    """Weights in a file of `write_network`, under the network's own names."""
    return to_wan(load_file(path))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def everything(job: Path) -> dict[str, Tensor]:
    """All that the newest checkpoint of a job holds, by part and key: weights, averages, optimiser
    slots, counts, data position.
    """
    latest = job / "checkpoints" / (job / "checkpoints/latest_checkpoint.txt").read_text().strip()
    found: dict[str, Tensor] = {}
    for part in sorted(path for path in latest.iterdir() if path.is_dir()):
        entries = dcp.FileSystemReader(str(part)).read_metadata().state_dict_metadata
        tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
        if tensors:
            dcp.load(tensors, checkpoint_id=str(part), no_dist=True)
        found |= {f"{part.name}/{key}": value for key, value in tensors.items()}
    return found
