from __future__ import annotations

import pytest
import torch
from loguru import logger

from rcm.core.errors import ConfigError
from rcm.encoders.text_protocol import TextEncoder
from rcm.worlds.toy_text import ToyTextEncoder, tokens_of, vocabulary, word_vector
from rcm.worlds.toy_world import ToyWorld


def test_embedding_is_words_then_end_then_zeros():
    encoder = ToyTextEncoder()
    out = encoder.encode(["a red circle moving left"])
    assert out.shape == (1, 8, 64) and out.dtype == torch.float32
    assert (out[0, :6].abs().amax(dim=1) > 0).all()
    assert (out[0, 6:] == 0).all()
    red = word_vector("red", dim=64)
    scores = [float(out[0, 1] @ word_vector(word, dim=64)) for word in ("red", "blue", "green", "circle")]
    assert scores[0] == max(scores) and scores[0] > 40
    assert set(red.tolist()) == {-1.0, 1.0}


def test_words_are_nearly_orthogonal():
    words = ["a", "red", "green", "blue", "yellow", "square", "circle", "triangle", "moving", "left", "right", "up", "down", "</s>"]
    vectors = torch.stack([word_vector(word, dim=64) for word in words]) / 8
    off = vectors @ vectors.T - torch.eye(len(words))
    assert off.abs().max() < 0.45
    assert torch.linalg.svdvals(vectors).min() > 0.3


def test_vectors_are_frozen():
    """A trained network depends on these bits: they may never change."""
    assert word_vector("red", dim=16).tolist() == [1, 1, -1, -1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1]
    assert torch.equal(word_vector("red", dim=300)[:256], word_vector("red", dim=256))


def test_order_case_and_company():
    encoder = ToyTextEncoder()
    a, b = encoder.encode(["red circle", "circle red"])
    assert not torch.allclose(a, b)
    twice = encoder.encode(["red red"])[0]
    assert not torch.allclose(twice[0], twice[1])
    assert torch.equal(encoder.encode(["Red  circle!"]), encoder.encode(["red circle"]))
    together = encoder.encode(["a red circle", "", "a blue square"])
    assert torch.equal(together[2], encoder.encode(["a blue square"])[0])


def test_empty_prompt_is_one_end_token():
    encoder = ToyTextEncoder()
    empty = encoder.encode([encoder.negative_prompt])[0]
    assert tokens_of("") == ["</s>"]
    assert empty[0].abs().max() > 0 and (empty[1:] == 0).all()
    assert not torch.equal(empty, encoder.encode(["a"])[0])


def test_every_caption_of_the_world_is_distinct():
    encoder = ToyTextEncoder()
    out = encoder.encode(ToyWorld().prompts()).flatten(1)
    assert len({tuple(row.tolist()) for row in out}) == 48
    assert isinstance(encoder, TextEncoder)


def test_too_long_prompt_is_refused():
    with pytest.raises(ConfigError, match="text_len=8"):
        ToyTextEncoder().encode(["one two three four five six seven eight"])
    with pytest.raises(ConfigError, match="even text_dim"):
        ToyTextEncoder(text_dim=7)


def test_words_of_the_training_captions_are_known_and_others_told():
    encoder = ToyTextEncoder(words=list(vocabulary(ToyWorld().prompts())))
    assert encoder.words == ("a", "blue", "cross", "down", "green", "left", "moving", "red", "right", "square", "triangle", "up", "yellow")
    told: list[str] = []
    sink = logger.add(lambda message: told.append(message.record["message"]), level="WARNING")
    try:
        encoder.encode(["A Red square, moving left", ""])
        assert not told
        rows = encoder.encode(["a purple dog moving left, purple"])
    finally:
        logger.remove(sink)
    assert len(told) == 1
    assert "'purple', 'dog' are new to this checkpoint" in told[0] and told[0].endswith("square, triangle, up, yellow")
    assert torch.equal(rows, ToyTextEncoder().encode(["a purple dog moving left, purple"])), "the bits do not depend on what is known"
    assert ToyTextEncoder().unknown_words("a purple dog") == [], "nothing is known of an older checkpoint's words"
    assert vocabulary(["a b", "c d"], limit=3) == ()
