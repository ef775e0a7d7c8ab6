"""From a path to a Wan network: which network a file holds, its weights under the package's own
names, and a frozen denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.config import PRESETS, WanConfig
from rcm.nets.wan.config import preset as named_config
from rcm.nets.wan.convert import (
    HEAD_DIM,
    choose_prefix,
    detect_config,
    network_names,
    network_prefixes,
    own_form,
)
from rcm.nets.wan.foreign import foreign
from rcm.nets.wan.model import WanDiT
from rcm.nets.wan.published_config import heads_in, unread_settings, with_settings
from rcm.parallel.agree import on_first, shared
from rcm.parallel.init import load_full, materialise, on_meta
from rcm.pipelines.adapted_weights import (
    AdaptedWeights,
    LoRA,
    MergedWeights,
    adapter_copies,
    adapter_settings,
    base_of,
    chosen_copy,
)
from rcm.pipelines.described import description_of, network_of, typed
from rcm.pipelines.finite import bad_weight
from rcm.pipelines.weight_files import open_weights
from rcm.storage.state_dicts import LazyWeights, check_keys, shapes_of
from rcm.storage.weight_files import WeightFile
from rcm.train.describe import Description

COPIES = {"ema": "ema", "live": "live", "reg": "live", "fake_score": "fake_score"}
"""What a command may ask for -> which copy that is; "reg" is rcm's word for the live weights."""
MOST_ADAPTERS = 8
"""Adapters on adapters that are followed."""
_SHAPED = (
    "dim",
    "ffn_dim",
    "num_layers",
    "in_dim",
    "out_dim",
    "freq_dim",
    "text_dim",
    "image_branch",
    "image_positions",
    "two_times",
)


class NetworkWeights(LazyWeights):
    """One network of a file under the package's own names, read one tensor at a time: all entries
    of `file` whose keys start with `prefix`.

    `copy`: "ema", "live" or "fake_score", or "unstated" where the file does not say. Raises
    `CheckpointError` for entries that are no tensors, or names that are no network's.
    """

    def __init__(self, file: WeightFile, *, prefix: str, copy: str) -> None:
        self.file, self.prefix, self.copy, self.sources = file, prefix, copy, file.sources
        self.names = network_names(file.headers, prefix=prefix, others=file.others)
        self.headers = {name: own_form(name, file.headers[key]) for name, key in self.names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return own_form(name, self.file[self.names[name]])


def copies_in(file: WeightFile) -> dict[str, str]:
    """Prefix -> copy of every network in `file`, averaged first; "" -> "unstated" where nothing
    looks like one. The only network of a file is what its description says, or "unstated" where
    neither that nor its name tells.
    """
    held = network_prefixes(file.headers) or {"": "live"}
    if len(held) == 1 and "live" in held.values():
        description = description_of(file)
        stated = None if description is None else description.extra.get("weights")
        return dict.fromkeys(held, stated or "unstated")
    order = [*dict.fromkeys(COPIES.values())]
    return dict(
        sorted(
            held.items(), key=lambda item: order.index(item[1]) if item[1] in order else len(order)
        )
    )


def network_weights(
    file: WeightFile, *, weights: str = "ema", base: str | Path | None = None, above: int = 0
) -> NetworkWeights | AdaptedWeights:
    """One network of `file`: its averaged ("ema"; the only copy where there is no average), "live"
    (or "reg") or "fake_score" weights. The only network of a file that describes itself as another
    copy is taken with a warning.

    A file that describes its entries as adapters is read on top of the weights they were trained
    on: at `base`, or where the description says; `above` counts adapters on adapters. Raises
    `CheckpointError` naming the file when it holds no such copy, another architecture, something
    else, or quantised weights, or when its base is missing; `ConfigError` for an unknown word, or a
    `base` that nothing reads.
    """
    if weights not in COPIES:
        raise ConfigError(f"unknown weights {weights!r}; choose from {', '.join(COPIES)}")
    description = description_of(file)
    if description is not None and "adapters" in description.extra:
        return _adapted(file, description, wanted=COPIES[weights], base=base, above=above)
    if base is not None:
        raise ConfigError(
            f"{file.path} is a network by itself, no adapters that need {base}; leave the base out"
        )
    told = foreign(file.headers)
    if told is not None:
        raise CheckpointError(f"{file.path} is {told}")
    named, held, wanted = network_prefixes(file.headers), copies_in(file), COPIES[weights]
    try:
        untold = (
            len(held) == 1
            and set(named.values()) <= {"live"}
            and (wanted != "fake_score" or wanted in held.values())
        )
        prefix = next(iter(held)) if untold else choose_prefix(named, wanted)
        network = NetworkWeights(file, prefix=prefix, copy=held[prefix])
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if network.copy not in ("unstated", wanted):
        logger.warning(
            "{} has no {} weights; its {} weights are taken", file.path, weights, network.copy
        )
    file.require_floats(network.names.values())
    return network


def _adapted(
    file: WeightFile, description: Description, *, wanted: str, base: str | Path | None, above: int
) -> AdaptedWeights:
    described = description.extra["adapters"]
    copies = adapter_copies(file, stated=description.extra.get("weights"))
    prefix = chosen_copy(copies, wanted, path=file.path)
    told = base_of(described, copies[prefix])
    where = base or told["path"]
    if where is None:
        raise CheckpointError(
            f"{file.path} holds adapters on a random start, which was never saved; nothing can be"
            " made of them"
        )
    if not Path(where).exists():
        raise CheckpointError(
            f"{file.path} holds adapters on the weights of {where}, and there is no {where} here;"
            f" make one network of both: rcm checkpoint convert"
            f" {typed(file.path)} TARGET --base PATH"
        )
    if above == MOST_ADAPTERS:
        raise CheckpointError(
            f"{file.path} is the last of more than {MOST_ADAPTERS} adapters on adapters; merge one"
            " of them first"
        )
    try:
        adapter_settings(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    below = network_weights(open_weights(where), above=above + 1)
    network = AdaptedWeights(
        file, below, described, prefix=prefix, copy=copies[prefix], base_path=where
    )
    if network.copy not in ("unstated", wanted):
        logger.warning(
            "{} has no {} adapters; its {} ones are taken", file.path, wanted, network.copy
        )
    return network


def config_of(
    network: NetworkWeights | AdaptedWeights, *, expect: WanConfig | str | None = None
) -> WanConfig:
    """Sizes of a network: from `expect`, else its self-description, else its shapes with the
    config.json beside it.

    Raises `CheckpointError` where tensors and words disagree, naming --model_size where it is
    `expect`. Names and shapes of all tensors are `require_fit`'s business.
    """
    file = network.file
    wanted = named_config(expect) if isinstance(expect, str) else expect
    description = description_of(file)
    described = None if description is None else network_of(description, file.path)
    known = wanted or described
    try:
        found = detect_config(
            network.headers, head_dim=known.head_dim if known else _head_dim(network)
        )
        settled = with_settings(found, file.config)
        # those of adapters are read, or refused, where they are merged
        if isinstance(network, NetworkWeights) and (unread := unread_settings(file.config)):
            logger.warning(
                "{}: nothing here reads {} of its config.json", file.path, ", ".join(unread)
            )
    except CheckpointError as error:
        if known is not None:
            require_fit(network, known)
        raise CheckpointError(f"{file.path}: {error}") from error
    if described is not None and (wrong := _different(found, described)):
        raise CheckpointError(
            f"{file.path} contradicts its own description: {wrong} (in the tensors, in the"
            " description)"
        )
    if wanted is not None and (wrong := _different(found, wanted)):
        advice = f"--model_size {name}" if (name := preset_of(found)) else "the sizes that it has"
        raise CheckpointError(
            f"{file.path} holds {told_size(found)}, but {told_size(wanted)} was asked for"
            f" ({wrong}); pass {advice}, or give the file that belongs to it"
        )
    if known is None and file.config is None and (whole := _cut_from(settled)):
        raise CheckpointError(
            f"{file.path} holds {settled.num_layers} layers of {whole}, which has"
            f" {PRESETS[whole].num_layers}; it is incomplete"
        )
    return known or settled


def require_fit(
    network: Mapping[str, Tensor], config: WanConfig, *, source: str | Path | None = None
) -> None:
    """Raise `CheckpointError` naming missing, unexpected and misshapen tensors of `network` against
    a net of these sizes.
    """
    path = source or (
        network.file.path if isinstance(network, NetworkWeights | AdaptedWeights) else "state dict"
    )
    check_keys(
        f"{path} (for {told_size(config)})",
        shapes=shapes_of(network),
        expected=shapes_of(network_headers(config)),
    )


def network_headers(config: WanConfig) -> dict[str, Tensor]:
    """Every tensor of a net of these sizes, as meta tensors of the default dtype."""
    return on_meta(lambda: WanDiT(config, attention="sdpa")).state_dict()


def preset_of(config: WanConfig) -> str | None:
    """Name of the preset with these sizes, None for others."""
    return next((name for name, known in PRESETS.items() if known == config), None)


def told_size(config: WanConfig) -> str:
    """A network in words."""
    branch = ", image branch" if config.image_branch else ""
    branch += " for two images" if config.image_positions else ""
    branch += ", two times" if config.two_times else ""
    name = preset_of(config) or "a network"
    return (
        f"{name} of {config.num_layers} layers of width {config.dim}, {config.in_dim} input"
        f" channels{branch}"
    )


def load_wan(
    path: str | Path,
    *,
    expect: WanConfig | str | None = None,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    precision: Precision,
    attention: str = "auto",
    loras: Sequence[LoRA] = (),
) -> Denoiser:
    """A frozen network filled from any understood file or folder. Collective where a process group
    of several ranks exists: rank 0 reads and sends.

    `expect`: preset or sizes that it must have (None: whatever the file holds). `weights`: "ema"
    (the only copy where there is no average), "live" or "fake_score". `loras` are added in the
    order given. The net is built without memory, materialised on `device` in precision.compute, and
    filled tensor by tensor. Raises `CheckpointError` on every rank, before memory is taken, for a
    file that is damaged, of another kind or of another network.
    """

    def read() -> tuple[LazyWeights, WanConfig]:
        network = network_weights(open_weights(path), weights=weights)
        config = config_of(network, expect=expect)
        require_fit(network, config)
        place = f"{network.prefix}*" if network.prefix else network.file.container
        logger.info("{}: {} from {}", path, told_size(config), place)
        merged: LazyWeights = network
        for lora in loras:
            merged = MergedWeights(merged, lora, device=device)
            told = f"{len(merged.pairs)} weights updated by {lora.path} (scale {lora.scale})"
            logger.info("{}: {}", path, told)
        return merged, config

    opened = on_first(read)
    config = shared(None if opened is None else opened[1])
    return frozen(
        config,
        opened and opened[0],
        source=str(path),
        device=device,
        precision=precision,
        attention=attention,
    )


def frozen(
    config: WanConfig,
    weights: LazyWeights | None,
    *,
    source: str,
    device: torch.device | str,
    precision: Precision,
    attention: str,
) -> Denoiser:
    """A frozen network of these sizes, filled tensor by tensor with the `weights` of rank 0 (None
    on the others), in precision.compute. `CheckpointError` for weights that are NaN or infinite.
    """
    net = _empty(config, device=device, precision=precision, attention=attention)
    load_full(net, weights, source=source)
    if (name := bad_weight(net)) is not None:
        raise CheckpointError(
            f"{source}: weight {name} is NaN or infinite as {precision.compute}; take an earlier"
            " checkpoint, or a wider --precision"
        )
    return Denoiser(net, precision).eval_params()


def random_wan(
    preset: WanConfig | str,
    *,
    device: torch.device | str = "cpu",
    precision: Precision,
    attention: str = "auto",
    seed: int = 0,
) -> Denoiser:
    """A frozen network with random weights, the output head included: for measurements of speed and
    memory, and for tests.

    Drawn on `device` from `seed`, tensor by tensor; another kind of device gives other numbers.
    """
    config = named_config(preset) if isinstance(preset, str) else preset
    net = _empty(config, device=device, precision=precision, attention=attention)
    generator = torch.Generator(device).manual_seed(seed)
    net.init_weights(generator)
    with torch.no_grad():
        head = net.head.head.weight
        head.copy_(
            torch.randn(head.shape, generator=generator, device=generator.device) * config.dim**-0.5
        )
    return Denoiser(net, precision).eval_params()


def _empty(
    config: WanConfig, *, device: torch.device | str, precision: Precision, attention: str
) -> WanDiT:
    net = on_meta(lambda: WanDiT(config, attention=attention)).requires_grad_(False)
    return materialise(net.to(precision.compute), device=device)


def _head_dim(network: NetworkWeights | AdaptedWeights) -> int:
    """Channels per head: what config.json says, else that of all published networks."""
    heads, patch = heads_in(network.file.config), network.headers.get("patch_embedding.weight")
    if heads is None or patch is None:
        return HEAD_DIM
    if patch.shape[0] % heads:
        raise CheckpointError(
            f"config.json states {heads} heads, which do not divide the width {patch.shape[0]}"
        )
    return patch.shape[0] // heads


def _different(found: WanConfig, other: WanConfig) -> str:
    wrong = [name for name in _SHAPED if getattr(found, name) != getattr(other, name)]
    return ", ".join(f"{name} {getattr(found, name)} and {getattr(other, name)}" for name in wrong)


def _cut_from(found: WanConfig) -> str | None:
    """The preset that differs in the number of layers alone: a file that lost its last blocks looks
    like a smaller network.
    """
    return next(
        (
            name
            for name, known in PRESETS.items()
            if known != found and replace(known, num_layers=found.num_layers) == found
        ),
        None,
    )
