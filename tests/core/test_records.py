"""Records of settings: values of each form of type that fits and does not, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from rcm.core.errors import ConfigError
from rcm.core.records import Record, require_kind, within

KINDS = {  # type -> what fits, what does not, what is said of it
    bool: ((True, False), (1, "True", None), "must be True or False"),
    int: ((0, -3, np.int64(2)), (True, 1.0, "1"), "must be a whole number"),
    float: ((0, 1.5, np.float32(2)), (False, float("nan"), float("inf"), "1.5"), "must be a finite number"),
    str: (("", "a"), (1, None), "must be a text"),
    int | None: ((1, None), (True, 1.5), "must be a whole number or None"),
    tuple[int, int]: (((1, 2),), ((1,), (1, 2, 3), [1, 2], (1, 2.5)), "must be a tuple of 2, each a whole number"),
    tuple[float, ...]: (((), (1, 2.5, 3)), ((1, "2"), 1.0), "must be a tuple, of which each is a finite number"),
    Literal["a", "b"]: (("a",), ("c", 1), "is not one of 'a', 'b'"),
    Literal["a"] | None: (("a", None), ("b",), "is not one of 'a', and may be left out"),
    Callable[[int], int]: ((abs,), (3,), "must be a function"),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_value_is_of_its_kind_or_is_refused_by_name(kind: object) -> None:
    fits, others, words = KINDS[kind]
    for value in fits:
        require_kind("key", value, kind)
    for value in others:
        with pytest.raises(ConfigError) as refused:
            require_kind("key", value, kind)
        assert str(refused.value) == f"key={value!r} {words}"


@dataclass(frozen=True)
class Bounded(Record):
    share: float = within(0.5, least=0, most=1)
    width: int | None = within(None, above=0)


def test_numbers_stay_within_the_bounds_of_their_field() -> None:
    for good in ({"share": 0}, {"share": 1.0}, {"width": 1}):
        Bounded(**good)
    for bad, words in (
        ({"share": -0.1}, "share=-0.1 must be at least 0"),
        ({"share": 1.1}, "share=1.1 must be at most 1"),
        ({"width": 0}, "width=0 must be positive"),
    ):
        with pytest.raises(ConfigError) as refused:
            Bounded(**bad)
        assert str(refused.value) == words


def test_a_value_of_thousands_of_digits_is_named_in_short() -> None:
    with pytest.raises(ConfigError, match=r"^key=\(a number of thousands of digits\) must be a text$"):
        require_kind("key", 10**5000, str)
    with pytest.raises(ConfigError, match=r"^key=10{76}\.\.\. must be a finite number$"):
        require_kind("key", 10**400, float)
