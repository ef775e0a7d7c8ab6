"""CLIP's image features for Wan2.1 I2V-14B: the ViT-H/14 half of the original file, run by
transformers. docs/reference/wan.md#forward, docs/reference/encoders.md#clip.

Shape legend: B images, H W their pixel size, N tokens (one for the class, one per patch), E width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.lazy_module import LazyModule
from rcm.encoders.published import (
    PublishedShape,
    PublishedWeights,
    Row,
    checked,
    count_blocks,
    fill,
    repeated,
)
from rcm.encoders.text_extra import text_extra
from rcm.storage.state_dicts import listed
from rcm.storage.weight_files import open_container

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

CLIP_FILE = "assets/checkpoints/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
CLIP_MISSING = (
    "the CLIP image encoder of Wan2.1 I2V is published as"
    " models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (4.8 GB) at"
    " https://huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P; put it into assets/checkpoints or pass the"
    " path it has"
)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # of ViT-H; not stored
NORM_EPS = 1e-5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_OTHER_HALF = ("textual.", "log_scale")
_BLOCK = "transformer.{}."


@dataclass(frozen=True)
class CLIPShape(PublishedShape):
    """Sizes of the vision half (`visual.` in the file); the defaults are ViT-H/14's at 224."""

    dim: int = 1280
    mlp_dim: int = 5120
    layers: int = 32
    heads: int = 16
    patch: int = 14
    grid: int = 16
    projection: int = 1024

    @property
    def image_size(self) -> int:
        """Pixels along each side of the input."""
        return self.grid * self.patch

    def rows(self) -> list[Row]:
        """Every tensor. Wan has no use for the last, the projection to text space."""
        dim, wide = self.dim, self.mlp_dim
        block = [
            *_affine("norm1", ("layer_norm1",), (dim,)),
            *_affine(
                "attn.to_qkv", tuple(f"self_attn.{side}_proj" for side in "qkv"), (3 * dim, dim)
            ),
            *_affine("attn.proj", ("self_attn.out_proj",), (dim, dim)),
            *_affine("norm2", ("layer_norm2",), (dim,)),
            *_affine("mlp.0", ("mlp.fc1",), (wide, dim)),
            *_affine("mlp.2", ("mlp.fc2",), (dim, wide)),
        ]
        return [
            Row("cls_embedding", ("embeddings.class_embedding",), (1, 1, dim)),
            Row(
                "patch_embedding.weight",
                ("embeddings.patch_embedding.weight",),
                (dim, 3, self.patch, self.patch),
            ),
            Row(
                "pos_embedding",
                ("embeddings.position_embedding.weight",),
                (1, 1 + self.grid**2, dim),
            ),
            *_affine("pre_norm", ("pre_layrnorm",), (dim,)),
            *_affine("post_norm", ("post_layernorm",), (dim,)),
            *repeated(block, self.layers, ours=_BLOCK, theirs="encoder.layers.{}."),
            Row("head", (), (dim, self.projection)),
        ]


def _affine(ours: str, theirs: tuple[str, ...], weight: tuple[int, ...]) -> Iterator[Row]:
    """A weight and its bias, one per row of the weight."""
    for part, shape in (("weight", weight), ("bias", weight[:1])):
        yield Row(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), shape)


class ClipVision(LazyModule):
    """Images to CLIP features [B, 257, 1280]: the last block but one, without a final norm.

    The weights are read at the first image, or by `load()`, and freed by `unload()`.
    """

    def __init__(
        self,
        weights: PublishedWeights[CLIPShape],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.dtype = weights.shape, dtype
        self._path = weights.file.path
        super().__init__(
            lambda where: load_clip(open_clip(self._path), device=where, dtype=dtype), device=device
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path = CLIP_FILE,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float16,
    ) -> ClipVision:
        """The encoder in the original `.pth`, or the same names in a safetensors file.

        The original runs in float16. Raises now: `CheckpointError` for a file that does not fit,
        `ConfigError` for a dtype other than float16, bfloat16 and float32.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"CLIP runs in float16, bfloat16 or float32, got dtype={dtype}")
        return cls(open_clip(path), device=device, dtype=dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, N, E] in `dtype` on `device` of `images` [B, 3, H, W] in [-1, 1]."""
        pixels = preprocess(images, size=self.shape.image_size).to(self.device, self.dtype)
        states = self.load()(pixel_values=pixels, output_hidden_states=True).hidden_states
        if len(states) != self.shape.layers + 1:
            raise RuntimeError(
                f"transformers returned {len(states)} hidden states of {self.shape.layers} blocks;"
                " expected one more than blocks"
            )
        return states[-2]

    def describe(self) -> dict[str, str]:
        return {"name": "clip_vision", "path": str(self._path)}


def preprocess(images: Tensor, *, size: int) -> Tensor:
    """`images` [B, 3, H, W] in [-1, 1] as the float32 [B, 3, size, size] that CLIP was trained on.

    Bicubic without antialiasing, whatever the aspect; mapped to [0, 1], not clamped; then (x -
    mean) / std per channel. docs/reference/encoders.md#clip.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ConfigError(
            f"CLIP takes float images [B, 3, H, W] in [-1, 1], got {images.dtype}"
            f" {list(images.shape)}"
        )
    resized = torch.nn.functional.interpolate(
        images.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=False
    )
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD)
    )
    return (resized * 0.5 + 0.5 - mean) / std


def open_clip(path: str | Path) -> PublishedWeights[CLIPShape]:
    """Open and check the vision half without reading it; `CheckpointError` says what is wrong."""
    file = open_container(path, hint=CLIP_MISSING)
    file.require_tensors_only()
    strangers = sorted(name for name in file if not name.startswith(("visual.", *_OTHER_HALF)))
    if strangers:
        raise CheckpointError(
            f"{file.path} is not the CLIP file of Wan2.1: it holds {listed(strangers)}"
        )
    names = {name.removeprefix("visual."): name for name in file if name.startswith("visual.")}
    return checked(file, names, shape_of=_shape_of, network="a CLIP vision encoder")


def load_clip(
    weights: PublishedWeights[CLIPShape], *, device: torch.device | str, dtype: torch.dtype
) -> CLIPVisionModel:
    """transformers' vision model over the file (see `fill`), on `device`."""
    transformers = text_extra("transformers", purpose="the CLIP image encoder")
    shape = weights.shape
    config = transformers.CLIPVisionConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.mlp_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=shape.image_size,
        patch_size=shape.patch,
        hidden_act="gelu",
        layer_norm_eps=NORM_EPS,
        attention_dropout=0.0,
    )
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(config)
    net = getattr(model, "vision_model", model)  # transformers before version 5 has one level more
    fill(net, weights, device=device, dtype=dtype)
    # not stored, so still on meta
    net.embeddings.position_ids = torch.arange(1 + shape.grid**2, device=device)[None]
    return model.eval().requires_grad_(False)


def _shape_of(shapes: Mapping[str, tuple[int, ...]], *, path: Path) -> CLIPShape:
    try:
        dim, _, patch, _ = shapes["patch_embedding.weight"]
        tokens = shapes["pos_embedding"][1]
        mlp_dim, _ = shapes["transformer.0.mlp.0.weight"]
        _, projection = shapes["head"]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} holds no CLIP vision encoder ({error}); expected visual.* of"
            f" {Path(CLIP_FILE).name}"
        ) from error
    grid = math.isqrt(max(tokens - 1, 0))
    if grid**2 + 1 != tokens or dim % HEAD_DIM:
        raise CheckpointError(
            f"{path}: {tokens} positions are not 1 + a square, or width {dim} is no multiple of the"
            f" head size {HEAD_DIM}"
        )
    layers, heads = count_blocks(shapes, _BLOCK), dim // HEAD_DIM
    return CLIPShape(dim, mlp_dim, layers, heads, patch, grid, projection)
