"""The umT5 text encoder: shape of the result, lifetime of the weights, cache, and what it
refuses.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch

from rcm.core.errors import CheckpointError, ConfigError, NonFinite
from rcm.encoders import umt5
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.encoders.text_protocol import TextEncoder
from rcm.encoders.umt5 import UMT5TextEncoder
from tests.support.tiny_umt5 import TINY, random_umt5, save_tokenizer, save_umt5

PROMPTS = ["a red square moves left", "", "cat", "a  red square\nmoves left"]
TEXT_LEN = 24


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_umt5(tmp_path / "checkpoints")


def opened(path: Path, **options: object) -> UMT5TextEncoder:
    return UMT5TextEncoder.from_files(path, **{"text_len": TEXT_LEN, "dtype": torch.float32, **options})


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(umt5, "load_umt5", refuse)


def test_rows_then_exact_zeros(weights: Path) -> None:
    encoder = opened(weights, dtype=torch.bfloat16)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.text_len, encoder.text_dim, encoder.negative_prompt) == (TEXT_LEN, TINY.dim, NEGATIVE_PROMPT)
    out = encoder.encode(PROMPTS)
    assert (out.shape, out.dtype, out.requires_grad) == ((4, TEXT_LEN, TINY.dim), torch.bfloat16, False)
    lengths = (out != 0).any(-1).sum(1).tolist()
    # words (all are pieces) and the end of the sentence; the empty prompt is that alone
    assert lengths == [6, 1, 2, 6]
    for row, length in zip(out, lengths, strict=True):
        assert bool((row[:length] != 0).any(-1).all())
        assert bool((row[length:] == 0).all())
    assert torch.equal(out[0], out[3])  # cleaned to the same text
    assert encoder.encode([]).shape == (0, TEXT_LEN, TINY.dim)


def test_a_batch_gives_the_rows_of_single_prompts_bit_for_bit(weights: Path) -> None:
    encoder = opened(weights, dtype=torch.bfloat16)
    together = encoder.encode(PROMPTS)
    apart = torch.cat([encoder.encode([prompt]) for prompt in reversed(PROMPTS)]).flip(0)
    assert torch.equal(together, apart)


def test_the_length_of_the_padding_does_not_matter(weights: Path) -> None:
    """Pads are masked inside the network."""
    short, long = opened(weights, text_len=7).encode(PROMPTS), opened(weights, text_len=100).encode(PROMPTS)
    assert (short - long[:, :7]).abs().max() <= 1e-5
    assert bool((long[:, 7:] == 0).all())


def test_the_default_length_is_512(weights: Path) -> None:
    assert UMT5TextEncoder.from_files(weights).encode(["cat"]).shape == (1, 512, TINY.dim)


def test_weights_are_read_at_the_first_prompt_and_freed(weights: Path) -> None:
    encoder = opened(weights)
    assert not encoder.is_loaded
    encoder.encode(["cat"])
    assert encoder.is_loaded
    storages = [weakref.ref(p) for p in encoder.load().parameters()]
    encoder.unload()
    assert not encoder.is_loaded
    assert [ref() for ref in storages] == [None] * len(storages)
    with encoder.loaded() as inside:
        inside.load()
        assert inside.is_loaded
    assert not encoder.is_loaded

    def fails_inside() -> None:
        with encoder.loaded():
            encoder.load()
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()
    assert not encoder.is_loaded


def test_moving_takes_the_weights_along(weights: Path) -> None:
    encoder = opened(weights)
    assert encoder.to("meta").device == torch.device("meta")
    assert not encoder.is_loaded
    encoder.to("cpu").load()
    net = encoder.to("meta").load()
    assert all(p.is_meta for p in net.parameters())
    assert net.shared is net.encoder.embed_tokens


@pytest.mark.gpu
def test_gpu_memory_returns(weights: Path) -> None:
    x = torch.ones(8, 8, device="cuda")
    x @ x  # cuBLAS keeps 32 MiB from its first product on
    del x
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    encoder = opened(weights, device="cuda")
    out = encoder.encode(["cat"]).cpu()
    assert (out - opened(weights).encode(["cat"])).abs().max() < 1e-2
    encoder.unload()
    assert torch.cuda.memory_allocated() <= before[0]
    assert torch.cuda.memory_reserved() <= before[1]
    encoder.load()
    encoder.to("cpu")
    assert torch.cuda.memory_allocated() <= before[0]


def test_cached_prompts_never_touch_the_weights(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(weights, cache=tmp_path / "cache").encode(PROMPTS)
    forbid_loading(monkeypatch)
    again = opened(weights, cache=tmp_path / "cache")
    assert torch.equal(again.encode(PROMPTS), first)
    assert not again.is_loaded
    with pytest.raises(AssertionError, match="weights were read"):
        again.encode(["square"])
    with pytest.raises(AssertionError, match="weights were read"):
        opened(weights).encode(["cat"])  # no cache was asked for


def test_the_cache_knows_weights_tokenizer_length_and_dtype(
    weights: Path, tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    opened(weights, cache=cache).encode(["cat"])
    other = save_umt5(tmp_path / "other", state=random_umt5(seed=1))
    words = save_tokenizer(tmp_path / "words", vocab=30)
    forbid_loading(monkeypatch)
    opened(weights, cache=cache).encode(["cat"])
    for changed in (
        opened(other, cache=cache),
        opened(weights, cache=cache, tokenizer=words),
        opened(weights, cache=cache, text_len=TEXT_LEN + 1),
        opened(weights, cache=cache, dtype=torch.bfloat16),
    ):
        with pytest.raises(AssertionError, match="weights were read"):
            changed.encode(["cat"])
    assert not warned  # other entries, not damaged ones


def test_a_long_prompt_says_what_was_cut_also_from_the_cache(weights: Path, tmp_path: Path, warned: list[str]) -> None:
    encoder = opened(weights, text_len=4, cache=tmp_path / "cache")
    out = encoder.encode(["a red square moves left", "a red cat"])
    assert len(warned) == 1
    assert "longer than 4 tokens" in warned[0]
    assert "left out: 'moves left'" in warned[0]
    assert bool((out != 0).any(-1).all())
    encoder.encode(["a red square moves left"])
    assert len(warned) == 2
    assert warned[0] == warned[1]
    # the kept tokens are the first three and the end of the sentence: the same as of the prompt
    # that ends there
    assert torch.equal(out[0], encoder.encode(["a red square"])[0])


def test_long_cuts_are_abridged(weights: Path, warned: list[str]) -> None:
    opened(weights, text_len=2).encode(["cat " * 200])
    assert "(" in warned[0] and "characters)" in warned[0]
    assert len(warned[0]) < 600


def test_damaged_entries_are_made_again_with_a_warning(weights: Path, tmp_path: Path, warned: list[str]) -> None:
    encoder = opened(weights, cache=tmp_path / "cache")
    good = encoder.encode(["cat"])
    entry = encoder._cache.path("cat")
    entry.write_bytes(entry.read_bytes()[:-10])
    assert torch.equal(encoder.encode(["cat"]), good)
    assert len(warned) == 1 and "damaged" in warned[0] and entry.name in warned[0]
    assert torch.equal(encoder.encode(["cat"]), good)
    assert len(warned) == 1


def test_values_that_are_not_finite_stop_and_are_not_cached(tmp_path: Path) -> None:
    state = random_umt5()
    state["blocks.1.ffn.fc2.weight"][0, 0] = float("nan")
    encoder = opened(save_umt5(tmp_path, state=state), cache=tmp_path / "cache")
    with pytest.raises(NonFinite, match=r"damaged weights in .*models_t5"):
        encoder.encode(["cat"])
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_damaged_after_opening_leaves_nothing_loaded(weights: Path) -> None:
    encoder = opened(weights)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        encoder.encode(["cat"])
    assert not encoder.is_loaded


def test_refusals(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="--text_encoder_path"):
        opened(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="overflows in float16"):
        opened(weights, dtype=torch.float16)
    with pytest.raises(ConfigError, match="text_len must be at least 1"):
        opened(weights, text_len=0)
    with pytest.raises(TypeError, match="wrap it in a list"):
        opened(weights).encode("cat")
    small = {name: value[:20] if name.startswith("token_embedding") else value for name, value in random_umt5().items()}
    torch.save(small, weights)
    with pytest.raises(ConfigError, match="do not belong together"):
        opened(weights)
    (tmp_path / "file").write_text("")
    save_umt5(weights.parent)
    with pytest.raises(ConfigError, match="another folder .--text_cache, cache="):
        opened(weights, cache=tmp_path / "file" / "cache")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"the umT5 text encoder needs .*pip install 'rcm\[text\]'"):
        opened(weights).encode(["cat"])


def test_describe_names_the_files(weights: Path) -> None:
    assert opened(weights).describe() == {"name": "umt5", "path": str(weights), "tokenizer": str(weights.parent / "google" / "umt5-xxl")}


def test_random_embeddings_need_no_files() -> None:
    encoder = UMT5TextEncoder.random(text_len=8, text_dim=16, seed=5)
    assert isinstance(encoder, TextEncoder)
    out = encoder.encode(["a red cat", "", "cat", "a red  cat"])
    assert (out.shape, out.dtype) == ((4, 8, 16), torch.bfloat16)
    assert (out != 0).any(-1).sum(1).tolist() == [4, 1, 2, 4]
    assert torch.equal(out[0], out[3])
    assert not torch.equal(out[0, 0], out[2, 0])
    assert torch.equal(UMT5TextEncoder.random(text_len=8, text_dim=16, seed=5).encode(["cat"])[0], out[2])
    assert not torch.equal(UMT5TextEncoder.random(text_len=8, text_dim=16, seed=6).encode(["cat"])[0], out[2])
    assert UMT5TextEncoder.random().encode(["cat"]).shape == (1, 512, 4096)
    encoder.load()
    encoder.unload()
    assert encoder.describe()["name"] == "random"
    assert encoder.to("meta").encode(["cat"]).is_meta


def test_random_embeddings_cut_long_prompts_aloud(warned: list[str]) -> None:
    out = UMT5TextEncoder.random(text_len=3, text_dim=4).encode(["a red cat runs"])
    assert bool((out != 0).any(-1).all())
    assert "left out: 'cat runs'" in warned[0]
