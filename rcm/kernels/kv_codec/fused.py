"""From tensors and blobs to launches of `kernels`: restore in one, encode in two. They equal the plain torch of `codes` and `clusters`
bit for bit, and say no where they do not apply.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.clusters import Clusters
from rcm.kernels.kv_codec.codes import CodeFormat, Codes
from rcm.kernels.kv_codec.spec import BITS

ELEMENTS = 4096
"""Elements per program of restore, bytes per program of encode times codes in a byte."""
MAX_COLS = 256
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


def runs_on(x: Tensor) -> bool:
    """Whether kernels can be launched for `x`: on CUDA, or in Triton's interpreter, outside compiled code."""
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and not torch.compiler.is_compiling()


def fits(shape: tuple[int, ...], fmt: CodeFormat) -> bool:
    """Whether groups and bytes of the format are those of the kernels: over tokens, or within the channels of a head."""
    if fmt.granularity == "channel":
        return True
    return fmt.granularity == "token" and not (shape[3] % coding.group_length(shape[3], fmt.group_size) or shape[3] % fmt.per_byte)


def restore_into(codes: Codes, clusters: Clusters | None, out: Tensor) -> bool:
    """Write number * scale (+ zero) + centroids into `out` [B, S, N, D] with one launch; False, and nothing done, where it cannot."""
    fmt = codes.format
    if not (runs_on(out) and fits(codes.shape, fmt) and out.dtype in OUTPUTS and out.stride(3) == 1):
        return False
    if clusters is not None and clusters.assignments is None:
        return False
    b, s, n, d = codes.shape
    if out.numel() == 0:
        return True
    channel = fmt.granularity == "channel"
    e4m3 = codes.scales.dtype == coding.E4M3
    stored = [_bits(x) for x in (codes.data, codes.scales, codes.scales if codes.zeros is None else codes.zeros)]
    grouped = (out, out, 1) if clusters is None else (clusters.centroids, clusters.assignments, clusters.centroids.shape[2])
    tokens, cols = _tile(n * d, ELEMENTS)
    from rcm.kernels.kv_codec import kernels

    with _device(out):
        kernels.restore[(-(-s // tokens), -(-n * d // cols), b)](
            *stored,
            stored[1] if codes.unit is None else codes.unit,
            *grouped[:2],
            out,
            out.stride()[:3],
            (b, s, n, grouped[2]),
            DTYPE=fmt.dtype,
            OFFSET=fmt.offset,
            SIGNED=codes.data.dtype == torch.int8,
            HIGH_FIRST=fmt.high_first,
            BITS=BITS[fmt.dtype],
            GROUP=coding.group_length(s if channel else d, fmt.group_size),
            CHANNEL=channel,
            E4M3=e4m3,
            HAS_ZERO=codes.zeros is not None,
            HAS_UNIT=codes.unit is not None,
            STAGES=0 if clusters is None else clusters.centroids.shape[0],
            FIRST_FIRST=clusters is not None and clusters.first_stage_first,
            PER_HEAD=clusters is not None and clusters.assignments.dim() == 4,
            D=d,
            TOKENS=tokens,
            COLS=cols,
            num_warps=8,
        )
    return True


def encode(x: Tensor, fmt: CodeFormat, subtract: tuple[Tensor, Tensor] | None = None) -> Codes | None:
    """`codes.encode` of `x` [B, S, N, D], less centroids [B, k, N, D] by assignments if `subtract` gives them; None where it cannot."""
    if not (runs_on(x) and fits(x.shape, fmt) and x.dtype in OUTPUTS) or x.numel() == 0:
        return None
    x = x if x.stride(3) == 1 else x.contiguous()
    b, s, n, d = x.shape
    channel = fmt.granularity == "channel"
    r, length, c = coding.rows_shape(x.shape, fmt.granularity)
    group = coding.group_length(length, fmt.group_size)
    low, high = (torch.empty(r, -(-length // group), c, device=x.device) for _ in range(2))
    centroids, assigned = (x, x) if subtract is None else (t.contiguous() for t in subtract)
    sizes = (b, s, n, 1 if subtract is None else centroids.shape[1])
    common: dict[str, Any] = {
        "GROUP": group,
        "CHANNEL": channel,
        "HAS_CLUSTERS": subtract is not None,
        "PER_HEAD": subtract is not None and assigned.dim() == 3,
        "D": d,
        "num_warps": 8,
    }
    source = (x, centroids, assigned)
    from rcm.kernels.kv_codec import kernels

    along = _power_of_2(group)
    across = max(1, min(256, ELEMENTS // along))
    groups = n * d if channel else s * n * d // group
    with _device(x):
        grid = (-(-groups // across), -(-s // group) if channel else 1, b)
        kernels.extremes[grid](*source, low, high, x.stride()[:3], sizes, ALONG=along, ACROSS=across, **common)
        scales, zeros, unit = coding.scales_of(low, high, fmt, batch=b)
        divisor, zero = coding.divisors(low, high, scales, zeros, unit, fmt)
        rows, columns = (-(-s // fmt.per_byte), n * d) if channel else (s, n * d // fmt.per_byte)
        data = torch.empty(r, rows if channel else d // fmt.per_byte, c, dtype=torch.uint8, device=x.device)
        tokens, cols = _tile(columns, ELEMENTS // fmt.per_byte)
        kernels.write_codes[(-(-rows // tokens), -(-columns // cols), b)](
            *source,
            divisor.contiguous(),
            divisor if zero is None else zero.contiguous(),
            data,
            x.stride()[:3],
            sizes,
            DTYPE=fmt.dtype,
            ASYMMETRIC=fmt.asymmetric,
            OFFICIAL=fmt.mode == "official",
            BITS=BITS[fmt.dtype],
            TOKENS=tokens,
            COLS=cols,
            **common,
        )
    held = data.view(coding.E4M3) if fmt.dtype == "fp8" else data
    if fmt.dtype == "int8" and not fmt.asymmetric:
        held = data.view(torch.int8)
    return Codes(fmt, tuple(x.shape), held, scales, zeros, unit)


def _bits(x: Tensor) -> Tensor:
    """e4m3 as its bits; others as they are."""
    return x.view(torch.uint8) if x.dtype == coding.E4M3 else x


def _tile(width: int, elements: int) -> tuple[int, int]:
    """Tokens and columns of a program."""
    cols = min(MAX_COLS, _power_of_2(width))
    return max(1, elements // cols), cols


def _power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
