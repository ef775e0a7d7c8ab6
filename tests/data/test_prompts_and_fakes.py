from __future__ import annotations

import json

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.data.fake import FakeLatents
from rcm.data.loader import Loader
from rcm.data.prompts import Prompts, read_prompts


def encode(prompts):
    return torch.tensor([[[float(len(p))]] for p in prompts], dtype=torch.float64)


def test_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\n  second one  \nthird é\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["first", "second one", "third é"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": p, "id": 1}) for p in ("first", "", "third")))
    assert read_prompts(tmp_path / "a.jsonl") == ["first", "", "third"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "prompt\na cat\n", r"a\.csv would be read line by line"),
        ("a.JSON", '["a cat"]', r"a\.JSON would be read line by line"),
        ("a.JSONL", '{"text": "x"}', r'a\.JSONL:1 needs a "prompt"'),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}', r'a\.jsonl:2 needs a "prompt"'),
        ("a.jsonl", "{", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", '{"prompt": 3}', "needs a"),
        ("a.jsonl", '{"prompt": "a \\ud800 b"}', r"a\.jsonl:1 is not JSON.*surrogates not allowed"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}', r"a\.jsonl:1 is not JSON.*'prompt' is given twice"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=word):
        read_prompts(tmp_path / name)
    with pytest.raises(ConfigError, match="no prompt file"):
        read_prompts(tmp_path / "other.txt")


def test_prompt_source():
    source = Prompts(["a", "bb", "ccc"], encode=encode)
    batch = source.fetch([2, 0])
    assert batch.prompts == ["ccc", "a"] and batch.text.flatten().tolist() == [3, 1] and batch.text.dtype == torch.float32
    assert sorted(next(Loader(source, batch_size=3)).prompts) == ["a", "bb", "ccc"]
    assert source.fingerprint() != Prompts(["a", "bb"], encode=encode).fingerprint()
    with pytest.raises(ConfigError, match="at least one prompt"):
        Prompts([], encode=encode)


def test_fakes_are_functions_of_their_number():
    options = {"num": 6, "latent_shape": (4, 3, 2, 2), "text_shape": (5, 8)}
    source = FakeLatents(**options)
    a, b = source.fetch([4, 1]), FakeLatents(**options).fetch([1, 4])
    assert torch.equal(a.latents[0], b.latents[1]) and torch.equal(a.cond[1], b.cond[0])
    assert a.latents.shape == (2, 4, 3, 2, 2) and a.cond.shape == (2, 5, 8) and a.trajectory is None
    assert not torch.equal(a.latents[0], a.latents[1])
    assert (a.cond[:, -2:] == 0).all() and (a.cond[:, :-2] != 0).all()
    assert not torch.equal(a.latents, FakeLatents(**options, seed=1).fetch([4, 1]).latents)
    assert len(source) == 6 and source.fingerprint() != FakeLatents(**options, seed=1).fingerprint()


def test_fake_trajectories_begin_clean():
    batch = FakeLatents(num=2, latent_shape=(4, 3, 2, 2), text_shape=(2, 8), trajectory_states=4).fetch([0, 1])
    assert batch.trajectory.shape == (2, 4, 4, 3, 2, 2)
    assert torch.equal(batch.trajectory[:, 0], batch.latents)
    assert not torch.equal(batch.trajectory[:, 3], batch.latents)
