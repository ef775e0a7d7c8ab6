"""Environment variables that may decide a key; one that the config sets wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rcm.configs.convert import get_key, plain, read, with_key
from rcm.configs.schema import TrainConfig
from rcm.core.errors import ConfigError

VARIABLES = {
    "IMAGINAIRE_OUTPUT_ROOT": ("job.output_root", "outputs"),
    "WANDB_MODE": ("job.wandb_mode", "disabled"),
    "WANDB_PROJECT": ("job.wandb_project", "{project}"),
    "WANDB_ENTITY": ("job.wandb_entity", ""),
    "RCM_ATTENTION_BACKEND": ("model.config.attention_backend", "auto"),
    "RCM_FLEX_BACKEND": ("model.config.flex_backend", "auto"),
}
"""Variable -> (key that it may decide, value when neither is set). Secrets are not read."""


@dataclass(frozen=True)
class EnvironmentUse:
    """A variable that was set, its key, the value used, and who decided."""

    variable: str
    key: str
    value: str
    decided_by: str


def apply_environment(
    config: TrainConfig, environ: Mapping[str, str]
) -> tuple[TrainConfig, tuple[EnvironmentUse, ...]]:
    """`config` with empty keys filled from `environ` or a fallback, and what each variable did."""
    uses = []
    for variable, (key, fallback) in VARIABLES.items():
        configured, given = get_key(config, key), environ.get(variable, "")
        if configured:
            value, who = configured, "config"
        elif given:
            value, who = given, "environment"
        else:
            value, who = fallback.format(project=config.job.project), "default"
        if who != "config":
            try:
                config = _with_checked(config, key, value)
            except ConfigError as error:
                raise ConfigError(f"environment variable {variable}: {error}") from error
        if given:
            uses.append(EnvironmentUse(variable, key, value, who))
    return config, tuple(uses)


def _with_checked(config: TrainConfig, key: str, value: str) -> TrainConfig:
    """`config` with a value that is read as if it stood in the config."""
    group, _, name = key.rpartition(".")
    node = get_key(config, group)
    fresh = read(type(node), {**plain(node), name: value})
    return with_key(config, key, getattr(fresh, name))
