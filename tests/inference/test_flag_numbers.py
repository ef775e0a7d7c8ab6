"""Numbers of command lines: what is said of one that is none."""

from __future__ import annotations

import argparse

import pytest

from rcm.core.errors import ConfigError
from rcm.inference.flag_ranges import check_numbers


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_called_so(number):
    with pytest.raises(ConfigError, match=r"--sigma_max .* must be a finite number, from 0.001 to 1e\+09"):
        check_numbers(argparse.Namespace(sigma_max=number))
