"""Forward-mode differentiation of whole networks by dual tensors, and the guard that catches a lost
tangent.

The tangent rides through the ordinary network on `torch.autograd.forward_ad` dual tensors. Rules
(docs/architecture.md#dual-numbers):

1. `jvp` opens the dual level together with `no_grad` and with compiled code switched to eager
   (Inductor drops tangents silently). Besides it, only code with tangents of its own packs duals:
   the attention dispatcher (`nets/attention.py`), linear layers (`nets/layers.py`), fused layers
   (`kernels/fused/api.py`) and keys behind a cache (`nets/wan/block.py`).
2. Broadcast or shard inputs before calling `jvp`; gather its two results afterwards.
3. Collectives inside a network go through `Function`s that define jvp.
4. Activation checkpointing calls the block directly while gradients are off.
5. A kernel or custom op that does not know duals drops the tangent silently: keep it out of the
   tangent pass, or unpack around it.
6. `.detach()`, `.data` and `inference_mode` drop tangents silently: none of them in a network (the
   cache's append excepted, and it refuses duals).
7. A tangent lost inside a residual network leaves an output that still has one, only a wrong one:
   check every module with `guard_tangents`.
8. Time maps are computed, primal and tangent, in float32 or float64 before any cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rcm.core.errors import TangentLost

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])


def in_dual_level() -> bool:
    """Whether a dual level is open, that is, whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of `x`; the tangent is None for a plain tensor (a structural zero)."""
    if not in_dual_level():
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, tangent


def has_tangent(x: Tensor) -> bool:
    """Whether `x` carries a tangent."""
    return unpack(x)[1] is not None


def pack(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """Dual tensor of `primal` and `tangent`; the plain `primal` if the tangent is None (a
    structural zero).

    The tangent needs the shape, dtype and device of the primal: `ValueError` for another shape,
    `TypeError` for another dtype or device (torch itself accepts another dtype and fails later, far
    away). Needs an open dual level.
    """
    if tangent is None:
        return primal
    if tangent.shape != primal.shape:
        raise ValueError(
            f"tangent has shape {tuple(tangent.shape)}, its primal {tuple(primal.shape)}; broadcast"
            " before packing"
        )
    if tangent.dtype != primal.dtype:
        raise TypeError(
            f"tangent has dtype {tangent.dtype}, its primal {primal.dtype}; cast the tangent to the"
            " primal's dtype"
        )
    if tangent.device != primal.device:
        raise TypeError(
            f"tangent is on {tangent.device}, its primal on {primal.device}; move the tangent"
        )
    return forward_ad.make_dual(primal, tangent)


def jvp(
    fn: Callable[..., Output], primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]
) -> tuple[Output, Output]:
    """Value and directional derivative of `fn` at `primals` along `tangents`, `(out, out_dot)`,
    both constants.

    `out_dot = sum_i (d fn / d primals_i) tangents_i`. One forward pass under `no_grad`, with
    compiled code running eagerly.
        primals    tensors passed to `fn` in order; floating where they have a tangent.
        tangents   same shape, dtype and device as the primal, or None for a zero tangent; at least
                   one is given.
    `fn` returns a tensor or a tuple of tensors, and `out`, `out_dot` have that structure. Raises
    `ValueError` / `TypeError` for tangents that do not fit, `RuntimeError` under `inference_mode`
    (which drops tangents) or inside another dual level, `TangentLost` if an output has no tangent
    (it does not depend on the inputs, or an operator dropped it: see `guard_tangents`).
    """
    if len(primals) != len(tangents):
        raise ValueError(
            f"jvp got {len(primals)} primals and {len(tangents)} tangents; give None for a zero"
            " tangent"
        )
    if all(tangent is None for tangent in tangents):
        raise ValueError("jvp needs at least one tangent, all are None")
    if torch.is_inference_mode_enabled() or any(primal.is_inference() for primal in primals):
        raise RuntimeError(
            "jvp under torch.inference_mode would drop the tangent silently; use torch.no_grad"
            " around it"
        )
    if in_dual_level():
        raise RuntimeError("jvp inside another dual level: forward-mode levels do not nest")
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _watched(),
        forward_ad.dual_level(),
    ):
        out = fn(
            *(pack(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True))
        )
        if isinstance(out, Tensor):
            return _split_output(out, name="output")
        if not isinstance(out, tuple) or not all(isinstance(item, Tensor) for item in out):
            raise TypeError(
                "jvp needs a function that returns a tensor or a tuple of tensors, got"
                f" {type(out).__name__}"
            )
        pairs = [_split_output(item, name=f"output {i}") for i, item in enumerate(out)]
        return tuple(primal for primal, _ in pairs), tuple(tangent for _, tangent in pairs)


def _split_output(x: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    primal, tangent = unpack(x)
    if tangent is None:
        raise TangentLost(
            f"{name} of the function has no tangent: it does not depend on the dual inputs, or an"
            " operator dropped the tangent; find it with guard_tangents(net)"
        )
    return primal, tangent


_guarded: list[nn.Module] = []


@contextmanager
def guard_tangents(net: nn.Module) -> Iterator[None]:
    """Within the context, a module of `net` that takes a dual tensor in a `jvp` and returns a
    floating tensor without tangent raises `TangentLost`.

    Looks at positional and keyword arguments and at outputs, through tuples, lists, mappings and
    dataclasses; an argument that is returned as it came has lost nothing. All modules are watched;
    the innermost reports first, so the error names the leaf by its path. Outside of `jvp` no module
    has a hook: compiled code would take it in, and round otherwise than without. Operators that are
    not modules are seen only through the module around them.
    """
    _guarded.append(net)
    try:
        yield
    finally:
        _guarded.pop()


@contextmanager
def _watched() -> Iterator[None]:
    handles = [
        module.register_forward_hook(_tangent_hook(name or type(net).__name__), with_kwargs=True)
        for net in _guarded
        for name, module in net.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tangent_hook(path: str) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = list(_float_tensors((args, kwargs)))
        if not in_dual_level() or not any(map(has_tangent, given)):
            return
        for x in _float_tensors(output):
            if not has_tangent(x) and all(x is not y for y in given):
                raise TangentLost(
                    f"module '{path}' ({type(module).__name__}) got a tangent and returned"
                    f" {tuple(x.shape)} {x.dtype} without one"
                )

    return check


def _float_tensors(value: object) -> Iterator[Tensor]:
    """Floating tensors nested in tuples, lists, mappings and dataclass records."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _float_tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _float_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _float_tensors(getattr(value, field.name))
