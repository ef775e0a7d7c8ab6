"""Cleaning, against strings whose clean form is known."""

from __future__ import annotations

import hashlib
import sys

import pytest

from rcm.core.errors import ConfigError
from rcm.encoders.prompt_cleaning import (
    NEGATIVE_PROMPT,
    NEGATIVE_PROMPT_FLF2V,
    NEGATIVE_PROMPT_I2V,
    checked_prompts,
    clean_prompt,
    says_nothing,
)

# of docs/reference/encoders.md#umt5
DIGEST = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  A  Cat\t\n runs ", "A Cat runs"),
        ("", ""),
        (" \n\t", ""),
        ("cat &amp; dog", "cat & dog"),
        # with a tag, ftfy leaves entities alone: two passes are needed
        ("<b>cat &amp;amp; dog", "<b>cat & dog"),
        ("a&nbsp; cat", "a cat"),
        ("schÃ¶n", "schön"),
        ("“quoted” it’s", '"quoted" it\'s'),
        ("色调，ＡＢ", "色调,AB"),
        ("a\u3000b\u2028c", "a b c"),
    ],
    ids=["spaces", "empty", "blank", "entity", "entity-twice", "nbsp", "mojibake", "quotes", "full-width", "unicode-spaces"],
)
def test_known_strings(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean
    assert clean_prompt(clean) == clean


def test_negative_prompts_are_the_published_ones() -> None:
    """The stock string as a hash of its characters: a typo in one of 120 Chinese characters is
    invisible to most readers.
    """
    parts = NEGATIVE_PROMPT.split("，")
    assert (len(NEGATIVE_PROMPT), len(parts), parts[0], parts[-1]) == (137, 28, "色调艳丽", "倒着走")
    assert hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest() == DIGEST
    assert f"镜头晃动，{NEGATIVE_PROMPT}" == NEGATIVE_PROMPT_I2V
    assert f"镜头切换，镜头晃动，{NEGATIVE_PROMPT}" == NEGATIVE_PROMPT_FLF2V


def test_without_ftfy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ConfigError, match=r"pip install 'rcm\[text\]'"):
        clean_prompt("cat")


@pytest.mark.parametrize("blank", ["", " \n", "&nbsp;", "&amp;nbsp;&#8203;", "\0", "\u200b\u200d\ufeff", "\u2060 \u00ad", "\x1b"])
def test_what_cleans_to_nothing_is_the_empty_prompt(blank):
    assert says_nothing(blank)
    assert clean_prompt(blank) == ""
    assert checked_prompts([("a", blank)], allow_empty=True) == [""]
    with pytest.raises(ConfigError, match="^here is empty; write a prompt, or pass --allow_empty_prompt"):
        checked_prompts([("here", blank)], allow_empty=False)


def test_what_says_something_is_kept():
    assert checked_prompts([("a", " &amp; "), ("b", "a\u200bb")], allow_empty=False) == ["&amp;", "a\u200bb"]
    assert not says_nothing(".") and not says_nothing("\u0301")
    with pytest.raises(ConfigError, match="--prompt is not UTF-8 text"):
        checked_prompts([("--prompt", "caf\udce9")], allow_empty=True)
