"""From tensors and blobs to launches of `kernels`: any number of blobs restored in one, a tensor
encoded in two, or in one where numbers have 8 bits. They equal the plain torch of `codes`,
`smoothing` and `clusters` bit for bit, and say no where they do not apply.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec import fitting
from rcm.kernels.kv_codec.blob import FIELDS, Blob
from rcm.kernels.kv_codec.clusters import Clusters
from rcm.kernels.kv_codec.codes import Codes
from rcm.kernels.kv_codec.formats import E4M3, FLOOR, TOP, CodeFormat
from rcm.kernels.kv_codec.spec import BITS
from rcm.kernels.launching import FLOATS, device_of, power_of_2, runs_on, unit_stride

ELEMENTS = 4096
"""Elements per program of restore, bytes per program of encode times codes in a byte."""
MAX_COLS = 256
TILES = 3
"""Tiles across that a program of restore takes, for which it loads the angles of its tokens
once.
"""
DEPOSITED = 16384
"""Bytes per program of deposit."""
WARPS = 4
"""Warps per program of restore."""
MAX_GROUP = 256
"""Elements of a group that a program still holds whole."""


def fits(shape: tuple[int, ...], fmt: CodeFormat) -> bool:
    """Whether groups and bytes of the format are those that encoding has kernels for: over tokens,
    or within the channels of a head.
    """
    if fmt.granularity == "channel":
        return True
    return fmt.granularity == "token" and not (
        shape[3] % coding.group_length(shape[3], fmt.group_size) or shape[3] % fmt.per_byte
    )


def restore(
    like: Blob,
    table: Tensor,
    starts: Tensor,
    out: Tensor,
    *,
    turn: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Write the blobs at the addresses of `table` int64 [P, 7] (`Blob.addresses`), all in the form
    of `like`, into `out` [B, L, N, D] from the tokens `starts` int64 [P] on, with one launch;
    False, and nothing done, where it cannot.

    `turn`: cos and sin [L, D / 2] of the angles by which the restored channel pairs of each token
    are turned.
    """
    if not (runs_on(out) and out.dtype in FLOATS and out.stride(3) == 1):
        return False
    b, s, n, d = like.shape
    if b * s * n * d == 0 or len(table) == 0:
        return True
    clusters = like.clusters
    constants = _codes_constants(like.codes, out) | _clusters_constants(clusters)
    rows, cols = _tile(
        n * d,
        ELEMENTS,
        least=power_of_2(d) if like.undo.kind == "hadamard" or turn is not None else 1,
    )
    if turn is not None and cols % d:
        return False
    places = (
        like.codes.format.per_byte
        if isinstance(like.codes, Codes) and like.codes.format.granularity == "channel"
        else 1
    )
    across = -(-n * d // cols)
    tiles = min(TILES, across)
    cos, sin = (table, table) if turn is None else turn
    from rcm.kernels.kv_codec import restore_kernels as kernels

    with device_of(out):
        kernels.restore[(-(-s // (rows * places)), -(-across // tiles), b * len(table))](
            table, starts, out, cos, sin, out.stride()[:3],
            (b, s, n, 1 if clusters is None else clusters.centroids.shape[2]),
            UNDO=like.undo.kind, ROOT=d**-0.5, TURN=turn is not None, FIELDS=FIELDS,
            D=d, TOKENS=rows, COLS=cols, PLACES=places, TILES=tiles, num_warps=WARPS, **constants,
        )  # fmt: skip
    return True


def row_of(blob: Blob) -> Tensor:
    """The addresses of one blob and a start of 0, int64 [8] on its device, written there by a
    launch: nothing is copied from the host.
    """
    return _row(blob.addresses, blob.device)


def deposit(blob: Blob, row: Tensor) -> None:
    """Copy the tensors of `blob` to the addresses in `row` int64 [7] of a table."""
    from rcm.kernels.kv_codec import restore_kernels as kernels

    held = [None if x is None else x.reshape(-1).view(torch.uint8) for x in blob.fields]
    sources = tuple(row.view(torch.uint8) if x is None else x for x in held)
    sizes = tuple(0 if x is None else x.numel() for x in held)
    with device_of(row):
        kernels.deposit[(-(-max(sizes) // DEPOSITED), FIELDS)](
            row, sources, sizes, FIELDS=FIELDS, BLOCK=DEPOSITED, num_warps=4
        )


def _codes_constants(codes: Codes | Tensor, out: Tensor) -> dict[str, object]:
    """What a launch of `kernels.restore` into `out` knows of the codes."""
    if not isinstance(codes, Codes):
        absent = dict.fromkeys(
            ("SIGNED", "HIGH_FIRST", "E4M3", "HAS_ZERO", "HAS_UNIT", "NATIVE"), False
        )
        return {"DTYPE": "bf16", "OFFSET": 0.0, "BITS": 16, "GROUP": 1, "AXIS": "token", **absent}
    fmt = codes.format
    return {
        "DTYPE": fmt.dtype,
        "OFFSET": fmt.offset,
        "SIGNED": codes.data.dtype == torch.int8,
        "HIGH_FIRST": fmt.high_first,
        "BITS": BITS[fmt.dtype],
        "GROUP": coding.group_length(
            coding.rows_shape(codes.shape, fmt.granularity)[1], fmt.group_size
        ),
        "AXIS": fmt.granularity,
        "E4M3": codes.scales.dtype == E4M3,
        "HAS_ZERO": codes.zeros is not None,
        "HAS_UNIT": codes.unit is not None,
        "NATIVE": _native(out, fmt.dtype),
    }


def _clusters_constants(clusters: Clusters | None) -> dict[str, object]:
    """And of its clusters."""
    if clusters is None:
        return {
            "STAGES": 0,
            "FIRST_FIRST": False,
            "CENTROIDS": None,
            "INDEX": None,
            "PER_HEAD": False,
        }
    from rcm.kernels.kv_codec import restore_kernels as kernels

    assigned = clusters.assignments
    return {
        "STAGES": clusters.centroids.shape[0],
        "FIRST_FIRST": clusters.first_stage_first,
        "CENTROIDS": kernels.KINDS[clusters.centroids.dtype],
        "INDEX": None if assigned is None else kernels.KINDS[assigned.dtype],
        "PER_HEAD": assigned is not None and assigned.dim() == 4,
    }


def encode(
    x: Tensor, fmt: CodeFormat, subtract: tuple[Tensor, Tensor] | None = None
) -> Codes | None:
    """`codes.encode` of `x` [B, S, N, D], less centroids [B, k, N, D] by assignments if `subtract`
    gives them; None where it cannot.
    """
    if not (runs_on(x) and fits(x.shape, fmt) and x.dtype in FLOATS) or x.numel() == 0:
        return None
    b, s, n, d = shape = coding.shape_of(x)
    r, length, c = coding.rows_shape(shape, fmt.granularity)
    group = coding.group_length(length, fmt.group_size)
    if subtract is None and _at_once(x.shape, fmt):
        kind = E4M3 if fmt.dtype == "fp8" else torch.int8
        data = torch.empty(r, length, c, dtype=kind, device=x.device)
        scales = torch.empty(r, -(-length // group), c, dtype=torch.float16, device=x.device)
        places = (data.data_ptr(), scales.data_ptr())
        encode_at(_row((*places, *[0] * (FIELDS - 2)), x.device), x, fmt)
        return Codes(fmt, shape, data, scales, None, None)
    x = unit_stride(x)
    channel = fmt.granularity == "channel"
    low, high = (torch.empty(r, -(-length // group), c, device=x.device) for _ in range(2))
    centroids, assigned = (x, x) if subtract is None else (t.contiguous() for t in subtract)
    sizes = (b, s, n, 1 if subtract is None else centroids.shape[1])
    common = {
        "GROUP": group,
        "CHANNEL": channel,
        "HAS_CLUSTERS": subtract is not None,
        "PER_HEAD": subtract is not None and assigned.dim() == 3,
        "D": d,
        "num_warps": 8,
    }
    source = (x, centroids, assigned)
    from rcm.kernels.kv_codec import kernels

    along = power_of_2(group)
    across = max(1, min(256, ELEMENTS // along))
    groups = n * d if channel else s * n * d // group
    with device_of(x):
        grid = (-(-groups // across), -(-s // group) if channel else 1, b)
        groups_of = {"ALONG": along, "ACROSS": across, **common}
        if fmt.fit:  # `low` and `high` take scales and zeros
            kernels.fit[grid](
                *source, low, high, x.stride()[:3], sizes, **_fit_constants(fmt), **groups_of
            )
            scales, zeros, unit = coding.stored(low, high, fmt, batch=b)
        else:
            kernels.extremes[grid](*source, low, high, x.stride()[:3], sizes, **groups_of)
            scales, zeros, unit = coding.scales_of(low, high, fmt, batch=b)
        divisor, zero = coding.divisors(low, high, scales, zeros, unit, fmt)
        rows, columns = (-(-s // fmt.per_byte), n * d) if channel else (s, n * d // fmt.per_byte)
        data = torch.empty(
            r, rows if channel else d // fmt.per_byte, c, dtype=torch.uint8, device=x.device
        )
        tokens, cols = _tile(columns, ELEMENTS // fmt.per_byte)
        kernels.write_codes[(-(-rows // tokens), -(-columns // cols), b)](
            *source, divisor.contiguous(), divisor if zero is None else zero.contiguous(), data,
            x.stride()[:3], sizes,
            DTYPE=fmt.dtype, ASYMMETRIC=fmt.asymmetric, OFFICIAL=fmt.mode == "official",
            BITS=BITS[fmt.dtype], TOKENS=tokens, COLS=cols, **common,
        )  # fmt: skip
    if fmt.dtype == "fp8":
        data = data.view(E4M3)
    elif fmt.dtype == "int8" and not fmt.asymmetric:
        data = data.view(torch.int8)
    return Codes(fmt, shape, data, scales, zeros, unit)


def _fit_constants(fmt: CodeFormat) -> dict[str, object]:
    """What a launch of `kernels.fit` knows of the format."""
    return {
        "DTYPE": fmt.dtype,
        "ASYMMETRIC": fmt.asymmetric,
        "BITS": BITS[fmt.dtype],
        "ZERO": int(2 * fmt.offset),
        "STEP": fitting.step_of(fmt),
        "MIDDLE": fitting.middle_of(fmt),
        "FLOOR": FLOOR,
        "LEAST": fitting.floor_of(fmt),
        "GRID": fitting.GRID,
        "CANDIDATES": fitting.CANDIDATES,
        "enable_fp_fusion": False,
    }


def encode_at(row: Tensor, x: Tensor, fmt: CodeFormat) -> bool:
    """`encode`, written with one launch to the blob of that form whose addresses are in `row` int64
    [7]: symmetric numbers of 8 bits in mode "rcm", whose scales depend on their group alone. False,
    and nothing done, for others.
    """
    if not (runs_on(x) and x.dtype in FLOATS and x.numel() and _at_once(x.shape, fmt)):
        return False
    x = unit_stride(x)
    b, s, n, d = x.shape
    channel = fmt.granularity == "channel"
    group = coding.group_length(s if channel else d, fmt.group_size)
    along = power_of_2(group)
    across = max(1, min(256, ELEMENTS // along))
    groups = n * d if channel else s * n * d // group
    from rcm.kernels.kv_codec import kernels

    with device_of(x):
        kernels.encode_bytes[(-(-groups // across), -(-s // group) if channel else 1, b)](
            x, row, x.stride()[:3], (b, s, n, 1),
            DTYPE=fmt.dtype, TOP=TOP[fmt.dtype], NATIVE=_native(x, fmt.dtype),
            GROUP=group, CHANNEL=channel, D=d, ALONG=along, ACROSS=across, num_warps=8,
        )  # fmt: skip
    return True


def _at_once(shape: tuple[int, ...], fmt: CodeFormat) -> bool:
    """Whether `encode_at` applies to tensors of a shape."""
    length = shape[1] if fmt.granularity == "channel" else shape[3]
    return (
        fmt.mode == "rcm"
        and BITS[fmt.dtype] == 8
        and not fmt.asymmetric
        and fits(shape, fmt)
        and coding.group_length(length, fmt.group_size) <= MAX_GROUP
    )


def _native(x: Tensor, dtype: str) -> bool:
    """Whether the device of `x` has instructions for numbers of that type."""
    return dtype == "fp8" and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _row(addresses: Sequence[int], device: torch.device) -> Tensor:
    """int64 [8], written by a launch."""
    from rcm.kernels.kv_codec import restore_kernels as kernels

    row = torch.empty(FIELDS + 1, dtype=torch.int64, device=device)
    with device_of(row):
        kernels.write_row[(1,)](row, *addresses, num_warps=1)
    return row


def _tile(width: int, elements: int, *, least: int = 1) -> tuple[int, int]:
    """Tokens and columns of a program, at `least` so many columns."""
    cols = max(least, min(MAX_COLS, power_of_2(width)))
    return max(1, elements // cols), cols
