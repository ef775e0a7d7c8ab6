"""umT5 as loaded here against the T5 formulas written out in float64, and against transformers
filled by its own loader in bfloat16.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from rcm.encoders.umt5 import UMT5TextEncoder
from tests.support.tiny_umt5 import TINY, random_umt5, save_tokenizer, save_umt5

LONG = "a red cat moves left, a square cat. " * 16  # 160 tokens: distances beyond the last bucket
PROMPTS = ["a red square moves left", "", LONG, "cat"]
TEXT_LEN = 192


def bucket(rel: int) -> int:
    """Bucket of key position minus query position: 16 per direction, 8 exact, 8 logarithmic up to
    distance 128. docs/reference/encoders.md#umt5.
    """
    side, distance = (16, rel) if rel > 0 else (0, -rel)
    if distance < 8:
        return side + distance
    return side + min(15, 8 + math.floor(math.log(distance / 8) / math.log(16) * 8 + 1e-9))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def oracle(weights: dict[str, torch.Tensor], ids: list[int], *, heads: int) -> torch.Tensor:
    """Rows [len(ids), dim] in float64. No pads and so no mask: masked keys must count for
    nothing.
    """
    w = {name: value.double() for name, value in weights.items()}
    buckets = torch.tensor([[bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    x = w["token_embedding.weight"][ids]
    for i in range(TINY.layers):
        p = f"blocks.{i}."
        h = rms(x, w[p + "norm1.weight"])
        q, k, v = ((h @ w[f"{p}attn.{side}.weight"].T).unflatten(1, (heads, -1)).transpose(0, 1) for side in "qkv")
        logits = q @ k.transpose(1, 2) + w[p + "pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        mixed = (torch.softmax(logits, -1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w[p + "attn.o.weight"].T
        h = rms(x, w[p + "norm2.weight"])
        g = h @ w[p + "ffn.gate.0.weight"].T
        gelu = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        x = x + ((h @ w[p + "ffn.fc1.weight"].T) * gelu) @ w[p + "ffn.fc2.weight"].T
    return rms(x, w["norm.weight"])


def ids_of(encoder: UMT5TextEncoder, prompt: str) -> list[int]:
    return encoder._source._tokenizer.tokens(prompt.strip(), text_len=TEXT_LEN).ids


def encoder_of(path: Path, **options: object) -> UMT5TextEncoder:
    return UMT5TextEncoder.from_files(path, text_len=TEXT_LEN, **{"dtype": torch.float32, **options})


def test_rows_equal_the_formulas_in_float64(tmp_path: Path) -> None:
    state = random_umt5()
    encoder = encoder_of(save_umt5(tmp_path, state=state))
    out = encoder.encode(PROMPTS)
    for padded, prompt in zip(out, PROMPTS, strict=True):
        ids = ids_of(encoder, prompt)
        expected = oracle(state, ids, heads=TINY.heads)
        assert expected.abs().max() > 1
        assert (padded[: len(ids)].double() - expected).abs().max() <= 1e-5
        assert bool((padded[len(ids) :] == 0).all())
    assert len(ids_of(encoder, LONG)) > 140


def peer(tmp_path: Path) -> tuple[UMT5EncoderModel, Path]:
    """transformers' encoder with its own random weights, saved and loaded by its own means."""
    torch.manual_seed(3)
    config = UMT5Config(
        vocab_size=TINY.vocab, d_model=TINY.dim, d_kv=TINY.head_dim, d_ff=TINY.ffn_dim, num_layers=TINY.layers, num_heads=TINY.heads
    )
    net = UMT5EncoderModel(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path / "text_encoder"
    net.save_pretrained(folder)
    return UMT5EncoderModel.from_pretrained(folder).eval(), folder


@torch.no_grad()
def test_bfloat16_is_bfloat16_everywhere(tmp_path: Path) -> None:
    """Every operation rounded as the original's: equal, bit for bit, to the peer cast as a whole,
    with eager attention.
    """
    _, folder = peer(tmp_path)
    net = UMT5EncoderModel.from_pretrained(folder, attn_implementation="eager").eval()
    save_tokenizer(tmp_path / "tokenizer")
    encoder = encoder_of(folder, dtype=torch.bfloat16)
    encoder.load()
    assert {p.dtype for p in encoder.load().parameters()} == {torch.bfloat16}
    ids = ids_of(encoder, PROMPTS[0])
    padded = torch.tensor([ids + [0] * (TEXT_LEN - len(ids))])
    expected = net.to(torch.bfloat16)(input_ids=padded, attention_mask=(torch.arange(TEXT_LEN) < len(ids)).long()[None])
    out = encoder.encode(PROMPTS[:1])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[0, : len(ids)], expected.last_hidden_state[0, : len(ids)])
