"""The parser of every command line: a word that it cannot read is answered in one sentence, with
the flag that was likely meant.
"""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

_UNKNOWN = "unrecognized arguments: "


class Arguments(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose description keeps its lines and whose errors come without
    the usage, which hides the sentence on a small screen: "error: ...; --help lists the flags".
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line on stderr."""
        words = message.removeprefix(_UNKNOWN).split() if message.startswith(_UNKNOWN) else []
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        near = {
            flag: difflib.get_close_matches(flag, self._option_string_actions, n=1)
            for flag in flags
        }
        meant = "".join(f"; did you mean {found[0]}?" for found in near.values() if found)
        if words and not flags and "--prompt" in self._option_string_actions:
            meant = "; a prompt is written --prompt TEXT"
        self.exit(2, f"error: {' '.join(message.split())}{meant}; --help lists the flags\n")
