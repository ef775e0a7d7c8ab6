"""A prompt as umT5 was shown it: repaired text, no HTML entities, single spaces; and which prompts
say nothing. docs/reference/encoders.md#prompts.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

from rcm.core.errors import ConfigError
from rcm.encoders.text_extra import text_extra

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(prompt: str) -> str:
    """`prompt` with broken Unicode repaired (ftfy), HTML entities resolved twice, runs of
    whitespace made one space, and ends stripped.

    Case is kept. ftfy also turns full-width punctuation into ASCII and curly quotes into straight
    ones, as when the model was trained. A prompt that `says_nothing` becomes the empty one. Raises
    `ConfigError` when ftfy is not installed.
    """
    if says_nothing(prompt):
        return ""
    repaired = text_extra("ftfy", purpose="cleaning prompts for umT5").fix_text(prompt)
    return _WHITESPACE.sub(" ", html.unescape(html.unescape(repaired))).strip()


def says_nothing(prompt: str) -> bool:
    """Whether a prompt is blank: spaces, controls, characters of no width, also as entities."""
    return all(
        unicodedata.category(letter)[0] in "ZC" for letter in html.unescape(html.unescape(prompt))
    )


def checked_prompts(
    named: Iterable[tuple[str, str]], *, allow_empty: bool, knob: str = "--allow_empty_prompt"
) -> list[str]:
    """Prompts of (place, prompt) pairs, stripped, "" for those that say nothing.

    `ConfigError` names the place of an empty one unless `allow_empty`, and of one that is no text.
    """
    prompts = []
    for where, prompt in named:
        empty = says_nothing(prompt) and not any(
            "\ud800" <= letter <= "\udfff" for letter in prompt
        )
        if empty and not allow_empty:
            raise ConfigError(
                f"{where} is empty; write a prompt, or pass {knob} to sample without one"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where} is not UTF-8 text (character {error.start + 1})") from error
        prompts.append("" if empty else prompt.strip())
    return prompts
