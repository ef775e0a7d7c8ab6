"""Problems for the fused layers, and their errors against float64: forward, gradient, and tangent
along all inputs and along each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.core.dual import jvp
from rcm.kernels.fused import api, reference
from rcm.nets.rope import RopeTable

EPS = 1e-6
FLOOR = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error that is rounding of the result whatever the eager code does."""


@dataclass(frozen=True)
class Case:
    """One layer at one shape: `shapes` of its inputs, and how the first `rows` of them lie in
    memory.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    rows: int = 1
    memory: str = "contiguous"

    def inputs(self, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs, none of mean 0 or scale 1, their values representable in `dtype`; vectors
        of modulation stay float32.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = [torch.randn(shape, generator=generator) * 1.5 + 0.3 for shape in self.shapes]
        kinds = [dtype if i < self.rows or len(shape) == 1 else torch.float32 for i, shape in enumerate(self.shapes)]
        made = [x.to(kind).to(device) for x, kind in zip(wide, kinds, strict=True)]
        return tuple(_laid_out(x, self.memory) if i < self.rows else x for i, x in enumerate(made))


def _laid_out(x: Tensor, memory: str) -> Tensor:
    if memory == "slice":  # of a larger tensor in every dimension
        whole = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
        view = whole[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)
    if memory == "transposed":  # channels are not the fastest dimension
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def _table(length: int, width: int, device: torch.device, dtype: torch.dtype) -> RopeTable:
    angle = torch.arange(length * (width // 2), dtype=torch.float64, device=device).reshape(length, 1, -1) * 0.37 + 0.1
    cos, sin = angle.cos().repeat_interleave(2, -1), torch.stack([-angle.sin(), angle.sin()], -1).flatten(2)
    return RopeTable(cos.to(dtype), sin.to(dtype))


def _rotate_fused(x: Tensor) -> Tensor:
    return api.rotate_pairs(x, *_table(x.shape[1], x.shape[3], x.device, torch.float32).per_pair)


def _rotate_reference(x: Tensor) -> Tensor:
    table = _table(x.shape[1], x.shape[3], x.device, torch.promote_types(x.dtype, torch.float32))
    return reference.rotate_pairs(x, table.cos, table.sin)


FUSED: dict[str, Callable[..., Tensor]] = {
    "modulated_norm": lambda x, shift, scale: api.modulated_norm(x, shift, scale, eps=EPS, dtype=x.dtype),
    "modulated_norm_wide": lambda x, shift, scale: api.modulated_norm(x, shift, scale, eps=EPS, dtype=shift.dtype),
    "affine_norm": lambda x, weight, bias: api.affine_norm(x, weight, bias, eps=EPS),
    "rms_norm": lambda x, weight: api.rms_norm(x, weight, eps=EPS),
    "gated_add": lambda x, y, gate: api.gated_add(x, y, gate),
    "carried_modulated": lambda x, shift, scale: torch.stack(api.carried_modulated_norm(x, shift, scale, eps=EPS, dtype=x.dtype)),
    "carried_affine": lambda x, weight, bias: torch.stack(api.carried_affine_norm(x, weight, bias, eps=EPS)),
    "gelu": lambda x: api.gelu_tanh(x),
    "linear_gelu": lambda x, weight, bias: api.linear_gelu(x, weight, bias),
    "rotate": _rotate_fused,
}
EAGER: dict[str, Callable[..., Tensor]] = {
    "modulated_norm": lambda x, shift, scale: reference.modulated_norm(x, shift, scale, eps=EPS).to(x.dtype),
    "modulated_norm_wide": lambda x, shift, scale: reference.modulated_norm(x, shift, scale, eps=EPS),
    "affine_norm": lambda x, weight, bias: reference.affine_norm(x, weight, bias, eps=EPS),
    "rms_norm": lambda x, weight: reference.rms_norm(x, weight, eps=EPS),
    "gated_add": reference.gated_add,
    "carried_modulated": lambda x, shift, scale: torch.stack((x, reference.modulated_norm(x, shift, scale, eps=EPS).to(x.dtype))),
    "carried_affine": lambda x, weight, bias: torch.stack((x, reference.affine_norm(x, weight, bias, eps=EPS))),
    "gelu": reference.gelu_tanh,
    "linear_gelu": lambda x, weight, bias: reference.gelu_tanh(F.linear(x, weight, bias)),
    "rotate": _rotate_reference,
}


def _modulated(batch: int, frames: int, tokens: int, width: int, of: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    return (batch, frames, tokens, width), (*of, 1, width), (*of, 1, width)


def cases(*, tokens: int, width: int, odd: int, heads: tuple[int, int, int]) -> dict[str, Case]:
    """All cases at `tokens` per frame, widths `width` and `odd`, and rotation of (tokens, heads,
    channels).
    """
    length, count, channels = heads
    per_frame, per_sample, shared = (2, 2), (2, 1), (1, 1)
    x = (2, 2, tokens, width)
    return {
        "modulation per frame": Case("modulated_norm", _modulated(*x, of=per_frame)),
        "modulation per sample": Case("modulated_norm", _modulated(*x, of=per_sample)),
        "modulation shared, odd width": Case("modulated_norm", _modulated(2, 2, tokens, odd, of=shared)),
        "modulation, rows of a slice": Case("modulated_norm", _modulated(*x, of=per_frame), memory="slice"),
        "modulation, channels not fastest": Case("modulated_norm", _modulated(*x, of=per_frame), memory="transposed"),
        "modulation to float32": Case("modulated_norm_wide", _modulated(*x, of=per_frame)),
        "affine norm": Case("affine_norm", (x, (width,), (width,))),
        "affine norm of 3 dimensions, odd": Case("affine_norm", ((2, tokens, odd), (odd,), (odd,)), memory="slice"),
        "modulation beside its rows": Case("carried_modulated", _modulated(*x, of=per_frame)),
        "affine norm beside its rows, odd": Case("carried_affine", ((2, tokens, odd), (odd,), (odd,)), memory="slice"),
        "rms norm": Case("rms_norm", (x, (width,))),
        "rms norm of a slice, odd": Case("rms_norm", ((2, tokens, odd), (odd,)), memory="slice"),
        "gate per frame": Case("gated_add", (x, x, (2, 2, 1, width)), rows=2),
        "gate per sample, slices, odd": Case("gated_add", ((2, 2, tokens, odd),) * 2 + ((2, 1, 1, odd),), rows=2, memory="slice"),
        "gelu": Case("gelu", ((2, 2, tokens, odd),)),
        "gelu of a slice": Case("gelu", ((2, tokens, width),), memory="slice"),
        "gelu of a product": Case("linear_gelu", (x, (width, width), (width,)), rows=2),
        "gelu of a product, slices, odd": Case("linear_gelu", ((2, tokens, width), (odd, width), (odd,)), rows=2, memory="slice"),
        "rotation": Case("rotate", ((2, length, count, channels),)),
        "rotation of a slice": Case("rotate", ((2, length, count, channels),), memory="slice"),
        "rotation of 12 channels": Case("rotate", ((1, length, count, 12),)),
    }


def _relative(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape, f"{tuple(got.shape)} for {tuple(truth.shape)}"
    return ((got.double() - truth).abs().max() / truth.abs().max()).item()


def _results(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
    """Outputs by name: value, gradients, tangents along all inputs and along each alone."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [x.requires_grad_(True) for x in (y.clone(memory_format=torch.preserve_format) for y in inputs)]
    leaves = [leaf if leaf.stride() == x.stride() else x.requires_grad_(True) for leaf, x in zip(leaves, inputs, strict=True)]
    out = fn(*leaves)
    pulled = torch.randn(out.shape, generator=generator).to(out)
    found = {"value": out, **{f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(out, leaves, pulled))}}
    plain = tuple(x.detach() for x in leaves)
    dots = tuple(torch.randn(x.shape, generator=generator).to(x) for x in plain)
    with torch.no_grad():
        found["value without gradient"] = fn(*plain)
    indices = tuple(range(len(plain)))
    # all tangents, and each alone
    for subset in dict.fromkeys([indices, *((i,) for i in indices)]):
        value, tangent = jvp(fn, plain, tuple(dot if i in subset else None for i, dot in enumerate(dots)))
        found[f"value with tangent {subset}"], found[f"tangent {subset}"] = value, tangent
    return {name: x.detach() for name, x in found.items()}


def errors(case: Case, dtype: torch.dtype, *, device: str = "cpu") -> Iterator[tuple[str, float, float]]:
    """(output, error against float64, budget): twice the error of eager code in the same dtype, at
    least rounding of the result.
    """
    inputs = case.inputs(dtype, device=device)
    got = _results(FUSED[case.op], inputs, 1)
    eager = _results(EAGER[case.op], inputs, 1)
    truth = _results(EAGER[case.op], tuple(x.double() for x in inputs), 1)
    for name, expected in truth.items():
        assert got[name].dtype == eager[name].dtype, f"{name}: {got[name].dtype}, eager {eager[name].dtype}"
        yield name, _relative(got[name], expected), max(2 * _relative(eager[name], expected), FLOOR[dtype])
