"""The public contract of attention with tangent, and the explicit choice of its implementation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rcm.kernels.flash_jvp.reference import reference_jvp
from rcm.kernels.flash_jvp.validation import check_problem
from rcm.kernels.masks import MaskSpec

Implementation = Literal["reference", "triton"]


def flash_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None = None,
    k_dot: Tensor | None = None,
    v_dot: Tensor | None = None,
    *,
    mask: MaskSpec | None = None,
    scale: float | None = None,
    tangent_start: int = 0,
    implementation: Implementation = "reference",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Softmax attention and its directional derivative, `(o, o_dot, lse)`, in one pass over the
    keys.

    O = P v and O_dot = P v_dot + H v - rowsum(H) * O, with P = softmax(S), S = scale q k^T, H = P *
    S_dot, S_dot = scale (q_dot k^T + q k_dot^T); Causal-rCM section 3.2.2. The result is a
    constant: nothing is differentiable.

    Inputs, any strides, one float dtype and device:
        q, q_dot   `[B, Lq, N, D]`
        k, k_dot   `[B, Lk, N, D]`
        v, v_dot   `[B, Lk, N, Dv]`; Dv may differ from D
        A tangent of None is a structural zero: neither loaded nor multiplied.
        mask       a `MaskSpec` with `q_len = Lq`, `kv_len = Lk`; None lets every query see every
                   key.
        scale      of the scores; None means `D ** -0.5`.
        tangent_start   keys before this index have zero `k_dot` and `v_dot` (a clean or cached
                   prefix) and cost no tangent work. The two tangents then have `Lk` rows, of which
                   the first `tangent_start` are ignored, or only the rest.
    Implementations, chosen by the caller and never replaced silently:
        "reference"   eager, any device, float32 arithmetic (float64 for float64), speed and memory
                      of plain attention.
        "triton"      one fused launch; CUDA, bf16 / fp16 / fp32, head sizes 16 to 256.
    Returns `o` and `o_dot` `[B, Lq, N, Dv]` in the dtype of q (`o_dot` None if all tangents are
    None) and `lse`, the natural log of the sum of exp of the scaled scores, `[B, N, Lq]` float32
    (float64 for the reference in float64). Raises `ValueError` (shapes, lengths, head sizes,
    unknown implementation), `TypeError` (dtypes, devices), `RuntimeError` (inputs that require grad
    or are dual, Triton without CUDA).

    Example, the tangent of self-attention along `x_dot` with a constant value projection::

        mask = BlockCausal(pattern, num_frames=21, tokens_per_frame=1560)
        o, o_dot, _ = flash_jvp(q, k, v, q_dot, k_dot, None, mask=mask)
    """
    problem = check_problem(
        q,
        k,
        v,
        q_dot=q_dot,
        k_dot=k_dot,
        v_dot=v_dot,
        mask=mask,
        scale=scale,
        tangent_start=tangent_start,
    )
    if implementation == "reference":
        return reference_jvp(problem)
    if implementation == "triton":
        # Triton is imported only when asked for
        from rcm.kernels.flash_jvp.launch import triton_jvp

        return triton_jvp(problem)
    raise ValueError(
        f"implementation must be 'reference' or 'triton', got {implementation!r}; set"
        " jvp_implementation"
    )
