"""Runs the portable kernel in Triton's interpreter and prints its errors as JSON; a process of its
own: it is chosen at import.

TRITON_INTERPRET=1 python -m tests.support.interpreted_kernel cases|mutants
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.flash_jvp import forward, launch
from rcm.kernels.flash_jvp.budget import errors_and_budgets
from rcm.kernels.flash_jvp.validation import Problem, check_problem
from rcm.kernels.masks import BlockCausal, TeacherForcing
from tests.support import mutants
from tests.support.attention_oracle import forward_mode, random_inputs, relative_error

TILES = launch.Tiles(16, 16, 4, 1)
CAUSAL = BlockCausal(BlockPattern(1, 2), 5, 7)
STREAMED = BlockCausal(BlockPattern(1, 1), 5, 9, q_block_offset=3, window=2, sinks=1)
PACKED = TeacherForcing(BlockPattern(2, 1), 4, 9)
NOISY = TeacherForcing(BlockPattern(1, 1), 4, 9, queries="noisy")
THREE = TeacherForcing(BlockPattern(1, 1), 4, 9, queries="noisy", window=2, sinks=1)
SINKS = TeacherForcing(BlockPattern(1, 1), 4, 9, queries="noisy", window=1, sinks=1)

CASES = {
    "dense odd": {"q_len": 19, "kv_len": 37, "heads": 2, "batch": 2},
    "dense exact tiles": {"q_len": 32, "kv_len": 48},
    "one key": {"q_len": 3, "kv_len": 1},
    "cross q only": {"q_len": 21, "kv_len": 17, "tangents": "q"},
    "k only": {"q_len": 17, "kv_len": 33, "tangents": "k"},
    "v only": {"q_len": 17, "kv_len": 33, "tangents": "v"},
    "no tangent": {"q_len": 17, "kv_len": 33, "tangents": ""},
    "k and v": {"q_len": 17, "kv_len": 33, "tangents": "kv"},
    "padded heads": {"q_len": 17, "kv_len": 33, "d_qk": 24, "d_v": 40},
    "half precision": {"q_len": 33, "kv_len": 35, "dtype": torch.float16},
    "tangent start inside a tile": {"q_len": 18, "kv_len": 53, "tangent_start": 21},
    "tangent start, v only": {"q_len": 18, "kv_len": 53, "tangent_start": 21, "tangents": "v"},
    "tangent start behind all keys": {"q_len": 18, "kv_len": 20, "tangent_start": 20},
    "causal": {"mask": CAUSAL},
    "streamed window sink": {"mask": STREAMED},
    "packed": {"mask": PACKED},
    "noisy": {"mask": NOISY, "tangent_start": NOISY.half_len},
    "noisy window 1 sink": {"mask": SINKS, "tangent_start": SINKS.half_len},
    "noisy window 2 sink": {"mask": THREE, "tangent_start": THREE.half_len},
    "large scores": {"q_len": 17, "kv_len": 33, "scale": 20.0},
    "noisy, half precision": {"mask": NOISY, "tangent_start": NOISY.half_len, "dtype": torch.float16},
}
MUTANTS = {
    "normaliser term dropped": ("(r_i / l_i)[:, None] * acc_o", "0.0 * acc_o", 1, "dense odd"),
    "r not rescaled": ("r_i = r_i * alpha + tl.sum(h, 1)", "r_i = r_i + tl.sum(h, 1)", 1, "dense odd"),
    "accumulator of the tangent not rescaled": ("acc_t = acc_t * alpha[:, None]", "acc_t = acc_t", 1, "dense odd"),
    "l not rescaled": ("l_i = l_i * alpha + tl.sum(p, 1)", "l_i = l_i + tl.sum(p, 1)", 1, "dense odd"),
    "flag of q forgotten": ("HAS_TQ: tl.constexpr = FLAGS & 1 != 0", "HAS_TQ: tl.constexpr = FLAGS & 8 != 0", 1, "dense odd"),
    "flag of k forgotten": ("HAS_TK: tl.constexpr = FLAGS & 2 != 0", "HAS_TK: tl.constexpr = FLAGS & 8 != 0", 1, "dense odd"),
    "flag of v forgotten": ("HAS_TV: tl.constexpr = FLAGS & 4 != 0", "HAS_TV: tl.constexpr = FLAGS & 8 != 0", 1, "dense odd"),
    "flags ignored": ("FLAGS & 1 if kind == 0 else FLAGS", "FLAGS", 1, "tangent start inside a tile"),
    "boundary predicate off": ("tl.where((cols < stop)[None, :], s,", "tl.where((cols < kv_len + 99)[None, :], s,", 1, "dense odd"),
    "stop inclusive": ("(cols < stop)", "(cols <= stop)", 1, "dense odd"),
    "row interval inclusive": ("(key < high)", "(key <= high)", 1, "packed"),
    "row predicate off": ("s = tl.where(seen, s,", "s = tl.where(seen | True, s,", 1, "packed"),
    "only two row intervals": ("tl.static_range(3):\n        low", "tl.static_range(2):\n        low", 1, "noisy window 2 sink"),
    "tangent offset forgotten": (
        "row - tangent_start, kv_len - tangent_start",
        "row, kv_len - tangent_start",
        2,
        "tangent start inside a tile",
    ),
    "rows before the tangent loaded": ("((rows >= 0) & (rows < length))", "(rows < length)", 1, "tangent start inside a tile"),
    "scale missing in H": ("h = p * (s_dot * tangent_scale)", "h = p * s_dot", 1, "dense odd"),
    "maximum forgotten": ("m_new = tl.maximum(m_i, tl.max(s, 1) * score_scale)", "m_new = tl.zeros_like(m_i)", 1, "large scores"),
    "last tile of a run skipped": ("for i in range(count):", "for i in range(count - 1):", 1, "dense odd"),
    "natural log forgotten": ("* 0.6931471805599453", "* 1.0", 1, "dense odd"),
    "query tail not stored": ("keep = (q_rows < q_len)[:, None]", "keep = (q_rows < q_len - 1)[:, None]", 1, "dense odd"),
}


def poisoned(problem: Problem) -> tuple:
    """Outputs full of NaN, so that an element nobody writes is noticed."""
    return tuple(None if x is None else x.fill_(float("nan")) for x in ORIGINAL_ALLOCATION(problem))


ORIGINAL_ALLOCATION = launch.allocate_outputs


def build(options: dict) -> tuple[dict, Problem]:
    """(raw inputs, checked problem) of a case: strided views, so that no kernel may assume
    contiguity, NaN in rows to be ignored.
    """
    options = {"dtype": torch.float32, "heads": 1, "batch": 1, **options}
    mask = options.pop("mask", None)
    lengths = {} if mask is None else {"q_len": mask.q_len, "kv_len": mask.kv_len}
    scale = options.pop("scale", None)
    inputs = random_inputs(**lengths, **options)
    strided = {name: None if x is None else x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for name, x in inputs.items()}
    for name in ("k_dot", "v_dot"):
        if strided[name] is not None:
            strided[name][:, : options.get("tangent_start", 0)] = float("nan")
    return inputs, check_problem(**strided, mask=mask, scale=scale, tangent_start=options.get("tangent_start", 0))


def run_cases() -> dict[str, dict]:
    """Errors against functorch in float64 and, where eager code has them, budgets."""
    report = {}
    for name, options in CASES.items():
        inputs, problem = build(options)
        got = launch.triton_jvp(problem, tiles=TILES)
        truth = forward_mode(inputs, mask=None if problem.mask.is_full else problem.mask, scale=problem.scale)
        errors = {key: None if x is None else relative_error(x, t) for key, x, t in zip(("o", "o_dot", "lse"), got, truth, strict=True)}
        budgets = {key: budget for key, (_, budget) in errors_and_budgets(problem, got).items()}
        report[name] = {"errors": errors, "budgets": budgets, "dtypes": [str(None if x is None else x.dtype) for x in got]}
    return report


def run_mutants() -> dict[str, bool]:
    """Whether each broken kernel exceeds the budgets on the case named for it."""
    caught = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (old, new, count, case) in MUTANTS.items():
            launch.portable_forward = mutants.load(forward, old=old, new=new, folder=Path(folder), count=count).portable_forward
            _, problem = build(CASES[case])
            report = errors_and_budgets(problem, launch.triton_jvp(problem, tiles=TILES))
            caught[name] = any(error > 3 * budget for error, budget in report.values())
    return caught


if __name__ == "__main__":
    launch.allocate_outputs = poisoned
    json.dump({"cases": run_cases, "mutants": run_mutants}[sys.argv[1]](), sys.stdout)
