"""CLIP's image features for Wan2.1 I2V-14B: the ViT-H/14 half of the original file, run by transformers. spec/wan.md 1.3 (5), 2.4, 7.

Shape legend: B images, H W their pixel size, N tokens (one for the class, one per patch), E width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.lazy_module import LazyModule
from rcm.encoders.text_extra import text_extra
from rcm.storage.state_dicts import check_keys, listed, shapes_of
from rcm.storage.weight_files import WeightFile, open_container

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

CLIP_FILE = "assets/checkpoints/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
CLIP_MISSING = (
    "the CLIP image encoder of Wan2.1 I2V is published as models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (4.8 GB) at "
    "https://huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P; put it into assets/checkpoints or pass the path it has"
)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # of ViT-H; not stored
NORM_EPS = 1e-5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_OTHER_HALF = ("textual.", "log_scale")
_UNUSED = "head"  # projects the class token into the space shared with text
_LAYER_KEY = re.compile(r"transformer\.(\d+)\.(.+)")


@dataclass(frozen=True)
class CLIPShape:
    """Sizes of the vision half; the defaults are ViT-H/14's at 224 pixels, with the projection that Wan does not use."""

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

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its original name without `visual.`."""
        dim, wide = self.dim, self.mlp_dim
        norms = {f"{norm}.{part}": (dim,) for norm in ("pre_norm", "post_norm") for part in ("weight", "bias")}
        layer = {
            **{f"{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
            "attn.to_qkv.weight": (3 * dim, dim),
            "attn.to_qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "mlp.0.weight": (wide, dim),
            "mlp.0.bias": (wide,),
            "mlp.2.weight": (dim, wide),
            "mlp.2.bias": (dim,),
        }
        return {
            "cls_embedding": (1, 1, dim),
            "patch_embedding.weight": (dim, 3, self.patch, self.patch),
            "pos_embedding": (1, 1 + self.grid**2, dim),
            **norms,
            **{f"transformer.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()},
            _UNUSED: (dim, self.projection),
        }


@dataclass(frozen=True)
class CLIPWeights:
    """A file that was found to hold exactly one vision half."""

    file: WeightFile
    shape: CLIPShape


class ClipVision:
    """Images to CLIP features [B, 257, 1280]: the output of the last block but one, without a final norm.

    Make one with `from_file`; the weights are read at the first image, or by `load()`, and freed by `unload()`.
    """

    def __init__(self, weights: CLIPWeights, *, device: torch.device | str, dtype: torch.dtype) -> None:
        self.shape, self.dtype = weights.shape, dtype
        self._path = weights.file.path
        self._net = LazyModule(lambda where: load_clip(open_clip(self._path), device=where, dtype=dtype), device=device)

    @classmethod
    def from_file(
        cls, path: str | Path = CLIP_FILE, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16
    ) -> ClipVision:
        """The encoder in the original `.pth` (or the same names in a safetensors file), whose text half is not read.

        float16 is what the original runs in. Raises now: `CheckpointError` for a file that is missing, truncated or does not fit,
        `ConfigError` for a dtype other than float16, bfloat16 and float32.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"CLIP runs in float16, bfloat16 or float32, got dtype={dtype}")
        return cls(open_clip(path), device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self._net.device

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._net.is_loaded

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, N, E] in `dtype` on `device` of `images` [B, 3, H, W] in [-1, 1], of any size; `ConfigError` for another shape."""
        pixels = preprocess(images, size=self.shape.image_size).to(self.device, self.dtype)
        states = self._net.load()(pixel_values=pixels, output_hidden_states=True).hidden_states
        if len(states) != self.shape.layers + 1:
            raise RuntimeError(
                f"transformers returned {len(states)} hidden states of {self.shape.layers} blocks; expected one more than blocks"
            )
        return states[-2]

    def load(self) -> None:
        """Read the weights now instead of at the first image."""
        self._net.load()

    def unload(self) -> None:
        """Free the weights."""
        self._net.unload()

    def to(self, device: torch.device | str) -> ClipVision:
        """Work on `device` from now on, and return self; loaded weights move there."""
        self._net.to(device)
        return self

    def describe(self) -> dict[str, str]:
        """Name and file."""
        return {"name": "clip_vision", "path": str(self._path)}


def preprocess(images: torch.Tensor, *, size: int) -> torch.Tensor:
    """`images` [B, 3, H, W] in [-1, 1] as the float32 [B, 3, size, size] that CLIP was trained on.

    Bicubic without antialiasing, whatever the aspect; mapped to [0, 1], not clamped; then (x - mean) / std per channel. spec/wan.md 7.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ConfigError(f"CLIP takes float images [B, 3, H, W] in [-1, 1], got {images.dtype} {list(images.shape)}")
    resized = torch.nn.functional.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (resized * 0.5 + 0.5 - mean) / std


def open_clip(path: str | Path) -> CLIPWeights:
    """Open and check the vision half without reading it.

    Raises `CheckpointError`: no such file (where to get it), truncated, or tensors missing, left over or misshapen (named).
    """
    file = open_container(path, hint=CLIP_MISSING)
    file.require_tensors_only()
    strangers = sorted(name for name in file if not name.startswith(("visual.", *_OTHER_HALF)))
    if strangers:
        raise CheckpointError(f"{file.path} is not the CLIP file of Wan2.1: it holds {listed(strangers)}")
    shapes = {name.removeprefix("visual."): shape for name, shape in shapes_of(file).items() if name.startswith("visual.")}
    shape = _shape_of(shapes, path=file.path)
    network = f"a CLIP vision encoder of {shape.layers} layers and width {shape.dim}"
    check_keys(str(file.path), shapes=shapes, expected=shape.tensors(), network=network)
    file.require_floats(f"visual.{name}" for name in shapes)
    return CLIPWeights(file=file, shape=shape)


def load_clip(weights: CLIPWeights, *, device: torch.device | str, dtype: torch.dtype) -> CLIPVisionModel:
    """transformers' vision model filled tensor by tensor from the file, on `device`."""
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
    # transformers before version 5 has one level more
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    state = {}
    for name, (original, take) in sources(shape).items():
        state[prefix + name] = take(weights.file[f"visual.{original}"].to(device).to(dtype))
    model.load_state_dict(state, strict=True, assign=True)
    positions = torch.arange(1 + shape.grid**2, device=device)[None]
    model.get_submodule(f"{prefix}embeddings").position_ids = positions  # not stored, so still on meta
    return model.eval().requires_grad_(False)


def sources(shape: CLIPShape) -> Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """For every tensor of transformers' vision model: the original name (without `visual.`), and what to take of that tensor."""
    found: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "embeddings.class_embedding": ("cls_embedding", torch.flatten),
        "embeddings.patch_embedding.weight": ("patch_embedding.weight", _whole),
        "embeddings.position_embedding.weight": ("pos_embedding", partial(torch.squeeze, dim=0)),
    }
    pairs = [("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm")]
    for i in range(shape.layers):
        theirs, ours = f"encoder.layers.{i}", f"transformer.{i}"
        pairs += [(f"{theirs}.layer_norm1", f"{ours}.norm1"), (f"{theirs}.layer_norm2", f"{ours}.norm2")]
        pairs += [(f"{theirs}.self_attn.out_proj", f"{ours}.attn.proj")]
        pairs += [(f"{theirs}.mlp.fc1", f"{ours}.mlp.0"), (f"{theirs}.mlp.fc2", f"{ours}.mlp.2")]
        for part in ("weight", "bias"):
            for third, side in enumerate("qkv"):
                found[f"{theirs}.self_attn.{side}_proj.{part}"] = (f"{ours}.attn.to_qkv.{part}", partial(_third, number=third))
    for theirs, ours in pairs:
        for part in ("weight", "bias"):
            found[f"{theirs}.{part}"] = (f"{ours}.{part}", _whole)
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _third(tensor: torch.Tensor, number: int) -> torch.Tensor:
    return tensor.chunk(3)[number].clone()  # a view would keep the other two alive


def _shape_of(shapes: Mapping[str, tuple[int, ...]], *, path: Path) -> CLIPShape:
    try:
        dim, _, patch, _ = shapes["patch_embedding.weight"]
        tokens = shapes["pos_embedding"][1]
        mlp_dim, _ = shapes["transformer.0.mlp.0.weight"]
        _, projection = shapes[_UNUSED]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} holds no CLIP vision encoder ({error}); expected visual.* of {Path(CLIP_FILE).name}") from error
    grid = math.isqrt(max(tokens - 1, 0))
    if grid**2 + 1 != tokens or dim % HEAD_DIM:
        raise CheckpointError(f"{path}: {tokens} positions are not 1 + a square, or width {dim} is no multiple of the head size {HEAD_DIM}")
    layers = 1 + max(int(match[1]) for name in shapes if (match := _LAYER_KEY.fullmatch(name)))
    return CLIPShape(dim=dim, mlp_dim=mlp_dim, layers=layers, heads=dim // HEAD_DIM, patch=patch, grid=grid, projection=projection)
