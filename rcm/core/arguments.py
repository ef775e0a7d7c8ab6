"""The parser of every command line: a word that it cannot read is answered in one sentence, with
the flag that was likely meant, and so is a flag that would have no effect beside another, and a
number that nothing can be done with (`ConfigError`, as for other values).
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rcm.core.flag_ranges import check_numbers

_UNKNOWN = "unrecognized arguments: "


@dataclass(frozen=True)
class _Idle:
    """`flags` that have no effect beside the flag `other` (`when` the values are so), or, where
    `absent`, without it; refused, or told.
    """

    flags: tuple[str, ...]
    other: str
    absent: bool
    when: Callable[[argparse.Namespace], bool] | None
    refused: bool


def one_of(name: str, *values: object) -> Callable[[argparse.Namespace], bool]:
    """Of the values of all flags: whether that of `name` is one of these."""
    return lambda flags: getattr(flags, name) in values


class Arguments(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose description keeps its lines and whose errors come without
    the usage, which hides the sentence on a small screen: "error: ...; --help lists the flags".

    `typed`: the flags of the last line that was read, by name ("as_is" for --as-is).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        self.typed: dict[str, argparse.Action] = {}
        self._idle: list[_Idle] = []
        self._reading = False

    def idle(
        self,
        *flags: str,
        beside: str = "",
        without: str = "",
        when: Callable[[argparse.Namespace], bool] | None = None,
        refuse: bool = True,
    ) -> None:
        """Refuse each of `flags` that is typed `beside` a flag that leaves it without effect: one
        that is typed, too, or, typed or not, `when` all values are so; or `without` one that it
        needs. `refuse` False warns: for flags that published commands have always let through.
        """
        for name in (*flags, beside or without):
            self._action(name)  # a misspelt rule would refuse nothing
        self._idle.append(_Idle(flags, beside or without, bool(without), when, refuse))

    @property
    def names(self) -> list[str]:
        """Of all flags."""
        return [_name(action) for action in self._actions]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, then `idle` and the ranges of numbers."""
        return self._read(super().parse_known_args, args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, then `idle` and the ranges of numbers."""
        return self._read(super().parse_known_intermixed_args, args, namespace)

    def _read(self, read: Callable[[Any, Any], Any], args: Any, namespace: Any) -> Any:
        if self._reading:  # one calls the other
            return read(args, namespace)
        self.typed, self._reading = {}, True
        try:
            found = read(args, namespace)
        finally:
            self._reading = False
        self._refuse_idle(found[0])
        check_numbers(found[0])
        return found

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

    def _get_values(self, action: argparse.Action, arg_strings: Sequence[str]) -> Any:
        if action.option_strings:
            self.typed[_name(action)] = action
        if action.type is Path and any(not word.strip() for word in arg_strings):
            self.error(f"argument {_flag(action)}: '' is no path")  # and not this folder
        return super()._get_values(action, list(arg_strings))

    def _refuse_idle(self, found: argparse.Namespace) -> None:
        for rule in self._idle:
            named = [_flag(self.typed[name]) for name in rule.flags if name in self.typed]
            other = self._action(rule.other)
            value = getattr(found, other.dest, None)
            if rule.absent:
                holds = not value
            elif rule.when is not None:
                holds = rule.when(found)
            else:
                holds = rule.other in self.typed and value is not False
            if not named or not holds:
                continue
            idle = f"{', '.join(named)} {'has' if len(named) == 1 else 'have'} no effect"
            them = "it" if len(named) == 1 else "them"
            say = self.error if rule.refused else _warn
            if rule.absent or (rule.when is not None and value in (None, False)):
                say(f"{idle} without {_flag(other)}; add that, or leave {them} out")
                continue
            plain = rule.when is None or value is True
            told = _flag(other) if plain else f"{_flag(other)} {_words(value)}".strip()
            what = f"leave {_flag(other)} out" if plain else f"change {_flag(other)}"
            say(f"{idle} with {told}; leave {them} out, or {what}")

    def _action(self, name: str) -> argparse.Action:
        return next(action for action in self._actions if _name(action) == name)


def _warn(sentence: str) -> None:
    sys.stderr.write(f"warning: {sentence}\n")


def _name(action: argparse.Action) -> str:
    first = action.option_strings[0] if action.option_strings else action.dest
    return first.lstrip("-").replace("-", "_")


def _flag(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
