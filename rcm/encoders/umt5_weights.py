"""umT5's encoder weights: names and shapes of the original file, the map to transformers' names, and filling transformers' encoder.

spec/wan.md 2.3 and 5. Precision: every weight has the dtype asked for, `wo` included. transformers' own loader may keep `wo` in float32;
the original ran everything in bfloat16, and that is what is repeated here. So is its order of rounding in the attention ("eager"): logits
rounded, bias added, softmax in float32, rounded; fused attention kernels keep the logits in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.text_extra import text_extra
from rcm.storage.state_dicts import check_keys, listed, shapes_of
from rcm.storage.weight_files import WeightFile, open_container

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

UMT5_FILE = "assets/checkpoints/models_t5_umt5-xxl-enc-bf16.pth"
UMT5_MISSING = (
    "the umT5 encoder is published as models_t5_umt5-xxl-enc-bf16.pth (11.4 GB) at https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B: "
    "huggingface-cli download Wan-AI/Wan2.1-T2V-1.3B models_t5_umt5-xxl-enc-bf16.pth --local-dir assets/checkpoints; "
    "if you have it elsewhere, say so with --text_encoder_path"
)
MAX_DISTANCE = 128  # of the relative position buckets; not stored
NORM_EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float32)

_EMBEDDING = "token_embedding.weight"
_TIED = "encoder.embed_tokens.weight"  # the second name that transformers has for the token embedding
_TOP = {_EMBEDDING: "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    **{f"attn.{side}.weight": f"layer.0.SelfAttention.{side}.weight" for side in "qkvo"},
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}
_ORIGINAL_KEY = re.compile(r"blocks\.(\d+)\.(.+)")
_TRANSFORMERS_KEY = re.compile(r"encoder\.block\.(\d+)\.(.+)")


@dataclass(frozen=True)
class UMT5Shape:
    """Sizes of a umT5 encoder; the defaults are umt5-xxl's."""

    vocab: int = 256384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    layers: int = 24
    buckets: int = 32

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its original name."""
        inner = self.heads * self.head_dim
        block = {
            "norm1.weight": (self.dim,),
            **{f"attn.{side}.weight": (inner, self.dim) for side in "qkv"},
            "attn.o.weight": (self.dim, inner),
            "pos_embedding.embedding.weight": (self.buckets, self.heads),
            "norm2.weight": (self.dim,),
            "ffn.gate.0.weight": (self.ffn_dim, self.dim),
            "ffn.fc1.weight": (self.ffn_dim, self.dim),
            "ffn.fc2.weight": (self.dim, self.ffn_dim),
        }
        shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (self.vocab, self.dim), "norm.weight": (self.dim,)}
        for i in range(self.layers):
            shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        return shapes


def transformers_name(original: str) -> str:
    """The name transformers' UMT5EncoderModel has for an original tensor; `CheckpointError` for one that umT5 does not have."""
    return _mapped(original, _TOP, _BLOCK, _ORIGINAL_KEY, "encoder.block.{}.{}")


def original_name(transformers: str) -> str:
    """The original name of a tensor of transformers' UMT5EncoderModel; the tied second name of the embedding gives the same one."""
    return _mapped("shared.weight" if transformers == _TIED else transformers, _TOP_BACK, _BLOCK_BACK, _TRANSFORMERS_KEY, "blocks.{}.{}")


def shape_of(shapes: Mapping[str, tuple[int, ...]], *, path: Path) -> UMT5Shape:
    """The sizes that tensors with original names and these `shapes` imply; `CheckpointError` where they imply none."""
    try:
        vocab, dim = shapes[_EMBEDDING]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        inner, _ = shapes["blocks.0.attn.q.weight"]
        ffn_dim, _ = shapes["blocks.0.ffn.fc1.weight"]
    except (KeyError, ValueError) as error:
        found = listed(sorted(shapes)) or "no tensor of it"
        raise CheckpointError(f"{path} is no umT5 encoder ({error}); it holds {found}") from error
    if inner % heads:
        raise CheckpointError(f"{path}: query width {inner} is no multiple of the {heads} heads of the position bias")
    layers = 1 + max(int(match[1]) for name in shapes if (match := _ORIGINAL_KEY.fullmatch(name)))
    return UMT5Shape(vocab=vocab, dim=dim, heads=heads, head_dim=inner // heads, ffn_dim=ffn_dim, layers=layers, buckets=buckets)


@dataclass(frozen=True)
class UMT5Weights:
    """A file that was found to hold exactly one umT5 encoder: `names` gives the stored name of every original one."""

    file: WeightFile
    names: Mapping[str, str]
    shape: UMT5Shape


def open_umt5(path: str | Path) -> UMT5Weights:
    """Open and check umT5 weights with original or transformers' names without reading them.

    Raises `CheckpointError`: no such file (where to get it), truncated, no umT5, or tensors missing, left over or misshapen (named).
    """
    file = open_container(path, hint=UMT5_MISSING)
    file.require_tensors_only()
    names = {name: name for name in file}
    if "shared.weight" in names or _TIED in names:
        names = _from_transformers(file)
    stored = shapes_of(file)
    shapes = {name: stored[place] for name, place in names.items()}
    shape = shape_of(shapes, path=file.path)
    network = f"a umT5 encoder of {shape.layers} layers and width {shape.dim}"
    check_keys(str(file.path), shapes=shapes, expected=shape.tensors(), network=network)
    file.require_floats(names.values())
    return UMT5Weights(file=file, names=names, shape=shape)


def empty_umt5(shape: UMT5Shape) -> UMT5EncoderModel:
    """transformers' encoder of this shape on the meta device, with its embedding tied and attention that rounds as the original."""
    transformers = text_extra("transformers", purpose="the umT5 text encoder")
    config = transformers.UMT5Config(
        vocab_size=shape.vocab,
        d_model=shape.dim,
        d_kv=shape.head_dim,
        d_ff=shape.ffn_dim,
        num_layers=shape.layers,
        num_heads=shape.heads,
        relative_attention_num_buckets=shape.buckets,
        relative_attention_max_distance=MAX_DISTANCE,
        layer_norm_epsilon=NORM_EPS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    # one module under two names: two parameters over one storage would part at the next move to another device
    model.set_input_embeddings(model.shared)
    return model


def load_umt5(weights: UMT5Weights, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> UMT5EncoderModel:
    """transformers' encoder filled tensor by tensor from the file, on `device`; nothing is held twice.

    On the CPU in the dtype of a torch pickle the parameters are views of the mapped file: do not overwrite it while they are in use.
    Raises `ConfigError` for a dtype other than bfloat16 and float32 (umT5 overflows in float16).
    """
    if dtype not in DTYPES:
        raise ConfigError(f"umT5 runs in bfloat16 or float32 (it overflows in float16), got dtype={dtype}")
    model = empty_umt5(weights.shape)
    state = {transformers_name(name): weights.file[place].to(device).to(dtype) for name, place in weights.names.items()}
    state[_TIED] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _mapped(name: str, top: Mapping[str, str], block: Mapping[str, str], pattern: re.Pattern[str], form: str) -> str:
    if name in top:
        return top[name]
    match = pattern.fullmatch(name)
    if match is None or match[2] not in block:
        raise CheckpointError(f"{name} is no tensor of a umT5 encoder")
    return form.format(match[1], block[match[2]])


def _from_transformers(file: WeightFile) -> dict[str, str]:
    """Stored name of every original name; foreign names stay as they are, so that the check of names reports them."""
    kept = _without_tied_copy(file)
    names = {_original_or_same(name): name for name in kept}
    if len(names) < len(kept):
        twice = sorted(set(kept) - set(names.values()))
        raise CheckpointError(f"{file.path} holds tensors under two names: {listed(twice)}")
    return names


def _original_or_same(name: str) -> str:
    try:
        return original_name(name)
    except CheckpointError:
        return name


def _without_tied_copy(file: WeightFile) -> list[str]:
    if not {"shared.weight", _TIED} <= file.keys():
        return list(file)
    if not torch.equal(file["shared.weight"], file[_TIED]):
        raise CheckpointError(f"{file.path}: shared.weight and {_TIED} differ, but umT5's encoder has one token embedding")
    return [name for name in file if name != _TIED]
