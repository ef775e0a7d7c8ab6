"""The registry of published and toy experiments: what `--config=rcm/configs/registry_distill.py`
names.

Rows are YAML files in `configs/experiment`. `register()` puts the base config, the parts and every
variant of every row into Hydra's ConfigStore; importing this module does nothing. A registry of
your own is a Python file with a `register()` that calls this one and then `add_row(...)` or
ConfigStore itself.

Names: a causal row is a template (no block pattern) and runs as `ROW_c1-1`, `ROW_c3-3`, `ROW_c1-4`,
then optionally `_replayed`, then optionally `_debug`. `_replayed` exists for self-forced rows
alone: the other stages have no rollout to replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

import rcm
from rcm.configs.convert import plain, read
from rcm.configs.network import NETS
from rcm.configs.release_words import CALLBACKS
from rcm.configs.schema import MODEL_VARIANTS, TrainConfig
from rcm.configs.schema_common import NetConfig
from rcm.core.errors import ConfigError

PATTERNS = ("c1-1", "c3-3", "c1-4")
EXTRA_NETS = NETS[1:]


@dataclass(frozen=True)
class Row:
    """One YAML file of `configs/experiment`, and which suffixes it takes.

    `causal` rows need a pattern; `replayable` rows have a self-forced rollout; `tangent` rows train
    with the JVP (their debug variant shortens the warm-up).
    """

    name: str
    causal: bool = True
    replayable: bool = False
    tangent: bool = False


def _rows() -> tuple[Row, ...]:
    small, toy = "causal_wan2pt1_1pt3B_res480p_t2v_", "toy_"
    rows = [
        Row("wan2pt1_1pt3B_res480p_t2v_rCM", causal=False, tangent=True),
        Row("wan2pt1_14B_res480p_t2v_rCM", causal=False, tangent=True),
        Row("causal_wan2pt1_14B_res480p_t2v_tf"),
        Row("causal_wan2pt1_14B_res480p_t2v_df"),
        Row("wan2pt1_14B_res480p_t2v_rCM_lora", causal=False, tangent=True),
        Row("causal_wan2pt1_14B_res480p_t2v_tf_dcm_lora"),
        Row("toy_bidirectional", causal=False),
        Row("toy_rCM", causal=False, tangent=True),
        Row("toy_rCM_lora", causal=False, tangent=True),
    ]
    for prefix in (small, toy):
        rows += [Row(prefix + stage) for stage in ("tf", "df", "tf_kd", "df_kd", "tf_dcm")]
        rows += [Row(prefix + stage, tangent=True) for stage in ("tf_scm", "tf_dscm")]
        rows += [
            Row(prefix + "sf_dmd" + preset, replayable=True)
            for preset in ("", "_1step", "_2step", "_2step_noisy_ctx")
        ]
        rows += [Row(prefix + "tf_scm_sf_dmd", replayable=True, tangent=True)]
        rows += [Row(prefix + "tf_dcm_lora"), Row(prefix + "sf_dmd_lora", replayable=True)]
    rows += [Row("toy_sf_dmd_long", replayable=True), Row("toy_sf_dmd_gan", replayable=True)]
    rows += [Row("toy_tf_meanflow", tangent=True)]
    return tuple(rows)


ROWS = _rows()
"""Every row of `configs/experiment`, in the order in which they are listed."""


def config_dir() -> Path:
    """The folder of YAML files: `rcm/_configs` of a wheel, `configs` of a source tree."""
    package = Path(rcm.__file__).resolve().parent
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(
        f"no train.yaml in {package / '_configs'} nor in {package.parent / 'configs'};"
        " reinstall rcm"
    )


def variants(row: Row) -> tuple[str, ...]:
    """Runnable experiment names of a row."""
    names = [f"{row.name}_{pattern}" for pattern in PATTERNS] if row.causal else [row.name]
    if row.replayable:
        names += [f"{name}_replayed" for name in names]
    return tuple(name + suffix for name in names for suffix in ("", "_debug"))


def experiment_names() -> tuple[str, ...]:
    """Runnable names of all rows; templates are not among them."""
    return tuple(name for row in ROWS for name in variants(row))


def add_row(row: Row, *, body: dict | None = None) -> None:
    """Store the variants of `row`; `body` is the row itself where it has no YAML file.
    `ConfigError` for a name that has one.
    """
    if body is not None:
        if (config_dir() / "experiment" / f"{row.name}.yaml").exists():
            raise ConfigError(f"{row.name} is an experiment of the package; choose another name")
        _put("experiment", row.name, body)
    names: dict[str, dict | None] = {row.name: None}
    if row.causal:
        names = {
            f"{row.name}_{p}": {"defaults": [row.name, {"override /pattern": p}, "_self_"]}
            for p in PATTERNS
        }
    if row.replayable:
        replayed = {"model": {"config": {"replayed_training": True}}}
        names |= {
            f"{name}_replayed": {"defaults": [name, "_self_"], **replayed} for name in list(names)
        }
    for name, node in names.items():
        if node is not None:
            _put("experiment", name, node)
        _put("experiment", f"{name}_debug", {"defaults": [name, "_self_"], **_debug(row)})


def register() -> None:
    """Fill Hydra's ConfigStore with the base, parts and all experiments. Idempotent."""
    base = plain(TrainConfig())
    del base["model"]
    ConfigStore.instance().store(name="base", node=base, provider="rcm")
    for name, cls in MODEL_VARIANTS.items():
        _put("model", name, {"name": name, "config": plain(cls())}, package="model")
    for path in sorted((config_dir() / "net").glob("*.yaml")):
        body: Any = OmegaConf.to_container(OmegaConf.load(path))
        node = plain(read(NetConfig, body, path=f"net/{path.name}"))
        for group in EXTRA_NETS:
            _put(group, path.stem, node, package=f"model.config.{group}")
    for name, body in CALLBACKS.items():
        _put("callbacks", name, dict(body))
    for row in ROWS:
        add_row(row)


class _SharedNode(ConfigNode):
    """A node of Hydra's store that copies of the store share, and that is built when it is read:
    Hydra copies the store at every composition, and a run reads a dozen of several hundred nodes.
    """

    def __init__(self, name: str, content: dict, *, group: str, package: str) -> None:
        self.__dict__ |= {"name": name, "group": group, "package": package, "provider": "rcm"}
        self._content = content

    def __getattr__(self, name: str) -> Any:
        if name != "node":
            raise AttributeError(name)
        self.node = OmegaConf.structured(self._content)
        return self.node

    def __deepcopy__(self, memo: dict) -> _SharedNode:
        return self


def _put(group: str, name: str, node: dict, *, package: str = "_global_") -> None:
    stored = ConfigStore.instance().repo.setdefault(group, {})
    stored[f"{name}.yaml"] = _SharedNode(f"{name}.yaml", node, group=group, package=package)


def _debug(row: Row) -> dict:
    """25 iterations with all events early, random weights for want of others
    (docs/reference/training.md#experiments).
    """
    config = {"allow_random_init": True, **({"tangent_warmup": 8} if row.tangent else {})}
    return {
        "model": {"config": config},
        "trainer": {"max_iter": 25, "logging_iter": 2, "sampling": {"every_n": 6}},
        "checkpoint": {"save_iter": 10},
    }
