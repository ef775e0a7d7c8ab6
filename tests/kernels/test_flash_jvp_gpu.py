"""Both Triton kernels on a real GPU: float64 truth, budgets of twice the eager error, poisoned
outputs, strides, 64-bit, mutants.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from rcm.kernels.flash_jvp import hopper, launch, launch_hopper
    from rcm.kernels.flash_jvp.budget import errors_and_budgets, relative_error
    from rcm.kernels.flash_jvp.selfcheck import DTYPES, Case, cases, make_problem
    from rcm.kernels.masks import TeacherForcing
    from tests.support import mutants

    CASES = {case.name: case for case in cases()}
else:
    CASES, DTYPES = {}, {}

HOPPER_MUTANTS = {
    "normaliser term dropped": ("gl.convert_layout(r_i * inverse, acc_row)[:, None] * o", "0.0 * o", "dense"),
    "flag of v forgotten": (
        "HAS_TV: gl.constexpr = FLAGS & 4 != 0\n    HAS_H",
        "HAS_TV: gl.constexpr = False\n    HAS_H",
        "dense",
    ),
    "tangent offset forgotten": ("dot_row = row - tangent_start", "dot_row = row", "tangent only from key 301"),
    "stop inclusive": ("(cols < stop)", "(cols <= stop)", "cross-attention, tangent of q only"),
    "row interval inclusive": (
        "(key < high)",
        "(key <= high)",
        "teacher-forced both, window None, sinks 0",
    ),
    "l not rescaled": ("l_i = l_i * alpha + gl.sum(p, axis=1)", "l_i = l_i + gl.sum(p, axis=1)", "dense"),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """An output element that no program writes stays NaN and fails the budget."""
    allocate = launch.allocate_outputs

    def filled(problem):
        return tuple(None if x is None else x.fill_(float("nan")) for x in allocate(problem))

    monkeypatch.setattr(launch, "allocate_outputs", filled)


def assert_within_budget(problem, kernel: str) -> None:
    if kernel == "hopper" and launch.hopper_obstacle(problem):
        pytest.skip(launch.hopper_obstacle(problem))
    for name, (error, budget) in errors_and_budgets(problem, launch.triton_jvp(problem, kernel=kernel)).items():
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


FLOAT32 = (
    "dense",
    "cross-attention, no tangent",
    "heads of 80 and 48",
    "tangent only from key 301",
    "teacher-forced both, window 1, sinks 1",
)
"""Cases that the portable kernel also computes in float32 here. Its products are unrolled there, so
that each case compiles for 40 s; Triton's interpreter runs all of them in float32
(test_flash_jvp_interpreted.py).
"""
COMBINATIONS = [
    *((name, dtype, "hopper") for name in CASES for dtype in ("bf16", "fp16")),
    *((name, "bf16", "portable") for name in CASES),
    ("dense", "fp16", "portable"),
    *((name, "fp32", "portable") for name in CASES if name in FLOAT32),
]


@pytest.mark.parametrize(("name", "dtype", "kernel"), COMBINATIONS)
def test_against_float64(name, dtype, kernel):
    assert_within_budget(make_problem(CASES[name], dtype=DTYPES[dtype], device="cuda"), kernel)


@pytest.mark.parametrize("kernel", ["hopper", "portable"])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (3, 0, 1, 2)], ids=["heads first", "tokens first", "channels first"])
def test_any_strides_without_copies(kernel, order):
    problem = make_problem(CASES["dense"], dtype=torch.bfloat16, device="cuda")
    back = [order.index(axis) for axis in range(4)]
    for name in ("q", "k", "v", "q_dot", "k_dot", "v_dot"):
        object.__setattr__(problem, name, getattr(problem, name).permute(order).contiguous().permute(back))
    assert_within_budget(problem, kernel)


@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_fused_projection_slices(kernel):
    """q, k and v as slices of one [B, L, 3, N, D] tensor, the layout of a fused projection."""
    problem = make_problem(CASES["dense"], dtype=torch.bfloat16, device="cuda")
    fused = torch.stack([problem.q, problem.k, problem.v], dim=2)
    for index, name in enumerate("qkv"):
        object.__setattr__(problem, name, fused[:, :, index])
    assert not problem.k.is_contiguous()
    assert_within_budget(problem, kernel)


@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_offsets_beyond_31_bits(kernel):
    """A tensor of more than 2**31 elements: the last batch entry alone must give the same
    numbers.
    """
    case = Case("wide", q_len=130, kv_len=200, batch=1, heads=1)
    alone = make_problem(case, dtype=torch.bfloat16, device="cuda")
    big = {name: torch.zeros(1, 140_000, 128, 128, dtype=torch.bfloat16, device="cuda") for name in ("k", "v")}
    far = {}
    for name, store in big.items():
        store[:, -200:, -1:] = getattr(alone, name)
        far[name] = store[:, -200:, -1:]
        assert far[name].storage_offset() > 2**31
    apart = make_problem(case, dtype=torch.bfloat16, device="cuda")
    for name, view in far.items():
        object.__setattr__(apart, name, view)
    expected, got = launch.triton_jvp(alone, kernel=kernel), launch.triton_jvp(apart, kernel=kernel)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_kernels_agree_at_full_length():
    """The size of training: 2 x 32760 keys, where float64 truth is out of reach, and structural
    zeros equal explicit ones.
    """
    from rcm.diffusion.blocks import BlockPattern

    mask = TeacherForcing(BlockPattern(3, 3), 21, 1560, queries="noisy")
    case = Case("full length", mask, tangent_start=mask.half_len, batch=1, heads=1)
    problem = make_problem(case, dtype=torch.bfloat16, device="cuda")
    portable, other = launch.triton_jvp(problem, kernel="portable"), launch.triton_jvp(problem)
    for a, b in zip(portable, other, strict=True):
        assert relative_error(a, b) < 5e-3


@pytest.mark.parametrize("name", HOPPER_MUTANTS)
def test_broken_hopper_kernels_are_caught(name, tmp_path, monkeypatch):
    old, new, case = HOPPER_MUTANTS[name]
    problem = make_problem(CASES[case], dtype=torch.float16, device="cuda")
    if launch.hopper_obstacle(problem):
        pytest.skip(launch.hopper_obstacle(problem))
    monkeypatch.setattr(launch_hopper, "hopper_forward", mutants.load(hopper, old=old, new=new, folder=tmp_path).hopper_forward)
    report = errors_and_budgets(problem, launch.triton_jvp(problem, kernel="hopper"))
    assert any(error > budget for error, budget in report.values())
