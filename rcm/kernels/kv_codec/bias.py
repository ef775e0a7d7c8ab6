"""Coded keys draw more attention than they should, as exp is convex; by how much, from their
scales, and how to take it off (README.md).

With independent errors of variance v_c in channel c of a key, E exp(s q.k_hat) = exp(s q.k + gain),
gain = s^2 / 2 sum_c q_c^2 v_c to second order, v_c = step_c^2 / 12. Subtracted from the logits key
by key (`augment`), or from the log-sum-exp of a whole chunk (`segment_gain`), which costs nothing
where attention is merged chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.blob import Blob
from rcm.kernels.kv_codec.codes import Codes


def error_variance(blob: Blob) -> Tensor:
    """Variance of the rounding error of every element, float32 [B, S, N, D]; zeros for a blob that
    was not coded.
    """
    if not isinstance(blob.codes, Codes):
        return torch.zeros(blob.shape, device=blob.codes.device)
    codes = blob.codes
    fmt, (r, groups, c) = codes.format, codes.scales.shape
    length = coding.rows_shape(codes.shape, fmt.granularity)[1]
    g = coding.group_length(length, fmt.group_size)
    steps = (
        coding.effective(codes.scales, codes.unit)
        .unsqueeze(2)
        .expand(r, groups, g, c)
        .flatten(1, 2)[:, :length]
    )
    if fmt.dtype in ("fp8", "fp4"):
        steps = steps * _float_step(coding.unpack(codes.data, fmt, length), fmt.dtype)
    variance = coding.unrows(steps.square() / 12, codes.shape, fmt.granularity)
    return _through(variance, blob)


def segment_variance(blob: Blob) -> Tensor:
    """`error_variance` averaged over the tokens, [B, N, D]; from the scales alone where no
    smoothing and no floating type is in the way.
    """
    codes = blob.codes
    if (
        not isinstance(codes, Codes)
        or codes.format.granularity != "channel"
        or codes.format.dtype in ("fp8", "fp4")
    ):
        return error_variance(blob).mean(1)
    b, s, n, d = codes.shape
    g = coding.group_length(s, codes.format.group_size)
    members = torch.full((codes.scales.shape[1], 1), float(g), device=codes.scales.device)
    members[-1] = s - g * (members.shape[0] - 1)
    mean = (coding.effective(codes.scales, codes.unit).square() * members).sum(1) / (12 * s)
    return _through(mean.view(b, 1, n, d), blob).squeeze(1)


def logit_gain(q: Tensor, blob: Blob, *, scale: float, rotated: bool = False) -> Tensor:
    """What the scaled logits of every query [B, L, N, D] and key of `blob` gain: float32 [B, N, L,
    S].

    `rotated`: the blob holds keys before rotation and `q` is rotated. Errors turn with their key;
    `q` stands at other angles to each, so the variances of a channel pair are taken together, their
    mean over all angles.
    """
    return (
        scale**2
        / 2
        * torch.einsum(
            "blnd,bsnd->bnls", q.float().square(), _paired(error_variance(blob), rotated)
        )
    )


def segment_gain(q: Tensor, blob: Blob, *, scale: float, rotated: bool = False) -> Tensor:
    """`logit_gain` with the variances averaged over the keys: float32 [B, N, L], to subtract from
    the log-sum-exp over the blob.
    """
    return gain_of(q, segment_variance(blob), scale=scale, rotated=rotated)


def gain_of(q: Tensor, variance: Tensor, *, scale: float, rotated: bool = False) -> Tensor:
    """`segment_gain` for a `segment_variance` [B, N, D] that is known; in float64 for a float64
    `q`.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    return (
        scale**2
        / 2
        * torch.einsum("blnd,bnd->bnl", q.to(work).square(), _paired(variance.to(work), rotated))
    )


def augment(
    q: Tensor, k_hat: Tensor, blob: Blob, *, scale: float, rotated: bool = False
) -> tuple[Tensor, Tensor]:
    """(q', k') of twice the channels, whose product is the corrected logit: [q, q^2] and [k_hat, -s
    v / 2]. For a dense attention with the softmax scale `scale`; values stay as they are. Twice the
    work of q k^T; the second half wants float32 or bf16, not fp16.
    """
    variance = _paired(error_variance(blob), rotated).to(k_hat.dtype)
    return torch.cat([q, q.square()], dim=-1), torch.cat([k_hat, variance * (-scale / 2)], dim=-1)


def _float_step(number: Tensor, dtype: str) -> Tensor:
    """Width of the uniform error that has the variance of rounding to a floating-point `number`,
    before its scale.

    The neighbour above lies a step away; below a power of two it lies half a step away, which takes
    a quarter off the variance.
    """
    mantissa, lowest = (3, -6) if dtype == "fp8" else (1, 0)
    fraction, exponent = torch.frexp(number.abs())
    narrow = (fraction == 0.5) & (exponent - 1 > lowest)
    step = torch.ldexp(torch.ones_like(number), (exponent - 1).clamp(min=lowest) - mantissa)
    return torch.where(narrow, 0.75**0.5 * step, step)


def _through(variance: Tensor, blob: Blob) -> Tensor:
    """Variances [B, S, N, D] of smoothed elements as variances of the elements."""
    kind, held = blob.undo.kind, blob.undo.tensor
    if kind == "hadamard":
        return variance.mean(-1, keepdim=True).expand_as(variance)
    if held is None:
        return variance
    if kind == "balance":
        return variance * held.float().square()
    return variance.gather(3, held.long().expand_as(variance))


def _paired(variance: Tensor, rotated: bool) -> Tensor:
    """Variances of channel pairs that rotation mixes replaced by their mean."""
    return (
        variance.unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, dim=-1)
        if rotated
        else variance
    )
