"""umT5's encoder weights: names and shapes of the original file, the map to transformers' names,
and filling transformers' encoder.

docs/reference/encoders.md#umt5-weights, #umt5. Precision: every weight has the dtype asked for,
`wo` included. transformers' own loader may keep `wo` in float32; the original ran everything in
bfloat16, and that is what is repeated here. So is its order of rounding in the attention ("eager"):
logits rounded, bias added, softmax in float32, rounded; fused attention kernels keep the logits in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rcm.core.errors import CheckpointError, ConfigError
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
from rcm.storage.weight_files import WeightFile, open_container

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

UMT5_FILE = "assets/checkpoints/models_t5_umt5-xxl-enc-bf16.pth"
UMT5_MISSING = (
    "the umT5 encoder is published as models_t5_umt5-xxl-enc-bf16.pth (11.4 GB) at"
    " https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B: hf download"
    " Wan-AI/Wan2.1-T2V-1.3B models_t5_umt5-xxl-enc-bf16.pth --local-dir assets/checkpoints; if you"
    " have it elsewhere, say so with --text_encoder_path"
)
MAX_DISTANCE = 128  # of the relative position buckets; not stored
NORM_EPS = 1e-6

_BLOCK, _THEIR_BLOCK = "blocks.{}.", "encoder.block.{}."
# the two names that transformers has for the token embedding
_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class UMT5Shape(PublishedShape):
    """Sizes of a umT5 encoder; the defaults are umt5-xxl's."""

    vocab: int = 256384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    layers: int = 24
    buckets: int = 32

    def rows(self) -> list[Row]:
        """Every tensor: embedding, norm; per block attention, position bias, gated MLP."""
        dim, inner, wide = self.dim, self.heads * self.head_dim, self.ffn_dim
        attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
        block = [
            Row("norm1.weight", ("layer.0.layer_norm.weight",), (dim,)),
            *(
                Row(f"attn.{side}.weight", (f"{attention}.{side}.weight",), (inner, dim))
                for side in "qkv"
            ),
            Row("attn.o.weight", (f"{attention}.o.weight",), (dim, inner)),
            Row(
                "pos_embedding.embedding.weight",
                (f"{attention}.relative_attention_bias.weight",),
                (self.buckets, self.heads),
            ),
            Row("norm2.weight", ("layer.1.layer_norm.weight",), (dim,)),
            Row("ffn.gate.0.weight", (f"{dense}.wi_0.weight",), (wide, dim)),
            Row("ffn.fc1.weight", (f"{dense}.wi_1.weight",), (wide, dim)),
            Row("ffn.fc2.weight", (f"{dense}.wo.weight",), (dim, wide)),
        ]
        return [
            Row("token_embedding.weight", (_SHARED,), (self.vocab, dim)),
            Row("norm.weight", ("encoder.final_layer_norm.weight",), (dim,)),
            *repeated(block, self.layers, ours=_BLOCK, theirs=_THEIR_BLOCK),
        ]


def shape_of(shapes: Mapping[str, tuple[int, ...]], *, path: Path) -> UMT5Shape:
    """Sizes of a network with tensors of these `shapes`; `CheckpointError` if it is no umT5."""
    try:
        vocab, dim = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        inner, _ = shapes["blocks.0.attn.q.weight"]
        ffn_dim, _ = shapes["blocks.0.ffn.fc1.weight"]
    except (KeyError, ValueError) as error:
        found = listed(sorted(shapes)) or "no tensor of it"
        raise CheckpointError(f"{path} is no umT5 encoder ({error}); it holds {found}") from error
    if inner % heads:
        raise CheckpointError(
            f"{path}: query width {inner} is no multiple of the {heads} heads of the position bias"
        )
    layers = count_blocks(shapes, _BLOCK)
    return UMT5Shape(vocab, dim, heads, inner // heads, ffn_dim, layers, buckets)


def open_umt5(path: str | Path) -> PublishedWeights[UMT5Shape]:
    """Open and check umT5 weights, with original or transformers' names, without reading them.

    `CheckpointError` says what is wrong, and where the file is published.
    """
    file = open_container(path, hint=UMT5_MISSING)
    file.require_tensors_only()
    names = {name: name for name in file}
    if {_SHARED, _TIED} & file.keys():
        names = _from_transformers(file)
    return checked(file, names, shape_of=shape_of, network="a umT5 encoder")


def empty_umt5(shape: UMT5Shape) -> UMT5EncoderModel:
    """transformers' encoder on the meta device: tied embedding, attention rounds as original."""
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
    # one module under two names: two parameters over one storage would part at the next move to
    # another device
    model.set_input_embeddings(model.shared)
    return model


def require_dtype(dtype: torch.dtype) -> None:
    """`ConfigError` for another dtype than bfloat16 and float32: umT5 overflows in float16."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"umT5 runs in bfloat16 or float32 (it overflows in float16), got dtype={dtype}"
        )


def load_umt5(
    weights: PublishedWeights[UMT5Shape],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
) -> UMT5EncoderModel:
    """transformers' encoder over the file (see `fill`), on `device`; raises as `require_dtype`."""
    require_dtype(dtype)
    model = empty_umt5(weights.shape)
    fill(model, weights, device=device, dtype=dtype, tied={_TIED: _SHARED})
    return model.eval().requires_grad_(False)


def _from_transformers(file: WeightFile) -> dict[str, str]:
    """Stored name of every original name; foreign names stay, for the check to report."""
    kept = [name for name in file if name != _TIED or _SHARED not in file]
    if len(kept) < len(file) and not torch.equal(file[_SHARED], file[_TIED]):
        raise CheckpointError(
            f"{file.path}: {_SHARED} and {_TIED} differ, but umT5's encoder has one token embedding"
        )
    original = {
        row.theirs[0]: row.ours for row in UMT5Shape(layers=count_blocks(kept, _THEIR_BLOCK)).rows()
    }
    original[_TIED] = original[_SHARED]
    names = {original.get(name, name): name for name in kept}
    if len(names) < len(kept):
        raise CheckpointError(
            f"{file.path} holds tensors under two names:"
            f" {listed(sorted(set(kept) - set(names.values())))}"
        )
    return names
