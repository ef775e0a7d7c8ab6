"""The tensor contract of `flash_jvp`, checked once for every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rcm.kernels.masks import Full, MaskSpec

LOG2_E = 1.4426950408889634
MIN_HEAD, MAX_HEAD = 16, 256
"""Head sizes of the fused kernels."""
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


Results = tuple[Tensor, Tensor | None, Tensor]
"""O, O_dot (None without tangents) and LSE."""


@dataclass(frozen=True)
class Problem:
    """A checked call: tensors `[B, L, N, D]`, tangents None where structurally zero, every default
    resolved.

    `k_dot` and `v_dot`, where present, hold only the keys from `tangent_start` on.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_dot: Tensor | None
    k_dot: Tensor | None
    v_dot: Tensor | None
    mask: MaskSpec
    scale: float
    tangent_start: int

    @property
    def has_tangent(self) -> bool:
        """Whether any input has a tangent; without one there is no output tangent either."""
        return self.flags != 0

    @property
    def flags(self) -> int:
        """A bit per tangent that exists: 1 for q, 2 for k, 4 for v."""
        return sum(
            1 << bit for bit, t in enumerate((self.q_dot, self.k_dot, self.v_dot)) if t is not None
        )

    @property
    def first_tangent_key(self) -> int:
        """Where tangent tiles begin: 0 if no key has a tangent, since the flags then already leave
        the work out.
        """
        return self.tangent_start if self.flags & 6 else 0

    @property
    def scale_base2(self) -> float:
        """The scale of scores that are exponents of 2, as the kernels take exponentials."""
        return self.scale * LOG2_E


def check_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    mask: MaskSpec | None,
    scale: float | None,
    tangent_start: int,
) -> Problem:
    """Check one call of `flash_jvp` and resolve its defaults.

    Raises `ValueError` for shapes, lengths, mask sizes and `tangent_start`; `TypeError` for dtypes
    and devices; `RuntimeError` for inputs whose derivative the forward-only kernel would drop
    silently (gradients, or dual tensors that were not unpacked).
    """
    inputs = {"q": q, "k": k, "v": v, "q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot}
    present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    _check_kinds(present)
    batch, q_len, heads, d_qk = q.shape
    kv_len, d_v = k.shape[1], v.shape[3]
    _check_shape("k", k, (batch, kv_len, heads, d_qk))
    _check_shape("v", v, (batch, kv_len, heads, d_v))
    if min(batch, q_len, kv_len, heads, d_qk, d_v) < 1:
        raise ValueError(
            f"flash_jvp needs non-empty inputs, got q {tuple(q.shape)}, k {tuple(k.shape)}, v"
            f" {tuple(v.shape)}"
        )
    if not 0 <= tangent_start <= kv_len:
        raise ValueError(f"tangent_start must be in [0, kv_len={kv_len}], got {tangent_start}")
    if q_dot is not None:
        _check_shape("q_dot", q_dot, tuple(q.shape))
    k_dot = _tangent_part("k_dot", k_dot, k, tangent_start)
    v_dot = _tangent_part("v_dot", v_dot, v, tangent_start)
    mask = Full(q_len, kv_len) if mask is None else mask
    if (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"mask {mask} covers {mask.q_len} queries x {mask.kv_len} keys, but q has {q_len}"
            f" tokens and k has {kv_len}"
        )
    _check_differentiation(present)
    return Problem(
        q,
        k,
        v,
        q_dot,
        k_dot,
        v_dot,
        mask,
        d_qk**-0.5 if scale is None else float(scale),
        tangent_start,
    )


def _check_kinds(present: dict[str, Tensor]) -> None:
    q = present["q"]
    for name, tensor in present.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, L, N, D], got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}; cast before the"
                " call"
            )
        if tensor.device != q.device:
            raise TypeError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"flash_jvp takes {', '.join(map(str, FLOAT_DTYPES))}, got {q.dtype}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def _tangent_part(
    name: str, tangent: Tensor | None, primal: Tensor, tangent_start: int
) -> Tensor | None:
    """The rows from `tangent_start` on; a tangent for all keys is cut, one for only those rows is
    taken as it is.
    """
    if tangent is None or tangent_start == primal.shape[1]:
        return None
    rest = (primal.shape[0], primal.shape[1] - tangent_start, *primal.shape[2:])
    if tuple(tangent.shape) == rest:
        return tangent
    if tuple(tangent.shape) == tuple(primal.shape):
        return tangent[:, tangent_start:]
    expected = (
        str(tuple(primal.shape))
        if tangent_start == 0
        else f"{tuple(primal.shape)} or {rest} (keys from tangent_start={tangent_start})"
    )
    raise ValueError(f"{name} must have shape {expected}, got {tuple(tangent.shape)}")


def _check_differentiation(present: dict[str, Tensor]) -> None:
    for name, tensor in present.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"flash_jvp is forward-only, but {name} requires grad; call it under"
                " torch.no_grad()"
            )
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{name} is a dual tensor; unpack it and pass the tangent as an argument of its own"
            )
