"""Adapters of a training run in the layouts in which adapters are published: one file, or PEFT's
folder.

    wan         diffusion_model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight, .alpha (ComfyUI,
                trainers of Wan)
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, settings in the metadata
    peft        base_model.model.blocks.0.self_attn.q.lora_A.weight in adapter_model.safetensors,
                adapter_config.json
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile, require_folder
from rcm.nets.wan.lora import LAYOUTS, peft_settings, published
from rcm.pipelines.adapted_weights import AdaptedWeights
from rcm.pipelines.weight_writer import check_free
from rcm.storage.safetensors_file import write_safetensors
from rcm.storage.state_dicts import in_dtype
from rcm.train.describe import FILE_NAME, Description, replacing_described

PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def save_adapters(
    path: str | Path,
    network: AdaptedWeights,
    *,
    layout: str,
    description: Description,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapters of `network` alone to `path` and return it: a .safetensors file in the
    `layout` "wan" or "diffusers", a folder in "peft". The description goes along, so that the file
    is a checkpoint for whoever has the base.

    Raises `ConfigError`, before anything is written, for a path that does not suit the layout, one
    that exists while `overwrite` is False, or one that `network` is read from. Whatever fails later
    leaves `path` as it was.
    """
    target = Path(path)
    wanted = "" if layout == "peft" else ".safetensors"
    if layout not in LAYOUTS or target.suffix != wanted:
        what = "a folder without suffix" if layout == "peft" else "a .safetensors file"
        raise ConfigError(
            f"adapters in the layout {layout!r} are {what}, {target} is none; layouts are"
            f" {', '.join(LAYOUTS)}"
        )
    check_free(
        target,
        overwrite=overwrite,
        ours=lambda name: name in (PEFT_FILE, PEFT_SETTINGS),
        read=network.sources,
    )
    if wanted:
        OutputFile.claim(target)
    elif not target.exists():
        require_folder(target, f"{target}")
    said = network.described
    settings = peft_settings(
        said["layers"],
        layout=layout,
        rank=said["rank"],
        alpha=said["alpha"],
        base=network.told["path"],
    )
    factors = {
        layer: (in_dtype(layer, down, dtype), in_dtype(layer, up, dtype))
        for layer, (down, up) in network.factors().items()
    }
    tensors = published(factors, layout=layout, alpha=said["alpha"])
    with replacing_described(target, description) as partial:
        if wanted:
            metadata = {"format": "pt", "rcm": description.to_json()}
            if layout == "diffusers":
                metadata["lora_adapter_metadata"] = json.dumps(
                    {f"transformer.{key}": value for key, value in settings.items()}
                )
            _write(partial, tensors, metadata)
        else:
            partial.mkdir()
            _write(partial / PEFT_FILE, tensors, {"format": "pt"})
            (partial / PEFT_SETTINGS).write_text(json.dumps(settings, indent=2))
            description.write(partial / FILE_NAME)
    return target


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_safetensors(
        path,
        {key: value.to("meta") for key, value in tensors.items()},
        tensors.__getitem__,
        metadata=metadata,
    )
