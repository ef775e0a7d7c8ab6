"""The codec's kernels equal plain torch bit for bit (Triton's interpreter), and compile for Hopper
with wide accesses, without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.in_interpreter import in_interpreter

pytest.importorskip("triton")


def compiled() -> list[dict]:
    """What `tests.support.compile_kv_codec` prints, run without the interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.compile_kv_codec"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("what", "count"), [("few", 10), pytest.param("several", 16, marks=pytest.mark.slow), pytest.param("cases", 40, marks=pytest.mark.slow)]
)
def test_kernels_equal_plain_torch(what, count):
    found = in_interpreter("interpreted_kv_codec", what)
    assert len(found) > count
    assert {name: different for name, different in found.items() if different} == {}


@pytest.mark.skipif(importlib.util.find_spec("quant_videogen") is None, reason="pip install --no-deps quant-videogen==0.1.0")
def test_official_equals_the_package():
    found = in_interpreter("official_kv_codec")
    assert len(found) == 18
    assert {name: different for name, different in found.items() if different} == {}


@pytest.mark.slow
def test_broken_kernels_are_caught():
    caught = in_interpreter("interpreted_kv_codec", "mutants")
    assert len(caught) > 10
    assert [name for name, seen in caught.items() if not seen] == []


@pytest.mark.slow
def test_kernels_compile_and_store_wide():
    found = compiled()
    assert {kernel["kernel"] for kernel in found} == {
        "restore", "deposit", "write_row", "extremes", "fit", "write_codes", "encode_bytes",
        "features", "assign", "recentre",
    }  # fmt: skip
    for kernel in found:
        stores = {access for access in kernel["accesses"] if access.startswith("st")}
        if kernel["kernel"] == "restore":
            assert stores == {"st.global.v4.b32"}, kernel
        if kernel["kernel"] == "restore" and kernel["constants"]["AXIS"] == "channel" and not kernel["constants"]["STAGES"]:
            assert not any(access.startswith("ld.global.b8") for access in kernel["accesses"]), kernel
