"""Files of the Wan autoencoder: reading them whole before anything changes, and the names of the
two public formats.

Original: `Wan2.1_VAE.pth`, a flat pickle of 194 float32 tensors. Diffusers:
`vae/diffusion_pytorch_model.safetensors`, the same tensors under other names and with equal shapes.
Either may come as .pth / .pt or .safetensors. docs/reference/encoders.md#vae-names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from rcm.core.errors import CheckpointError
from rcm.storage.state_dicts import check_keys, listed, renamed, shapes_of
from rcm.storage.weight_files import open_container

WAN_VAE_FILE = "assets/checkpoints/Wan2.1_VAE.pth"
PUBLISHED_AT = "Wan2.1_VAE.pth is published at https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B"
_DIFFUSERS_MARK = "quant_conv."

# original beginning of a name, diffusers beginning; the rest of a block's name follows
_ENDS = (
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    *(
        (f"{side}.{ours}", f"{side}.{theirs}")
        for side in ("encoder", "decoder")
        for ours, theirs in (
            *(("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out")),
            ("middle.0", "mid_block.resnets.0"),
            ("middle.1", "mid_block.attentions.0"),
            ("middle.2", "mid_block.resnets.1"),
        )
    ),
)
_INSIDE = (
    *(("residual.0", "norm1"), ("residual.2", "conv1")),
    *(("residual.3", "norm2"), ("residual.6", "conv2")),
    ("shortcut", "conv_shortcut"),
)
_BLOCK = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(.+)")
_UP_GROUP = 4


def diffusers_name(original: str) -> str:
    """The diffusers name of an original tensor name; `CheckpointError` for another name."""
    block = _BLOCK.fullmatch(original)
    if block is not None:
        side, index, rest = block.group(1), int(block.group(2)), block.group(3)
        if side == "encoder.downsamples":
            return f"encoder.down_blocks.{index}.{_inside(rest)}"
        group, member = divmod(index, _UP_GROUP)
        part = "upsamplers.0" if member == _UP_GROUP - 1 else f"resnets.{member}"
        return f"decoder.up_blocks.{group}.{part}.{_inside(rest)}"
    for ours, theirs in _ENDS:
        if original.startswith(f"{ours}."):
            return f"{theirs}.{_inside(original[len(ours) + 1 :])}"
    raise CheckpointError(f"{original!r} is no tensor of the Wan autoencoder")


def original_names(names: Iterable[str], *, expected: Iterable[str]) -> dict[str, str]:
    """Name of either format -> original name (`expected` lists them); others stay."""
    names = list(names)
    if not any(name.startswith(_DIFFUSERS_MARK) for name in names):
        return {name: name for name in names}
    back = {diffusers_name(original): original for original in expected}
    return {name: back.get(name, name) for name in names}


def load_weights(
    vae: nn.Module, path: str | Path, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Fill `vae` from a file of either format, or diffusers' `vae` folder, as `dtype` on `device`.

    Everything is checked and read first: `CheckpointError` for a bad file, and for tensors that are
    missing, extra or misshapen, each named; `vae` is then unchanged.
    """
    expected = shapes_of(vae.state_dict())
    file = open_container(
        path,
        hint=(
            f"{PUBLISHED_AT}: put the file there, or name its place with --vae_path"
            " (tokenizer.vae_pth)"
        ),
    )
    file.require_tensors_only()
    names = original_names(file, expected=expected)
    shapes = {names[theirs]: shape for theirs, shape in shapes_of(file).items()}
    if len(shapes) < len(names):
        twice = listed(sorted(expected.keys() & names.keys()))
        raise CheckpointError(f"{file.path} holds tensors under two names: {twice}")
    check_keys(str(file.path), shapes=shapes, expected=expected, network="the Wan2.1 autoencoder")
    file.require_floats(file)
    # copies: a mapped view would change with the file
    state = {
        ours: file[theirs].to(device=device, dtype=dtype, copy=True)
        for theirs, ours in names.items()
    }
    vae.load_state_dict(state, strict=True, assign=True)


def _inside(rest: str) -> str:
    return renamed(rest, _INSIDE) or rest
