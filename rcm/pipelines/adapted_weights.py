"""Weights with a low-rank update, added while they are read: an update of anybody's that is merged
(`MergedWeights`), and a network that this package keeps as adapters on another checkpoint
(`AdaptedWeights`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.wan.lora import RUN_HEAD, LoRAPair, check_targets, lora_pairs, merge
from rcm.nets.wan.lora_settings import LoRASettings, lora_settings
from rcm.pipelines.described import description_of
from rcm.pipelines.weight_files import open_weights
from rcm.storage.digest import DigestedWeights
from rcm.storage.json_file import read_object
from rcm.storage.state_dicts import LazyWeights
from rcm.storage.weight_files import WeightFile

_COPIES = {"net_ema.": "ema", "net.": "live", "net_fake_score.": "fake_score"}


@dataclass(frozen=True)
class LoRA:
    """A low-rank update to merge: its file or PEFT folder, the strength of the merge, and alpha
    (None: that of the file, of its metadata or of its adapter_config.json, else the rank, so that
    the strength alone counts). `again`: also into a network that holds it already. Raises
    `ConfigError` for a number that is not finite.
    """

    path: str | Path
    scale: float = 1.0
    alpha: float | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or not math.isfinite(self.alpha or 0.0):
            raise ConfigError(
                f"LoRA {self.path} with scale {self.scale:g}, alpha {self.alpha or 0:g}: both must"
                " be finite (--lora, --lora_alpha)"
            )


class MergedWeights(LazyWeights):
    """`base` with a low-rank update added while it is read, in float32 on `device`. Raises
    `CheckpointError` naming the LoRA's file for a target that the network does not have, factors of
    another shape, or an update that is part of the network already.
    """

    def __init__(
        self, base: LazyWeights, lora: LoRA, *, device: torch.device | str = "cpu"
    ) -> None:
        self.base, self.lora, self.device = base, lora, device
        self.headers = base.headers
        self._file = open_weights(lora.path)
        self.sources = base.sources + self._file.sources
        try:
            self.pairs: dict[str, LoRAPair] = lora_pairs(self._file.headers)
            check_targets(self.pairs, self._file.headers, base.headers)
            described = self.description = description_of(self._file)
            if described is not None and "adapters" in described.extra:
                _require_all(self.pairs, described.extra["adapters"]["layers"], base.headers)
            settings = adapter_settings(self._file, given=lora.alpha is not None)
            self.strengths = {
                name: lora.scale * self._strength(pair, settings)
                for name, pair in self.pairs.items()
            }
        except CheckpointError as error:
            raise CheckpointError(f"LoRA {lora.path}: {error}") from error
        pairs = self.pairs.values()
        self._file.require_floats(key for pair in pairs for key in (pair.down, pair.up))
        if not lora.again and (held := updates_in(base)):
            mine = self.update["digest"]
            if told := next((one for one in held if one.get("digest") == mine), None):
                raise CheckpointError(
                    f"LoRA {lora.path}: its factors are those of {told.get('path')}, which is part"
                    " of the network already; leave it out, or add it once more with rcm checkpoint"
                    " convert SOURCE TARGET --lora FILE:SCALE --merge_again"
                )

    @cached_property
    def update(self) -> dict[str, Any]:
        """What a description says of the update."""
        file, scale, alpha = str(self.lora.path), self.lora.scale, self.lora.alpha
        digest = _digest(self._file, self.pairs)
        return {"path": file, "scale": scale, "alpha": alpha, "digest": digest}

    def __getitem__(self, name: str) -> Tensor:
        weight, pair = self.base[name], self.pairs.get(name)
        if pair is None:
            return weight
        down, up = _factors(self._file, pair)
        return merge(weight.to(self.device), down=down, up=up, scale=self.strengths[name])

    def _strength(self, pair: LoRAPair, settings: LoRASettings) -> float:
        alpha = self.lora.alpha
        if alpha is None and pair.alpha is not None:
            alpha = float(self._file[pair.alpha])
            if not math.isfinite(alpha):
                raise CheckpointError(f"{pair.alpha} is {alpha:g}, expected a finite number")
        return settings.strength(
            pair.module, rank=self._file.headers[pair.down].shape[0], alpha=alpha
        )


def adapter_settings(file: WeightFile, *, given: bool = False) -> LoRASettings:
    """What a low-rank update says of its strength, in its metadata, in the adapter_config.json
    beside it, and in the description of the run that trained it; errors as `lora_settings`.
    """
    file.require_named()
    beside = (file.path if file.path.is_dir() else file.path.parent) / "adapter_config.json"
    config = file.config
    if config is None and beside.is_file():
        config = read_object(beside)
    settings = lora_settings(config, file.metadata, others=file.others, given=given)
    description = description_of(file)
    if description is None or "adapters" not in description.extra:
        return settings
    said = description.extra["adapters"]
    if settings.alpha not in (None, said["alpha"]) and not given:
        raise CheckpointError(
            f"its description says alpha {said['alpha']:g}, its settings say {settings.alpha:g};"
            " say which with --lora_alpha"
        )
    return replace(settings, alpha=said["alpha"], rank=said["rank"])


def adapter_copies(file: WeightFile, *, stated: str | None) -> dict[str, str]:
    """Prefix -> copy of every set of adapters in `file`: those of a run's checkpoint, or the only
    one ("" -> what its description states, or "unstated").
    """
    found = {
        prefix: copy
        for prefix, copy in _COPIES.items()
        if any(key.startswith(prefix) for key in file.headers)
    }
    several = found and all(key.startswith((*found, RUN_HEAD)) for key in file.headers)
    return found if several and (len(found) > 1 or stated is None) else {"": stated or "unstated"}


def chosen_copy(copies: Mapping[str, str], wanted: str, *, path: object) -> str:
    """The prefix of the `wanted` copy ("ema" takes the live one where there is no average, any word
    the only one).
    """
    for copy in ("ema", "live") if wanted == "ema" else (wanted,):
        if copy in copies.values():
            return next(prefix for prefix, held in copies.items() if held == copy)
    if list(copies) == [""]:
        return ""
    raise CheckpointError(
        f"{path} holds no {wanted} adapters (it has {', '.join(copies.values())}); choose other"
        f" weights than {wanted!r}"
    )


class AdaptedWeights(LazyWeights):
    """One set of adapters of `file`, merged into `base` in float32 (float64 for float64) as it is
    read: W + (alpha / rank) B A with W rounded as in training. `described`: `extra.adapters` of the
    file's description.

    Raises `CheckpointError` naming `file` for factors that are not as described, or that do not fit
    the base; and, once every tensor of the base has been read, for a base that is not the one the
    adapters were trained on.
    """

    def __init__(
        self,
        file: WeightFile,
        base: LazyWeights,
        described: Mapping[str, Any],
        *,
        prefix: str,
        copy: str,
        base_path: object,
    ) -> None:
        self.file, self.base, self.prefix, self.copy = file, base, prefix, copy
        self.base_path, self.sources = base_path, file.sources + base.sources
        self.described, self.told = dict(described), base_of(described, copy)
        self.headers = base.headers
        own = {key: header for key, header in file.headers.items() if key.startswith(prefix)}
        try:
            self.pairs: dict[str, LoRAPair] = lora_pairs(own)
            check_targets(self.pairs, own, base.headers)
            self._check_described(own)
        except CheckpointError as error:
            raise CheckpointError(f"{file.path} (adapters on {base_path}): {error}") from error
        file.require_floats(own)
        self._rounded = DigestedWeights(base, dtype=getattr(torch, self.told["dtype"]))

    @property
    def strength(self) -> float:
        """Factor of B A."""
        return self.described["alpha"] / self.described["rank"]

    def __getitem__(self, name: str) -> Tensor:
        weight, pair = self._rounded[name], self.pairs.get(name)
        if (digest := self._rounded.digest) not in (None, self.told["digest"]):
            raise CheckpointError(
                f"{self.file.path} holds adapters for the weights {self.told['digest'][:12]} of"
                f" {self.told['path']}, and {self.base_path} has {digest[:12]} now; give them the"
                " weights they were trained on"
            )
        if pair is None:
            return weight
        down, up = _factors(self.file, pair)
        return merge(weight, down=down, up=up, scale=self.strength)

    @cached_property
    def update(self) -> dict[str, Any]:
        """What the description of a network made of both says of the adapters."""
        file, alpha = str(self.file.path), self.described["alpha"]
        digest = _digest(self.file, self.pairs)
        return {"path": file, "scale": 1.0, "alpha": alpha, "digest": digest}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A, B) of every adapted layer."""
        return {
            name.removesuffix(".weight"): _factors(self.file, pair)
            for name, pair in self.pairs.items()
        }

    def _check_described(self, headers: Mapping[str, Tensor]) -> None:
        rank, layers = self.described["rank"], set(self.described["layers"])
        for name, pair in self.pairs.items():
            layer = name.removesuffix(".weight").split(".", 2)[-1]
            if layer not in layers:
                raise CheckpointError(
                    f"{name} is adapted, and its description names {', '.join(sorted(layers))}"
                    " alone"
                )
            if (found := headers[pair.down].shape[0]) != rank:
                raise CheckpointError(
                    f"the factors of {name} have rank {found}, its description says {rank}"
                )
            if pair.alpha is None:
                continue
            stored, said = self.file[pair.alpha], self.described["alpha"]
            if float(stored) != float(torch.tensor(said, dtype=stored.dtype)):
                raise CheckpointError(
                    f"{pair.alpha} is {float(stored):g}, its description says {said:g}"
                )
        _require_all(self.pairs, layers, self.headers)


def updates_in(network: LazyWeights) -> list[dict[str, Any]]:
    """The updates that are part of a network, as its description says them, the first one first."""
    if isinstance(network, MergedWeights | AdaptedWeights):
        return [*updates_in(network.base), network.update]
    file = getattr(network, "file", None)  # that of rcm.pipelines.wan_files.NetworkWeights
    description = None if file is None else description_of(file)
    return [] if description is None else list(description.extra.get("loras", ()))


class _Factors(LazyWeights):
    """The factors of an update by target, whatever they are called in its file."""

    def __init__(self, file: WeightFile, pairs: Mapping[str, LoRAPair]) -> None:
        self.file = file
        self.keys_in_file = {
            f"{name}.{side}": getattr(pair, side)
            for name, pair in pairs.items()
            for side in ("down", "up")
        }
        self.headers = {name: file.headers[key] for name, key in self.keys_in_file.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.file[self.keys_in_file[name]]


def _digest(file: WeightFile, pairs: Mapping[str, LoRAPair]) -> str:
    """Which update it is: the same in every container, naming, dtype from bfloat16 on, strength."""
    digested = DigestedWeights(_Factors(file, pairs), dtype=torch.bfloat16)
    for name in digested:
        digested[name]
    assert digested.digest is not None  # every tensor was read
    return digested.digest


def _require_all(
    pairs: Mapping[str, LoRAPair], layers: Iterable[str], headers: Mapping[str, Tensor]
) -> None:
    """`CheckpointError` unless every block of the network has factors for each of `layers`."""
    blocks = {name.split(".")[1] for name in headers if name.startswith("blocks.")}
    named = {f"blocks.{block}.{layer}.weight" for block in blocks for layer in layers}
    if missing := sorted(named - pairs.keys()):
        raise CheckpointError(
            f"{len(missing)} factors that its description names are missing, {missing[0]} among"
            " them"
        )


def _factors(file: WeightFile, pair: LoRAPair) -> tuple[Tensor, Tensor]:
    """A and B; `CheckpointError` for one that is NaN or infinite."""
    down, up = file[pair.down], file[pair.up]
    for key, factor in ((pair.down, down), (pair.up, up)):
        if not bool(factor.float().isfinite().all()):
            raise CheckpointError(
                f"{file.path}: {key} is NaN or infinite; take adapters of an earlier checkpoint"
            )
    return down, up


def base_of(described: Mapping[str, Any], copy: str) -> Mapping[str, Any]:
    """What the description says of the base of a `copy`; `CheckpointError` where it says
    nothing.
    """
    role = "fake_score" if copy == "fake_score" else "student"
    if role not in described["bases"]:
        raise CheckpointError(
            f"its description says nothing of the weights below the adapters of the {role}"
        )
    return described["bases"][role]
