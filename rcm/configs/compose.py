"""Command-line overrides -> a resolved, checked, frozen `Run`. Every refusal names the key.

Order: read the overrides, refuse unknown keys and options, compose with Hydra, convert into the
schema, fill in what the environment decides, check fields against each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rcm import __version__
from rcm.configs import registry_distill
from rcm.configs.checks import check, check_mesh
from rcm.configs.convert import known_paths, plain, read, suggestions, unknown_key
from rcm.configs.dead_keys import paths_of, refuse_switched_off, typed_keys, unread_keys
from rcm.configs.description import description
from rcm.configs.environment import EnvironmentUse, apply_environment
from rcm.configs.inputs import missing_inputs, unread_files
from rcm.configs.overrides import parse_overrides
from rcm.configs.release_words import refusal
from rcm.configs.schema import MODEL_VARIANTS, TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import M
from rcm.core.errors import ConfigError

SHIFT3_TIMES = (0.9, 0.75, 0.5)
"""`shift3_backward`: shift 3 of 3/4, 1/2, 1/4."""


@dataclass(frozen=True)
class Run:
    """What a launch asked for.

    config       the resolved and checked config.
    experiment   its name, "" if none was chosen.
    registry     the registry module or file that provided it.
    overrides    the command line's overrides.
    environment  which variables decided a key, and which were overruled.
    mesh         (dp_replicate, dp_shard, cp) for the world size it was composed for.
    missing      files the run still needs (empty unless composed with `require_inputs=False`).
    unread       sentences on files that are named, and keys that were typed, and that the run reads
                 nowhere.
    """

    config: TrainConfig
    experiment: str
    registry: str
    overrides: tuple[str, ...]
    environment: tuple[EnvironmentUse, ...]
    mesh: tuple[int, int, int]
    missing: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Everything as plain dicts and lists, for the run's folder and its checkpoints."""
        return {
            "experiment": self.experiment,
            "registry": self.registry,
            "overrides": list(self.overrides),
            "rcm_version": __version__,
            "mesh": list(self.mesh),
            "environment": plain(self.environment),
            "config": plain(self.config),
        }

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.record()))


def compose_run(
    overrides: Sequence[str],
    *,
    registry: str = registry_distill.__name__,
    world_size: int | None = 1,
    environ: Mapping[str, str] | None = None,
    require_inputs: bool = True,
) -> Run:
    """`Run` for overrides such as `["experiment=toy_tf_c3-3", "trainer.max_iter=10"]`; the registry
    must be registered.

    `world_size` None skips the check of ranks (for tables). `require_inputs` False lists missing
    checkpoints and data in `Run.missing` instead of raising. Raises `ConfigError`.
    """
    parsed = parse_overrides(overrides)
    _refuse_unknown(parsed)
    composed = _compose([_for_hydra(override) for override in parsed])
    _refuse_other_family(composed)
    config = read(TrainConfig, composed)
    # as of other words, the last one counts
    named = (o.value() for o in reversed(parsed) if o.key_or_group == "experiment")
    experiment = str(next(named, ""))
    typed = typed_keys(parsed)
    config, environment = apply_environment(
        _resolve(config, experiment, typed), os.environ if environ is None else environ
    )
    check(config)
    refuse_switched_off(config, typed, known=known_paths(TrainConfig))
    mesh = check_mesh(config, world_size=world_size) if world_size else (0, 0, 0)
    missing = tuple(missing_inputs(config))
    if missing and require_inputs:
        raise ConfigError(f"{experiment or 'this run'} cannot start: {'; '.join(missing)}")
    unread = (*unread_files(config), *unread_keys(config, typed))
    run = Run(config, experiment, registry, tuple(overrides), environment, mesh, missing, unread)
    description(run)  # refuses now what no checkpoint could tell of
    return run


def groups() -> list[str]:
    """Names of all config groups: folders of YAML files and groups in Hydra's ConfigStore."""
    folders = [p.name for p in registry_distill.config_dir().iterdir() if p.is_dir()]
    stored = [name for name, node in ConfigStore.instance().repo.items() if isinstance(node, dict)]
    return sorted({*folders, *stored} - {"hydra"})


def options(group: str) -> list[str]:
    """Options of a config group, sorted; templates included for `experiment`."""
    files = [p.stem for p in (registry_distill.config_dir() / group).glob("*.yaml")]
    stored = ConfigStore.instance().repo.get(group, {})
    return sorted({*files, *(name.removesuffix(".yaml") for name in stored)})


def _refuse_unknown(parsed: Sequence[Override]) -> None:
    known, choosable = known_paths(TrainConfig), groups()
    for override in parsed:
        key = override.key_or_group
        if override.package is not None:
            raise ConfigError(
                f"{key}@{override.package} cannot be chosen: what is below {key} has its one place;"
                f" write {key}=... without @{override.package}"
            )
        if key in choosable:
            _refuse_unknown_option(key, override)
            continue
        for path in paths_of(key, override.value()):
            if why := refusal(path):
                raise ConfigError(why)
            if path not in known:
                raise unknown_key(path, known_keys=[*known, *choosable])
        if override.is_add():
            raise ConfigError(f"write {key}=... without +: no key can be added")


def _refuse_unknown_option(group: str, override: Override) -> None:
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"write {group}=NAME without +")
    name, choices = override.value(), options(group)
    if group == "callbacks" and isinstance(name, list) and name:
        name = next((one for one in name if one not in choices), name[0])
    if name in choices or (name is None and group in registry_distill.EXTRA_NETS):
        return
    if not isinstance(name, str):
        raise ConfigError(f"{group} is chosen by name: {group}={'|'.join(choices[:4])}")
    if group != "experiment":
        raise ConfigError(f"unknown {group}={name!r}; choose from {', '.join(choices)}")
    plain_name = name.removesuffix("_debug").removesuffix("_replayed")
    if "_replayed" in name and plain_name in choices and not plain_name.endswith("_debug"):
        raise ConfigError(
            f"unknown experiment {name!r}: _replayed exists for self-forced experiments (sf_dmd)"
            " only, which have a rollout"
        )
    near = suggestions(name, choices, limit=4)
    hint = f"did you mean {' or '.join(near)}?" if near else "`rcm experiments` shows all"
    raise ConfigError(f"unknown experiment {name!r}; {hint}")


def _for_hydra(override: Override) -> str:
    """The override as Hydra takes it: net_fake_score=null breaks it, ~net_fake_score does not."""
    left_out = override.key_or_group in registry_distill.EXTRA_NETS and override.value() is None
    return f"~{override.key_or_group}" if left_out else str(override.input_line)


def _compose(overrides: Sequence[str]) -> Any:
    try:
        folder = str(registry_distill.config_dir())
        with initialize_config_dir(config_dir=folder, version_base="1.3"):
            composed = compose("train", overrides=list(overrides))
            return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key, why = error.full_key, str(error.msg).strip().partition("\n")[0]
        raise ConfigError(
            f"the config does not compose: {key} has no value: {why}; give it a plain one"
        ) from error
    except HydraException as error:
        refused = re.search(r"Could not override '([^']+)'", str(error))
        if refused:  # the key is known to the schema, but this run has no such group
            raise ConfigError(
                f"key {refused[1]!r} does not exist in this run: it belongs to the other model"
                " family (causal or bidirectional rCM), or to a network that is null (choose one"
                " first, as in net_fake_score=NAME)"
            ) from error
        why = str(error).partition("\n")[0]  # below it Hydra lists where it looked
        raise ConfigError(f"the config does not compose: {why}") from error


def _refuse_other_family(composed: Mapping[str, Any]) -> None:
    """`ConfigError` for keys of a model family that are left where another one was chosen."""
    node, others = composed["model"], dict(MODEL_VARIANTS)
    mine = others.pop(str(node["name"]), None)
    if mine is None or not isinstance(node["config"], dict):  # told where values are read
        return
    known = {f.name for f in fields(mine)}
    theirs = {f.name for other in others.values() for f in fields(other)} - known
    if left := sorted(theirs & node["config"].keys()):
        raise ConfigError(
            f"model={node['name']} has no key {M}.{left[0]}, which the chosen experiment or method"
            " sets; choose an experiment, a method and a model of one family"
        )


def _resolve(config: TrainConfig, experiment: str, typed: Collection[str]) -> TrainConfig:
    """Fill the run's name, and replace switches that stand for values by the values."""
    job = replace(config.job, name=config.job.name or experiment or "run")
    model = config.model.config
    if isinstance(model, CausalConfig) and model.shift3_backward:
        if f"{M}.backward_timesteps" in typed and model.backward_timesteps != SHIFT3_TIMES:
            raise ConfigError(
                f"{M}.shift3_backward=True contradicts {M}.backward_timesteps; give one of them"
            )
        model = replace(model, backward_timesteps=SHIFT3_TIMES)
    return replace(config, job=job, model=replace(config.model, config=model))
