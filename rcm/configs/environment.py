"""Environment variables that may decide a key. A key that the config sets wins; the record says who
decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rcm.configs.convert import get_key, plain, read
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
"""Variable -> (the key it may decide, the value when neither is set). Secrets such as WANDB_API_KEY
are never read here.
"""


@dataclass(frozen=True)
class EnvironmentUse:
    """One variable that was set: the key, the value used, and whether the environment or the config
    decided.
    """

    variable: str
    key: str
    value: str
    decided_by: str


def apply_environment(
    config: TrainConfig, environ: Mapping[str, str]
) -> tuple[TrainConfig, tuple[EnvironmentUse, ...]]:
    """Fill keys left empty from `environ`, then from their fallback. Returns the config and a line
    per variable that was set.
    """
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
                config = _set(config, key.split("."), value)
            except ConfigError as error:
                raise ConfigError(f"environment variable {variable}: {error}") from error
        if given:
            uses.append(EnvironmentUse(variable, key, value, who))
    return config, tuple(uses)


def _set(node: Any, names: list[str], value: str) -> Any:
    if len(names) > 1:
        return replace(node, **{names[0]: _set(getattr(node, names[0]), names[1:], value)})
    # validates the value as if it stood in the config
    fresh = read(type(node), {**plain(node), names[0]: value})
    return replace(node, **{names[0]: getattr(fresh, names[0])})
