"""A umT5 of a few thousand parameters and a tokenizer for it, in the layout of the public files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.encoders.umt5_weights import UMT5Shape

# no two sizes are equal, and heads * head_dim is not dim: a transposed or swapped tensor cannot fit
# by accident
TINY = UMT5Shape(vocab=48, dim=24, heads=3, head_dim=10, ffn_dim=40, layers=2, buckets=32)
WORDS = ("red", "square", "moves", "left", "a", "cat")


def random_umt5(shape: UMT5Shape = TINY, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights by original name; logits, position biases and both halves of the gate
    matter.
    """
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in shape.tensors().items():
        noise = torch.randn(size, generator=draw)
        if len(size) == 1:
            state[name] = 1 + 0.3 * noise
        elif "embedding" in name:
            state[name] = noise
        else:
            state[name] = noise / size[1] ** 0.5
    return state


def save_tokenizer(folder: Path, *, vocab: int = 40) -> Path:
    """Write tokenizer.json with `vocab` pieces: <pad> 0, </s> 1, <unk> 2, a few words, letters; as
    in sentencepiece, the mark of a space begins a word. Skips where tokenizers is missing.
    """
    pytest.importorskip("tokenizers", reason="umT5's words: pip install 'rcm[text]'")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz.,&'"]
    tokenizer = Tokenizer(models.Unigram(pieces[:vocab], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=7)  # the real file may carry such settings; they must not leak
    tokenizer.enable_truncation(max_length=5)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_umt5(folder: Path, *, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write weights under the public file's name and a tokenizer at its usual place beside them;
    returns the weights' path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(random_umt5() if state is None else state, path)
    save_tokenizer(folder / "google" / "umt5-xxl")
    return path
