import dataclasses

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError


def test_presets():
    assert Precision.preset("bf16") == Precision(params=torch.float32, compute=torch.bfloat16, reduce=torch.float32, time=torch.bfloat16)
    assert Precision.preset("bf16_fp32_time") == dataclasses.replace(Precision.preset("bf16"), time=torch.float32)
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        assert set(dataclasses.astuple(Precision.preset(name))) == {dtype}


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Precision.preset("fp32").time = torch.bfloat16


def test_bad_values_name_the_knob():
    with pytest.raises(ConfigError, match=r"'fp8'.*bf16, bf16_fp32_time, fp32, fp64"):
        Precision.preset("fp8")
    with pytest.raises(ConfigError, match="precision.reduce"):
        Precision(params=torch.float32, compute=torch.float32, reduce=torch.int32, time=torch.float32)
    with pytest.raises(ConfigError, match="precision.time"):
        Precision(params=torch.float32, compute=torch.float32, reduce=torch.float32, time="float32")
