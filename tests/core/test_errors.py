import pytest

from rcm.core.errors import CheckpointError, ConfigError, NonFinite, TangentLost, require_divisible, require_equal


def test_hierarchy():
    assert issubclass(ConfigError, ValueError)
    assert all(issubclass(e, RuntimeError) for e in (TangentLost, NonFinite, CheckpointError))


def test_require_equal_names_everything():
    require_equal("frames", got=21, expected=21, knob="state_t")
    with pytest.raises(ConfigError, match=r"frames is 20, expected 21.*state_t"):
        require_equal("frames", got=20, expected=21, knob="state_t")


def test_require_divisible_lists_divisors():
    for by in (1, 2, 3, 4, 6, 12):
        require_divisible("num_heads", value=12, by=by, by_name="cp", knob="mesh.cp")
    with pytest.raises(ConfigError, match=r"cp=8 does not divide num_heads=12; choose mesh.cp from 1, 2, 3, 4, 6, 12$"):
        require_divisible("num_heads", value=12, by=8, by_name="cp", knob="mesh.cp")


@pytest.mark.parametrize(("value", "by"), [(12, 0), (12, -3), (-4, 2)])
def test_require_divisible_refuses_senseless_numbers(value, by):
    with pytest.raises(ConfigError, match="mesh.cp"):
        require_divisible("num_heads", value=value, by=by, by_name="cp", knob="mesh.cp")
