"""A whole run, put together from records: every key a user may set, with type, default, unit and
meaning.

Records stand where they are used (`rcm.data.loader`, `rcm.train`), those of the model in
`rcm.configs.schema_common`, `schema_causal` and `schema_rcm`. Frozen dataclasses, no Hydra:
`rcm.configs.convert` reads a composed mapping into them and names unknown or mistyped keys. Keys
and defaults: docs/reference/training.md#optimiser-and-ema, #bidirectional-keys, #experiments,
#causal-keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os.path import expanduser
from typing import Literal

from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.data.loader import DataConfig
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.resume import CheckpointConfig
from rcm.train.trainer import TrainerConfig

MODEL_VARIANTS: dict[str, type[CausalConfig] | type[RCMConfig]] = {
    "fsdp_t2v_causal": CausalConfig,
    "fsdp_t2v_distill_rcm": RCMConfig,
}
"""Options of the `model` group: which class `model.config` has."""


@dataclass(frozen=True)
class JobConfig(Record):
    """Names of a run, whose files go to `<output_root>/<project>/<group>/<name>`."""

    project: str = "rcm"  # first folder below the output root, and the wandb project
    group: str = ""  # second folder, and the wandb group ("" = left out)
    name: str = ""  # third folder, and the wandb run name ("" = the experiment's name)
    output_root: str = ""  # "" = environment IMAGINAIRE_OUTPUT_ROOT, else "outputs"
    # "" = environment WANDB_MODE, else disabled
    wandb_mode: Literal["", "disabled", "offline", "online"] = ""
    wandb_project: str = ""  # "" = environment WANDB_PROJECT, else job.project
    wandb_entity: str = ""  # "" = environment WANDB_ENTITY, else wandb's own default

    def __post_init__(self) -> None:
        for key in ("project", "group", "name", "output_root"):
            text = getattr(self, key)
            if key != "output_root" and (text.startswith(("/", "~")) or ".." in text.split("/")):
                raise ConfigError(
                    f"{key}={text!r} leaves job.output_root; give a relative name without '..', or"
                    " set job.output_root"
                )
            if text.startswith("~"):  # no shell expands it behind a '='
                raise ConfigError(
                    f"{key}={text!r} would be a folder called ~; write job.{key}={expanduser(text)}"
                )
            if any(not c.isprintable() for c in text) or any(
                len(part.encode()) > 255 for part in text.split("/")
            ):
                raise ConfigError(
                    f"{key}={text[:80]!r} is no name of a folder: printable characters, at most 255"
                    " bytes between two '/'"
                )


@dataclass(frozen=True)
class ModelNode:
    """The model: which family of keys, and the keys."""

    # chosen with model=NAME (a method implies it)
    name: Literal["fsdp_t2v_causal", "fsdp_t2v_distill_rcm"] = "fsdp_t2v_causal"
    config: CausalConfig | RCMConfig = field(
        default_factory=CausalConfig, metadata={"tag": "name", "variants": MODEL_VARIANTS}
    )


@dataclass(frozen=True)
class ModelParallelConfig(Record):
    """How one sample is spread over ranks."""

    # ranks that share one sample (Ulysses); divides heads and tokens per frame
    context_parallel_size: int = within(1, least=1)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; `rcm.configs.compose.compose_run` returns it checked."""

    job: JobConfig = field(default_factory=JobConfig)
    model: ModelNode = field(default_factory=ModelNode)
    model_parallel: ModelParallelConfig = field(default_factory=ModelParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    scheduler: LambdaLinear = field(default_factory=LambdaLinear)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dataloader_train: DataConfig = field(default_factory=DataConfig)
