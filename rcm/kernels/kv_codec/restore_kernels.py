"""Triton kernels that read and write blobs by address: restore, deposit.

Numbers of e4m3 are taken apart by integer arithmetic where the device has no such type, and every
product of a number and its scale is exact (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KINDS = {
    torch.float8_e4m3fn: tl.uint8, torch.uint8: tl.uint8, torch.int8: tl.int8,
    torch.int16: tl.int16, torch.int32: tl.int32,
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
}  # fmt: skip
"""How the tensors of a blob are read at their addresses; e4m3 by its bits."""


@triton.jit
def _e4m3(bits):
    """float32 of the bits (int32) of e4m3 numbers: of a half float whose exponent is too small by
    8.
    """
    half = (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def _stored(ptr, index, keep, E4M3: tl.constexpr):
    """Scales or zeros as float32."""
    raw = tl.load(ptr + index, mask=keep, other=0)
    if E4M3:
        return _e4m3(raw.to(tl.int32))
    return raw.to(tl.float32)


@triton.jit
def number_of(code, DTYPE: tl.constexpr, OFFSET: tl.constexpr):
    """float32 of unsigned codes (int32)."""
    if DTYPE == "fp8":
        return _e4m3(code)
    if DTYPE == "fp4":
        size = code & 7
        half = tl.where(size < 4, size, tl.where(size < 6, 2 * size - 4, 4 * size - 16)).to(
            tl.float32
        )
        return tl.where(code >= 8, -0.5 * half, 0.5 * half)
    return code.to(tl.float32) - OFFSET


@triton.jit
def at_address(row, field: tl.constexpr, KIND: tl.constexpr):
    """Pointer to elements of KIND at the address in the column `field` of a row of the table."""
    return tl.multiple_of(tl.load(row + field).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _place(
    batch, token, head, channel, tokens, heads,
    AXIS: tl.constexpr, GROUP: tl.constexpr, PER_BYTE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """(byte, place in it, group) of elements whose rows do not run over tokens: where `codes.pack`
    put them, and their scale.
    """
    if AXIS == "token":
        row, at, length = (batch * tokens + token) * heads + head, channel, D
    elif AXIS == "head":
        row, at, length = batch * heads + head, token * D + channel, tokens * D
    else:
        row, at, length = batch, (token * heads + head) * D + channel, tokens * heads * D
    if AXIS == "token" and D % GROUP == 0 and D % PER_BYTE == 0:
        # one division of a running index keeps neighbouring lanes on neighbouring addresses
        flat = row * D + at
        return flat // PER_BYTE, at % PER_BYTE, flat // GROUP
    return (
        row * tl.cdiv(length, PER_BYTE) + at // PER_BYTE,
        at % PER_BYTE,
        row * tl.cdiv(length, GROUP) + at // GROUP,
    )


@triton.jit
def _spread(
    ptr, row, tile, there, width,
    GROUP: tl.constexpr, E4M3: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Scales or zeros [T, C] of groups along the channels of tokens `row` [T, 1], each loaded once
    for its GROUP neighbours.
    """
    group = (tile * (COLS // GROUP) + tl.arange(0, COLS // GROUP))[None, :]
    held = _stored(ptr, row * (width // GROUP) + group, there & (group * GROUP < width), E4M3)
    return tl.reshape(
        tl.broadcast_to(tl.expand_dims(held, 2), (TOKENS, COLS // GROUP, GROUP)), (TOKENS, COLS)
    )


@triton.jit
def _part(
    code, scale, zero, PLACE: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, HIGH_FIRST: tl.constexpr, BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """The elements at one place of bytes."""
    bits: tl.constexpr = BITS * (8 // BITS - 1 - PLACE) if HIGH_FIRST else BITS * PLACE
    value = number_of((code >> bits) & ((1 << BITS) - 1), DTYPE, OFFSET) * scale
    return value + zero if HAS_ZERO else value


@triton.jit
def _along_channels(
    row, batch, token, byte, tokens, heads,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, HIGH_FIRST: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, E4M3: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_UNIT: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Elements of bytes (columns `byte` [1, C]) and groups that run along the channels of a head: a
    byte and its scale are loaded once.
    """
    per_byte: tl.constexpr = 8 // BITS
    scales: tl.constexpr = tl.uint8 if E4M3 else tl.float16
    keep = (token < tokens) & (byte < heads * (D // per_byte))
    code = tl.load(
        at_address(row, 0, tl.uint8) + (batch * tokens + token) * (heads * (D // per_byte)) + byte,
        mask=keep,
        other=0,
    ).to(tl.int32)
    group = (batch * tokens + token) * (heads * (D // GROUP)) + byte // (GROUP // per_byte)
    scale = _stored(at_address(row, 1, scales), group, keep, E4M3)
    if HAS_UNIT:
        scale *= tl.load(at_address(row, 3, tl.float32) + batch)
    zero = _stored(at_address(row, 2, scales), group, keep, E4M3) if HAS_ZERO else scale
    first = _part(code, scale, zero, 0, DTYPE, OFFSET, HIGH_FIRST, BITS, HAS_ZERO)
    second = _part(code, scale, zero, 1, DTYPE, OFFSET, HIGH_FIRST, BITS, HAS_ZERO)
    if BITS == 4:
        parts = tl.join(first, second)
    else:
        third = _part(code, scale, zero, 2, DTYPE, OFFSET, HIGH_FIRST, BITS, HAS_ZERO)
        fourth = _part(code, scale, zero, 3, DTYPE, OFFSET, HIGH_FIRST, BITS, HAS_ZERO)
        parts = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(parts, (TOKENS, COLS))


@triton.jit
def _elements(
    row, batch, token, col, head, channel, keep, tile, tokens, heads, PLACE: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, SIGNED: tl.constexpr, HIGH_FIRST: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    AXIS: tl.constexpr, E4M3: tl.constexpr, NATIVE: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    D: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """number * scale (+ zero) of elements [T, C]. AXIS "channel": they are at the place PLACE of
    their bytes.
    """
    per_byte: tl.constexpr = 8 // BITS
    scales: tl.constexpr = tl.uint8 if E4M3 else tl.float16
    if AXIS == "channel":
        source = head * D + channel
        byte = (batch * tl.cdiv(tokens, per_byte) + token // per_byte) * (heads * D) + source
        place = PLACE
        # the tile lies in one group of tokens: a scale per column
        if GROUP % (TOKENS * per_byte) == 0:
            first = tl.program_id(0) * (TOKENS * per_byte) // GROUP
            group = (batch * tl.cdiv(tokens, GROUP) + first) * (heads * D) + source
            known = col < heads * D
        else:
            group = (batch * tl.cdiv(tokens, GROUP) + token // GROUP) * (heads * D) + source
            known = keep
    else:
        byte, place, group = _place(
            batch, token, head, channel, tokens, heads, AXIS, GROUP, per_byte, D
        )
        known = keep
    if SIGNED:
        value = tl.load(at_address(row, 0, tl.int8) + byte, mask=keep, other=0).to(tl.float32)
    else:
        code = tl.load(at_address(row, 0, tl.uint8) + byte, mask=keep, other=0)
        if NATIVE:
            value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            code = code.to(tl.int32)
            if BITS < 8:
                bits = BITS * (per_byte - 1 - place) if HIGH_FIRST else BITS * place
                code = (code >> bits) & ((1 << BITS) - 1)
            value = number_of(code, DTYPE, OFFSET)
    if SPREAD:
        scale = _spread(
            at_address(row, 1, scales), batch * tokens + token, tile, token < tokens, heads * D,
            GROUP, E4M3, TOKENS, COLS,
        )  # fmt: skip
    else:
        scale = _stored(at_address(row, 1, scales), group, known, E4M3)
    if HAS_UNIT:
        scale *= tl.load(at_address(row, 3, tl.float32) + batch)
    value *= scale
    if HAS_ZERO:
        if SPREAD:
            value += _spread(
                at_address(row, 2, scales), batch * tokens + token, tile, token < tokens, heads * D,
                GROUP, E4M3, TOKENS, COLS,
            )  # fmt: skip
        else:
            value += _stored(at_address(row, 2, scales), group, known, E4M3)
    return value


@triton.jit
def _hadamard(x, ROOT: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr):
    """Walsh-Hadamard transform of every D neighbours of a row, as `smoothing.hadamard` adds."""
    half: tl.constexpr = D // 2
    for level in tl.static_range(20):
        if (1 << level) <= half:
            pairs = tl.reshape(x, (TOKENS * COLS // (2 << level), 2, 1 << level))
            a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (TOKENS, COLS))
    return x * ROOT


@triton.jit
def _angles(table, place, there, D: tl.constexpr, COLS: tl.constexpr):
    """cos or sin [T, C / 2] for the tokens at `place` [T, 1] and the channel pairs of whole
    heads.
    """
    return tl.load(
        table + place * (D // 2) + (tl.arange(0, COLS // 2) % (D // 2))[None, :],
        mask=there,
        other=0.0,
    )


@triton.jit
def _turned(x, cos, sin, kind, TOKENS: tl.constexpr, COLS: tl.constexpr):
    """Channel pairs of rows, rounded to `kind`, turned by the angles with `cos` and `sin` [T, C /
    2].
    """
    even, odd = tl.split(tl.reshape(x.to(kind).to(tl.float32), (TOKENS, COLS // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (TOKENS, COLS))


@triton.jit
def _centroids(
    row, stage, batch, line, head, col, keep, sizes,
    CENTROIDS: tl.constexpr, INDEX: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Centroids [T, C] of the tokens `line` [T] in a stage of clustering."""
    batches, tokens, heads, clusters = sizes
    width = heads * D
    token = line[:, None]
    centroids = at_address(row, 4, CENTROIDS) + stage * batches * clusters * width
    which = batch * clusters
    if PER_HEAD:
        assigned = at_address(row, 5, INDEX) + (stage * batches + batch) * tokens * heads
        which += tl.load(assigned + token * heads + head, mask=keep, other=0).to(tl.int64)
    # loaded as a vector: a column would be loaded once per element
    elif INDEX is not None:
        assigned = at_address(row, 5, INDEX) + (stage * batches + batch) * tokens
        which += tl.load(assigned + line, mask=line < tokens, other=0).to(tl.int64)[:, None]
    return tl.load(centroids + which * width + col, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def restore(
    table, starts, out, cos, sin, strides, sizes,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, SIGNED: tl.constexpr, HIGH_FIRST: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    AXIS: tl.constexpr, E4M3: tl.constexpr, NATIVE: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_UNIT: tl.constexpr, UNDO: tl.constexpr,
    ROOT: tl.constexpr, STAGES: tl.constexpr, FIRST_FIRST: tl.constexpr, CENTROIDS: tl.constexpr,
    INDEX: tl.constexpr,
    PER_HEAD: tl.constexpr, TURN: tl.constexpr, FIELDS: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr,
    PLACES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out[b, start + s, n, d] = number * scale (+ zero), unsmoothed, + centroids, for every blob of
    a table; turned if TURN.

    `table` int64 [blobs, FIELDS] of addresses (`blob.FIELDS`), `starts` int64 [blobs] first tokens
    in `out`, whose `strides` are over batch, token, head; `sizes` = (batch, tokens, heads,
    clusters). A program takes TOKENS rows of bytes, each of which holds PLACES tokens, and TILES
    times COLS columns; the angles of a token are loaded once.
    """
    batches, tokens, heads, clusters = sizes
    width = heads * D
    blob = tl.program_id(2) // batches
    batch = (tl.program_id(2) % batches).to(tl.int64)
    row = table + blob * FIELDS
    start = tl.load(starts + blob)
    stride_b, stride_s, stride_n = strides
    kind = out.dtype.element_ty
    for place in tl.static_range(PLACES):
        line = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)) * PLACES + place
        token = line[:, None]
        target = start + token.to(tl.int64)
        if TURN:
            c = _angles(cos, target, token < tokens, D, COLS)
            s = _angles(sin, target, token < tokens, D, COLS)
        for tile in range(TILES):
            at = tl.program_id(1) * TILES + tile
            col = (at * COLS + tl.arange(0, COLS))[None, :]
            keep = (token < tokens) & (col < width)
            head = col // D
            channel = col % D
            if UNDO == "reorder":
                channel = tl.load(
                    at_address(row, 6, tl.int16) + batch * width + col, mask=col < width, other=0
                ).to(tl.int32)
            if DTYPE == "bf16":
                value = tl.load(
                    at_address(row, 0, tl.bfloat16)
                    + (batch * tokens + token) * width
                    + head * D
                    + channel,
                    mask=keep,
                    other=0.0,
                )
                value = value.to(tl.float32)
            elif (
                AXIS == "token"
                and BITS < 8
                and D % GROUP == 0
                and GROUP % (8 // BITS) == 0
                and UNDO != "reorder"
            ):
                byte = (at * (COLS * BITS // 8) + tl.arange(0, COLS * BITS // 8))[None, :]
                value = _along_channels(
                    row, batch, token, byte, tokens, heads, DTYPE, OFFSET, HIGH_FIRST, BITS,
                    GROUP, E4M3, HAS_ZERO, HAS_UNIT,
                    D, TOKENS, COLS,
                )  # fmt: skip
            else:
                value = _elements(
                    row, batch, token, col, head, channel, keep, at, tokens, heads, place, DTYPE,
                    OFFSET, SIGNED, HIGH_FIRST, BITS, GROUP,
                    AXIS, E4M3, NATIVE, HAS_ZERO, HAS_UNIT, D, TOKENS, COLS,
                    AXIS == "token" and D % GROUP == 0 and COLS % GROUP == 0 and UNDO != "reorder",
                )  # fmt: skip
            if UNDO == "balance":
                value *= tl.load(
                    at_address(row, 6, tl.bfloat16) + batch * width + col,
                    mask=col < width,
                    other=0.0,
                ).to(tl.float32)
            if UNDO == "hadamard":
                value = _hadamard(value, ROOT, D, TOKENS, COLS)
            for i in tl.static_range(STAGES):
                stage = i if FIRST_FIRST else STAGES - 1 - i
                value += _centroids(
                    row, stage, batch, line, head, col, keep, sizes, CENTROIDS, INDEX, PER_HEAD, D
                )
            if TURN:
                value = _turned(value, c, s, kind, TOKENS, COLS)
            tl.store(
                out + batch * stride_b + target * stride_s + head * stride_n + col % D,
                value.to(kind),
                mask=keep,
            )


@triton.jit
def write_row(row, codes, scales, zeros, unit, centroids, assignments, undo):
    """Eight integers: addresses of the fields of a blob, and 0."""
    tl.store(row, codes.to(tl.int64))
    tl.store(row + 1, scales.to(tl.int64))
    tl.store(row + 2, zeros.to(tl.int64))
    tl.store(row + 3, unit.to(tl.int64))
    tl.store(row + 4, centroids.to(tl.int64))
    tl.store(row + 5, assignments.to(tl.int64))
    tl.store(row + 6, undo.to(tl.int64))
    tl.store(row + 7, tl.zeros((), tl.int64))


@triton.jit
def deposit(row, sources, sizes, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the bytes of the tensors of one blob, `sizes` of them, to the addresses in a row of the
    table.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for field in tl.static_range(FIELDS):
        if tl.program_id(1) == field:
            held = tl.load(sources[field] + at, mask=at < sizes[field])
            tl.store(at_address(row, field, tl.uint8) + at, held, mask=at < sizes[field])
