"""Inspect a file of weights, or convert it to another format.

    python -m scripts.checkpoint inspect PATH [PATH ...] [--json]
    python -m scripts.checkpoint convert SOURCE TARGET --to {rcm,wan,diffusers,self_forcing,comfyui}
    python -m scripts.checkpoint convert SOURCE TARGET --adapters {wan,diffusers,peft}

PATH and SOURCE: .pth, .pt, .safetensors, a published folder (shards, diffusers, Wan2.2), a DCP
directory, a job or iter_* folder. TARGET's suffix chooses the container: .pth, .pt, .safetensors,
.dcp, or none for a folder. docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from rcm.core.arguments import Arguments
from rcm.core.errors import CheckpointError, ConfigError
from rcm.core.standard_output import lost_output
from rcm.inference.outcome import command
from rcm.nets.wan.config import PRESETS, WanConfig
from rcm.nets.wan.convert import FORMS
from rcm.nets.wan.lora import LAYOUTS
from rcm.pipelines.adapted_weights import AdaptedWeights, LoRA, MergedWeights, updates_in
from rcm.pipelines.adapter_writer import save_adapters
from rcm.pipelines.described import description_of, typed
from rcm.pipelines.wan_files import (
    COPIES,
    NetworkWeights,
    config_of,
    network_weights,
    preset_of,
    require_fit,
)
from rcm.pipelines.weight_files import open_weights
from rcm.pipelines.weight_report import inspect_weights
from rcm.pipelines.weight_writer import save_network
from rcm.storage.state_dicts import LazyWeights
from rcm.train.describe import Description

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
IMPORTED = "imported"
"""Stage of a description made for weights that came without one."""


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; exit status 1 with one line on stderr when a file is unusable, 2 for a wrong
    call.
    """
    options = _parser().parse_args(arguments)
    try:
        return _inspect(options) if options.command == "inspect" else _convert(options)
    except (CheckpointError, ConfigError, OSError) as error:
        lost = lost_output(error)
        told = error if lost is None else lost.sentence
        print(f"checkpoint {options.command}: {told}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    told = "say what a file contains, which network fits, what is missing, which commands take it"
    look = commands.add_parser("inspect", help=told)
    look.add_argument("path", nargs="+", type=Path, help="a file or folder of weights")
    look.add_argument("--json", action="store_true", help="one JSON list instead of text")
    turn = commands.add_parser("convert", help="write a network in another format")
    add = turn.add_argument
    add("source", type=Path, help="file or folder that is read, and left as it is")
    add("target", type=Path, help=".pth, .pt, .safetensors, .dcp, or a folder")
    told = "names and patch weight of this family (default: rcm)"
    add("--to", choices=sorted(FORMS), default="rcm", help=told)
    told = "which copy; ema takes the only one too (default: ema)"
    add("--weights", choices=sorted(COPIES), default="ema", help=told)
    add("--dtype", choices=sorted(DTYPES), default="keep", help="stored dtype (default: keep)")
    told = "network that it must be (default: what it is)"
    add("--expect", choices=sorted(PRESETS), help=told)
    told = "merge a low-rank update; may be repeated"
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]", help=told)
    told = "alpha of every --lora (default: that of its file, else its rank)"
    add("--lora_alpha", type=float, help=told)
    told = "merge a --lora also where SOURCE holds the same factors already"
    add("--merge_again", action="store_true", help=told)
    told = "weights below SOURCE's adapters (default: where it says they were)"
    add("--base", type=Path, metavar="PATH", help=told)
    told = "write SOURCE's adapters alone, in this layout"
    add("--adapters", choices=sorted(LAYOUTS), help=told)
    told = "cut a folder into shards of at most this size"
    add("--max_shard_size", type=size_in_bytes, metavar="5GB", help=told)
    add("--overwrite", action="store_true", help="replace TARGET if it exists")
    turn.idle("to", beside="adapters")
    for name in ("lora_alpha", "merge_again"):
        turn.idle(name, without="lora")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    reports = [inspect_weights(path) for path in options.path]
    if options.json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        print("\n\n".join(map(str, reports)))
    return 0 if all(report.ok for report in reports) else 1


def _convert(options: argparse.Namespace) -> int:
    network = network_weights(
        open_weights(options.source), weights=options.weights, base=options.base
    )
    config = config_of(network, expect=options.expect)
    require_fit(network, config)
    if options.adapters:
        return _write_adapters(network, options)
    merged: LazyWeights = network
    for word in options.lora:
        lora = replace(_lora(word, alpha=options.lora_alpha), again=options.merge_again)
        merged = MergedWeights(merged, lora)
        _tell_sampling(merged, options)
    target = save_network(
        options.target,
        merged,
        form=options.to,
        config=config,
        description=_description(network, config, updates_in(merged)),
        dtype=DTYPES[options.dtype],
        max_shard_bytes=options.max_shard_size,
        overwrite=options.overwrite,
    )
    name = preset_of(config) or f"a network of {config.num_layers} layers of width {config.dim}"
    copy = "" if network.copy == "unstated" else f"{network.copy} "
    print(f"wrote {name}, {copy}weights, {len(network)} tensors, as {options.to} to {target}")
    return 0


def _tell_sampling(merged: MergedWeights, options: argparse.Namespace) -> None:
    """Warn of adapters that are sampled otherwise than SOURCE, whose sampling TARGET keeps."""
    ours, theirs = (
        told and {key: told.extra.get(key) for key in ("recipe", "sampler")}
        for told in (description_of(open_weights(options.source)), merged.description)
    )
    if theirs and any(theirs.values()) and ours != theirs:
        logger.warning(
            "{} is sampled otherwise than {}, as which {} will be sampled; to keep the sampling of"
            " the adapters: rcm checkpoint convert {} {} --base {}",
            merged.lora.path, options.source, options.target,
            *map(typed, (merged.lora.path, options.target, options.source)),
        )  # fmt: skip


def _write_adapters(network: NetworkWeights | AdaptedWeights, options: argparse.Namespace) -> int:
    if not isinstance(network, AdaptedWeights):
        raise ConfigError(f"{options.source} holds all weights, no adapters; leave out --adapters")
    if options.lora or options.max_shard_size:
        raise ConfigError("--adapters writes adapters alone; leave out --lora and --max_shard_size")
    found = description_of(network.file)
    extra = {**found.extra, "converted_from": str(network.file.path)}
    target = save_adapters(
        options.target,
        network,
        layout=options.adapters,
        description=replace(found, extra=extra).holding(network.copy),
        dtype=DTYPES[options.dtype],
        overwrite=options.overwrite,
    )
    rank, alpha = network.described["rank"], network.described["alpha"]
    print(
        f"wrote {network.copy} adapters of rank {rank}, alpha {alpha:g}, for {len(network.pairs)}"
        f" layers, as {options.adapters} to {target}"
    )
    return 0


def _description(
    network: NetworkWeights | AdaptedWeights, config: WanConfig, merged: list[dict[str, Any]]
) -> Description:
    """That of the source or a new one, with the copy that was taken and what was merged."""
    source, name = str(network.file.path), preset_of(config) or ""
    found = description_of(network.file) or Description(
        stage=IMPORTED, network=asdict(config), network_name=name, parent=source
    )
    extra = {key: value for key, value in found.extra.items() if key != "adapters"}
    extra["converted_from"] = source
    if merged:
        extra["loras"] = merged
    return replace(found, extra=extra).holding(network.copy)


def _lora(word: str, *, alpha: float | None) -> LoRA:
    """FILE or FILE:SCALE; a path that exists is a path, whatever it contains."""
    path, colon, scale = word.rpartition(":")
    if not colon or Path(word).exists():
        return LoRA(word, alpha=alpha)
    try:
        return LoRA(path, scale=float(scale), alpha=alpha)
    except ValueError as error:
        raise ConfigError(
            f"--lora {word}: {scale!r} is no number, and there is no file of that name; write FILE"
            " or FILE:0.8"
        ) from error


def size_in_bytes(word: str) -> int:
    """Bytes of "500MB", "5GB" or a plain number; argparse's error for anything else."""
    unit = next((unit for unit in UNITS if word.upper().endswith(unit)), "")
    number = word[: len(word) - len(unit)]
    try:
        return int(float(number) * UNITS.get(unit, 1))
    except (ValueError, OverflowError) as error:  # infinite
        raise argparse.ArgumentTypeError(
            f"{word!r} is no size; write 5GB, 500MB or a number of bytes"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
