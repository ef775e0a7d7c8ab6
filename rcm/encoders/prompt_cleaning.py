"""A prompt as umT5 was shown it: repaired text, no HTML entities, single spaces. spec/wan.md 5."""

from __future__ import annotations

import html
import re

from rcm.encoders.text_extra import text_extra

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(prompt: str) -> str:
    """`prompt` with broken Unicode repaired (ftfy), HTML entities resolved twice, runs of whitespace made one space, and ends stripped.

    Case is kept. ftfy also turns full-width punctuation into ASCII and curly quotes into straight ones, as when the model was trained.
    Raises `ConfigError` when ftfy is not installed.
    """
    repaired = text_extra("ftfy", purpose="cleaning prompts for umT5").fix_text(prompt)
    return _WHITESPACE.sub(" ", html.unescape(html.unescape(repaired))).strip()
