"""Triton kernels of the codec: restore, deposit, extremes of groups, codes.

A tensor is seen as [B, S, W], W = N D channels of all heads. CHANNEL: groups and bytes run over tokens, else over channels; either way
neighbouring lanes read neighbouring addresses. Numbers of e4m3 are taken apart by integer arithmetic, so nothing here needs hardware
with that type, and every product of a number and its scale is exact (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KINDS = {
    torch.float8_e4m3fn: tl.uint8, torch.uint8: tl.uint8, torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32,
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
}  # fmt: skip
"""How the tensors of a blob are read at their addresses; e4m3 by its bits."""


@triton.jit
def _e4m3(bits):
    """float32 of the bits (int32) of e4m3 numbers."""
    magnitude = bits & 127
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where((bits & 128) != 0, -value, value)


@triton.jit
def _to_e4m3(y):
    """Bits (int32) of the e4m3 numbers nearest to float32 `y` within +-448, halves to even."""
    size = tl.abs(y)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    per_step = ((130 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = _to_even(size * per_step).to(tl.int32)
    return (exponent + 6) * 8 + steps + ((y.to(tl.int32, bitcast=True) >> 24) & 128)


@triton.jit
def _to_even(y):
    """Whole numbers nearest to `y`, |y| < 2^22, halves to even: 1.5 2^23 leaves no bits for a fraction."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _stored(ptr, index, keep, E4M3: tl.constexpr):
    """Scales or zeros as float32."""
    raw = tl.load(ptr + index, mask=keep, other=0)
    if E4M3:
        return _e4m3(raw.to(tl.int32))
    return raw.to(tl.float32)


@triton.jit
def _number(code, DTYPE: tl.constexpr, OFFSET: tl.constexpr):
    """float32 of unsigned codes (int32)."""
    if DTYPE == "fp8":
        return _e4m3(code)
    if DTYPE == "fp4":
        size = code & 7
        half = tl.where(size < 4, size, tl.where(size < 6, 2 * size - 4, 4 * size - 16)).to(tl.float32)
        return tl.where(code >= 8, -0.5 * half, 0.5 * half)
    return code.to(tl.float32) - OFFSET


@triton.jit
def _centroid(centroids, assigned, batch, token, head, col, keep, cluster_sizes, PER_HEAD: tl.constexpr):
    """Centroids of tokens [T, C]; `cluster_sizes` = (tokens, heads, clusters, width)."""
    tokens, heads, clusters, width = cluster_sizes
    if PER_HEAD:
        which = tl.load(assigned + (batch * tokens + token) * heads + head, mask=keep, other=0).to(tl.int64)
    else:
        which = tl.load(assigned + batch * tokens + token, mask=token < tokens, other=0).to(tl.int64)
    return tl.load(centroids + (batch * clusters + which) * width + col, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _at(row, field: tl.constexpr, KIND: tl.constexpr):
    """Pointer to elements of KIND at the address in the column `field` of a row of the table."""
    return tl.multiple_of(tl.load(row + field).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _place(
    batch, token, head, channel, tokens, heads,
    AXIS: tl.constexpr, GROUP: tl.constexpr, PER_BYTE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """(byte, place in it, group) of elements: where `codes.pack` put them, and their scale."""
    if AXIS == "channel":
        col = head * D + channel
        byte = (batch * tl.cdiv(tokens, PER_BYTE) + token // PER_BYTE) * (heads * D) + col
        return byte, token % PER_BYTE + 0 * channel, (batch * tl.cdiv(tokens, GROUP) + token // GROUP) * (heads * D) + col
    if AXIS == "token":
        row, at, length = (batch * tokens + token) * heads + head, channel, D
    elif AXIS == "head":
        row, at, length = batch * heads + head, token * D + channel, tokens * D
    else:
        row, at, length = batch, (token * heads + head) * D + channel, tokens * heads * D
    if AXIS == "token" and D % GROUP == 0 and D % PER_BYTE == 0:
        flat = row * D + at  # one division of a running index keeps neighbouring lanes on neighbouring addresses
        return flat // PER_BYTE, at % PER_BYTE, flat // GROUP
    return row * tl.cdiv(length, PER_BYTE) + at // PER_BYTE, at % PER_BYTE, row * tl.cdiv(length, GROUP) + at // GROUP


@triton.jit
def _part(
    code, scale, zero, PLACE: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, HIGH_FIRST: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """The elements at one place of bytes."""
    bits: tl.constexpr = BITS * (8 // BITS - 1 - PLACE) if HIGH_FIRST else BITS * PLACE
    value = _number((code >> bits) & ((1 << BITS) - 1), DTYPE, OFFSET) * scale
    return value + zero if HAS_ZERO else value


@triton.jit
def _along_channels(
    row, batch, token, tokens, heads,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, HIGH_FIRST: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, E4M3: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_UNIT: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Elements of bytes and groups that run along the channels of a head: a byte and its scale are loaded once, not once per element."""
    per_byte: tl.constexpr = 8 // BITS
    scales: tl.constexpr = tl.uint8 if E4M3 else tl.float16
    col = tl.program_id(1) * (COLS // per_byte) + tl.arange(0, COLS // per_byte)[None, :]
    keep = (token < tokens) & (col < heads * (D // per_byte))
    code = tl.load(_at(row, 0, tl.uint8) + (batch * tokens + token) * (heads * (D // per_byte)) + col, mask=keep, other=0).to(tl.int32)
    group = (batch * tokens + token) * (heads * (D // GROUP)) + col // (GROUP // per_byte)
    scale = _stored(_at(row, 1, scales), group, keep, E4M3)
    if HAS_UNIT:
        scale *= tl.load(_at(row, 3, tl.float32) + batch)
    zero = _stored(_at(row, 2, scales), group, keep, E4M3) if HAS_ZERO else scale
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
def _turned(x, cos, sin, place, there, kind, D: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr):
    """Channel pairs of rows, rounded to `kind`, turned by the angles at `place` [T, 1] of cos and sin [L, D / 2]."""
    even, odd = tl.split(tl.reshape(x.to(kind).to(tl.float32), (TOKENS, COLS // 2, 2)))
    at = place * (D // 2) + (tl.arange(0, COLS // 2) % (D // 2))[None, :]
    c = tl.load(cos + at, mask=there, other=0.0)
    s = tl.load(sin + at, mask=there, other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (TOKENS, COLS))


@triton.jit
def restore(
    table, starts, out, cos, sin, strides, sizes,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, SIGNED: tl.constexpr, HIGH_FIRST: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    AXIS: tl.constexpr, E4M3: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_UNIT: tl.constexpr, UNDO: tl.constexpr, ROOT: tl.constexpr,
    STAGES: tl.constexpr, FIRST_FIRST: tl.constexpr, CENTROIDS: tl.constexpr, INDEX: tl.constexpr, PER_HEAD: tl.constexpr,
    TURN: tl.constexpr, FIELDS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[b, start + s, n, d] = number * scale (+ zero), unsmoothed, + centroids, for every blob of a table; turned if TURN.

    `table` int64 [blobs, FIELDS] of addresses (`fused.FIELDS`), `starts` int64 [blobs] first tokens in `out`, whose `strides` are over
    batch, token, head; `sizes` = (batch, tokens, heads, clusters).
    """
    batches, tokens, heads, clusters = sizes
    width = heads * D
    per_byte: tl.constexpr = 8 // BITS if BITS <= 8 else 1
    scales: tl.constexpr = tl.uint8 if E4M3 else tl.float16
    blob = tl.program_id(2) // batches
    batch = (tl.program_id(2) % batches).to(tl.int64)
    row = table + blob * FIELDS
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    keep = (token < tokens) & (col < width)
    head = col // D
    channel = col % D
    if UNDO == "reorder":
        channel = tl.load(_at(row, 6, tl.int16) + batch * width + col, mask=col < width, other=0).to(tl.int32)
    if DTYPE == "bf16":
        value = tl.load(_at(row, 0, tl.bfloat16) + (batch * tokens + token) * width + head * D + channel, mask=keep, other=0.0)
        value = value.to(tl.float32)
    elif AXIS == "token" and BITS < 8 and D % GROUP == 0 and GROUP % per_byte == 0 and UNDO != "reorder":
        value = _along_channels(
            row, batch, token, tokens, heads, DTYPE, OFFSET, HIGH_FIRST, BITS, GROUP, E4M3, HAS_ZERO, HAS_UNIT, D, TOKENS, COLS
        )
    else:
        byte, place, group = _place(batch, token, head, channel, tokens, heads, AXIS, GROUP, per_byte, D)
        if SIGNED:
            code = tl.load(_at(row, 0, tl.int8) + byte, mask=keep, other=0).to(tl.int32)
        else:
            code = tl.load(_at(row, 0, tl.uint8) + byte, mask=keep, other=0).to(tl.int32)
        if BITS < 8:
            bits = BITS * (per_byte - 1 - place) if HIGH_FIRST else BITS * place
            code = (code >> bits) & ((1 << BITS) - 1)
        scale = _stored(_at(row, 1, scales), group, keep, E4M3)
        if HAS_UNIT:
            scale *= tl.load(_at(row, 3, tl.float32) + batch)
        value = (code.to(tl.float32) if SIGNED else _number(code, DTYPE, OFFSET)) * scale
        if HAS_ZERO:
            value += _stored(_at(row, 2, scales), group, keep, E4M3)
    if UNDO == "balance":
        value *= tl.load(_at(row, 6, tl.bfloat16) + batch * width + col, mask=col < width, other=0.0).to(tl.float32)
    if UNDO == "hadamard":
        value = _hadamard(value, ROOT, D, TOKENS, COLS)
    for i in tl.static_range(STAGES):
        stage = i if FIRST_FIRST else STAGES - 1 - i
        centroids = _at(row, 4, CENTROIDS) + stage * batches * clusters * width
        if INDEX is None:
            value += tl.load(centroids + batch * width + col, mask=col < width, other=0.0).to(tl.float32)
        else:
            assigned = _at(row, 5, INDEX) + stage * batches * tokens * (heads if PER_HEAD else 1)
            value += _centroid(centroids, assigned, batch, token, head, col, keep, (tokens, heads, clusters, width), PER_HEAD)
    kind = out.dtype.element_ty
    place_out = tl.load(starts + blob) + token.to(tl.int64)
    if TURN:
        value = _turned(value, cos, sin, place_out, token < tokens, kind, D, TOKENS, COLS)
    stride_b, stride_s, stride_n = strides
    tl.store(out + batch * stride_b + place_out * stride_s + head * stride_n + col % D, value.to(kind), mask=keep)


@triton.jit
def deposit(row, sources, sizes, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the bytes of the tensors of one blob, `sizes` of them, to the addresses in a row of the table."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for field in tl.static_range(FIELDS):
        if tl.program_id(1) == field:
            held = tl.load(sources[field] + at, mask=at < sizes[field])
            tl.store(_at(row, field, tl.uint8) + at, held, mask=at < sizes[field])


@triton.jit
def _residual(
    x, centroids, assigned, batch, token, col, keep, strides, sizes,
    HAS_CLUSTERS: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Elements of the tensor, less the centroids of their tokens, in float32."""
    _, tokens, heads, clusters = sizes
    stride_b, stride_s, stride_n = strides
    head = col // D
    value = tl.load(x + batch * stride_b + token.to(tl.int64) * stride_s + head * stride_n + col % D, mask=keep, other=0.0).to(tl.float32)
    if HAS_CLUSTERS:
        value -= _centroid(centroids, assigned, batch, token, head, col, keep, (tokens, heads, clusters, heads * D), PER_HEAD)
    return value


@triton.jit
def extremes(
    x, centroids, assigned, low, high, strides, sizes,
    GROUP: tl.constexpr, CHANNEL: tl.constexpr, HAS_CLUSTERS: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Least and largest element of every group, float32. A program takes ACROSS groups; ALONG is GROUP up to a power of two."""
    _, tokens, heads, _ = sizes
    width = heads * D
    batch = tl.program_id(2).to(tl.int64)
    inside = tl.arange(0, ALONG)[:, None]
    across = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    if CHANNEL:
        token = tl.program_id(1) * GROUP + inside
        col = across[None, :]
        group = (batch * tl.cdiv(tokens, GROUP) + tl.program_id(1)) * width + across
        there = across < width
    else:
        per_token = width // GROUP
        token = (across // per_token)[None, :]
        col = (across % per_token)[None, :] * GROUP + inside
        group = batch * tokens * per_token + across
        there = across < tokens * per_token
    keep = (inside < GROUP) & (token < tokens) & there[None, :]
    value = _residual(x, centroids, assigned, batch, token, col, keep, strides, sizes, HAS_CLUSTERS, PER_HEAD, D)
    tl.store(low + group, tl.min(tl.where(keep, value, float("inf")), axis=0), mask=there)
    tl.store(high + group, tl.max(tl.where(keep, value, float("-inf")), axis=0), mask=there)


@triton.jit
def _code(y, DTYPE: tl.constexpr, ASYMMETRIC: tl.constexpr, OFFICIAL: tl.constexpr, BITS: tl.constexpr):
    """Unsigned codes (int32) of scaled elements; of int8 the low byte of the signed number."""
    top: tl.constexpr = (1 << BITS) - 1
    half: tl.constexpr = 1 << (BITS - 1)
    if DTYPE == "fp8":
        return _to_e4m3(tl.minimum(tl.maximum(y, -448.0), 448.0))
    if DTYPE == "fp4":
        size = tl.abs(y)
        index, best = tl.zeros_like(size).to(tl.int32), size
        for i in tl.static_range(1, 8):
            distance = tl.abs(size - (0.5 * i if i < 4 else (i - 2.0 if i < 6 else 2.0 * i - 8.0)))
            index = tl.where(distance < best, i, index)
            best = tl.minimum(distance, best)
        return index + tl.where((y < 0) & (index > 0), 8, 0)
    if DTYPE == "int2" and not ASYMMETRIC and not OFFICIAL:
        index, best = tl.zeros_like(y).to(tl.int32), tl.abs(y + 1.5)
        for i in tl.static_range(1, 4):
            distance = tl.abs(y - (i - 1.5))
            index = tl.where(distance < best, i, index)
            best = tl.minimum(distance, best)
        return index
    bounded = tl.minimum(tl.maximum(y, -1024.0), 1024.0)
    if OFFICIAL:
        size = tl.abs(bounded)
        whole = tl.floor(size)
        size = whole + tl.where(size - whole >= 0.5, 1.0, 0.0)
        number = tl.where(bounded < 0, -size, size).to(tl.int32)
    else:
        number = _to_even(bounded).to(tl.int32)
    if ASYMMETRIC:
        return tl.minimum(tl.maximum(number, 0), top)
    if OFFICIAL:
        number = tl.minimum(tl.maximum(number, 1 - half), half - 1)
        return number if BITS == 8 else number + half - 1
    number = tl.minimum(tl.maximum(number, -half), half - 1)
    return number if BITS == 8 else number + half


@triton.jit
def write_codes(
    x, centroids, assigned, scale, zero, data, strides, sizes,
    DTYPE: tl.constexpr, ASYMMETRIC: tl.constexpr, OFFICIAL: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHANNEL: tl.constexpr,
    HAS_CLUSTERS: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Packed codes of a tensor given what they are computed with: float32 `scale` and `zero` per group.

    A program writes TOKENS x COLS bytes.
    """
    _, tokens, heads, _ = sizes
    width = heads * D
    per_byte: tl.constexpr = 8 // BITS
    batch = tl.program_id(2).to(tl.int64)
    at = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    across = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    rows = tl.cdiv(tokens, per_byte) if CHANNEL else tokens
    columns = width if CHANNEL else width // per_byte
    total = tl.zeros((TOKENS, COLS), tl.int32)
    for place in tl.static_range(per_byte):
        token = at * per_byte + place if CHANNEL else at
        col = across if CHANNEL else across * per_byte + place
        keep = (token < tokens) & (col < width)
        if CHANNEL:
            group = (batch * tl.cdiv(tokens, GROUP) + token // GROUP) * width + col
        else:
            group = ((batch * tokens + token) * width + col) // GROUP
        value = _residual(x, centroids, assigned, batch, token, col, keep, strides, sizes, HAS_CLUSTERS, PER_HEAD, D)
        if ASYMMETRIC:
            value -= tl.load(zero + group, mask=keep, other=0.0)
        divisor = tl.load(scale + group, mask=keep, other=1.0)
        beyond = tl.where(value > 0, 1024.0, tl.where(value < 0, -1024.0, 0.0))
        value = tl.where(divisor > 0, tl.div_rn(value, tl.where(divisor > 0, divisor, 1.0)), beyond)
        code = _code(value, DTYPE, ASYMMETRIC, OFFICIAL, BITS)
        total |= tl.where(keep, code, 0) << (BITS * (per_byte - 1 - place) if OFFICIAL else BITS * place)
    inside = (at < rows) & (across < columns)
    tl.store(data + (batch * rows + at) * columns + across, total.to(tl.uint8), mask=inside)
