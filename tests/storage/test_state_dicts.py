"""Joined keys, shapes without reading, and the sentence for what does not fit."""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import CheckpointError
from rcm.storage.state_dicts import LazyWeights, check_keys, flatten, listed, misfit, shapes_of

EXPECTED = {"b": (4,), "a": (2, 3), "c": ()}  # in an order of its own


class Unread(LazyWeights):
    """Shapes alone."""

    headers = {name: torch.empty(shape, device="meta") for name, shape in EXPECTED.items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        raise AssertionError(f"{key} was read")


def test_shapes_are_known_without_reading() -> None:
    weights = Unread()
    assert shapes_of(weights) == EXPECTED and list(weights) == ["b", "a", "c"] and "a" in weights and "d" not in weights
    assert shapes_of({"x": torch.zeros(5, 1)}) == {"x": (5, 1)}


def test_nested_keys_are_joined() -> None:
    tensor = torch.ones(1)
    assert flatten({"net": {"a.b": tensor, "c": {"d": 1}}, "e": {}, "f": {0: tensor}}) == {
        "net.a.b": tensor,
        "net.c.d": 1,
        "e": {},
        "f": {0: tensor},
    }


def test_everything_that_differs_is_named_at_once() -> None:
    check_keys("x.pt", shapes=dict(EXPECTED), expected=EXPECTED)
    found = misfit({"a": (3, 2), "d": (1,), "b": (4,)}, expected=EXPECTED)
    assert (found.missing, found.extra, found.misshapen) == (("c",), ("d",), ("a has shape (3, 2), expected (2, 3)",))
    with pytest.raises(CheckpointError) as caught:
        check_keys("x.pt", shapes={"a": (3, 2), "d": (1,), "b": (4,)}, expected=EXPECTED, network="a tiny net", advice="ask Ann")
    assert str(caught.value) == (
        "x.pt does not fit a tiny net: missing 1 key(s): c; 1 unexpected key(s): d; "
        "1 tensor(s) of another shape: a has shape (3, 2), expected (2, 3); ask Ann"
    )


def test_names_come_in_the_order_of_the_network() -> None:
    found = misfit({}, expected=EXPECTED)
    assert found.missing == ("b", "a", "c")
    found = misfit({"a": (1,), "b": (1,), "z": (1,), "y": (1,)}, expected=EXPECTED)
    assert [told[0] for told in found.misshapen] == ["b", "a"] and found.extra == ("y", "z")


def test_long_lists_are_cut_and_counted() -> None:
    assert listed("abc", most=3) == "a, b, c"
    assert listed("abcde", most=3) == "a, b, c and 2 more"
    with pytest.raises(CheckpointError, match=r"missing 20 key\(s\): 0, 1, .* and 12 more$"):
        check_keys("x", shapes={}, expected={str(n): (1,) for n in range(20)})
