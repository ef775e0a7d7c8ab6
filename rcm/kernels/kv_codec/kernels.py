"""Triton kernels that encode: extremes of groups or scales that fit them, codes; all at once for
numbers of 8 bits.

A tensor is seen as [B, S, W], W = N D channels of all heads. CHANNEL: groups and bytes run over
tokens, else over channels; either way neighbouring lanes read neighbouring addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rcm.kernels.kv_codec.restore_kernels import at_address, number_of


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
    """Whole numbers nearest to `y`, |y| < 2^22, halves to even: 1.5 2^23 leaves no bits for a
    fraction.
    """
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _centroid(
    centroids, assigned, batch, token, head, col, keep, cluster_sizes, PER_HEAD: tl.constexpr
):
    """Centroids of tokens [T, C]; `cluster_sizes` = (tokens, heads, clusters, width)."""
    tokens, heads, clusters, width = cluster_sizes
    if PER_HEAD:
        which = tl.load(assigned + (batch * tokens + token) * heads + head, mask=keep, other=0).to(
            tl.int64
        )
    else:
        which = tl.load(assigned + batch * tokens + token, mask=token < tokens, other=0).to(
            tl.int64
        )
    return tl.load(centroids + (batch * clusters + which) * width + col, mask=keep, other=0.0).to(
        tl.float32
    )


@triton.jit
def _residual(
    x, centroids, assigned, batch, token, col, keep, strides, sizes,
    HAS_CLUSTERS: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Elements of the tensor, less the centroids of their tokens, in float32."""
    _, tokens, heads, clusters = sizes
    stride_b, stride_s, stride_n = strides
    head = col // D
    value = tl.load(
        x + batch * stride_b + token.to(tl.int64) * stride_s + head * stride_n + col % D,
        mask=keep,
        other=0.0,
    ).to(tl.float32)
    if HAS_CLUSTERS:
        value -= _centroid(
            centroids, assigned, batch, token, head, col, keep,
            (tokens, heads, clusters, heads * D), PER_HEAD,
        )  # fmt: skip
    return value


@triton.jit
def _groups(
    batch, sizes,
    GROUP: tl.constexpr, CHANNEL: tl.constexpr, D: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """The ACROSS groups of a program: (token, column) of their elements [ALONG, ACROSS], their
    numbers [ACROSS], which elements and which groups there are.
    """
    _, tokens, heads, _ = sizes
    width = heads * D
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
    return token, col, group, (inside < GROUP) & (token < tokens) & there[None, :], there


@triton.jit
def extremes(
    x, centroids, assigned, low, high, strides, sizes,
    GROUP: tl.constexpr, CHANNEL: tl.constexpr, HAS_CLUSTERS: tl.constexpr,
    PER_HEAD: tl.constexpr, D: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Least and largest element of every group, float32. A program takes ACROSS groups; ALONG is
    GROUP up to a power of two.
    """
    batch = tl.program_id(2).to(tl.int64)
    token, col, group, keep, there = _groups(batch, sizes, GROUP, CHANNEL, D, ALONG, ACROSS)
    value = _residual(
        x, centroids, assigned, batch, token, col, keep, strides, sizes, HAS_CLUSTERS, PER_HEAD, D
    )
    tl.store(low + group, tl.min(tl.where(keep, value, float("inf")), axis=0), mask=there)
    tl.store(high + group, tl.max(tl.where(keep, value, float("-inf")), axis=0), mask=there)


@triton.jit
def _code(
    y, DTYPE: tl.constexpr, ASYMMETRIC: tl.constexpr, OFFICIAL: tl.constexpr, BITS: tl.constexpr
):
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
def _twice(
    y, DTYPE: tl.constexpr, ASYMMETRIC: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr
):
    """Twice the numbers (int32) that the codes of scaled elements stand for; ZERO: twice the number
    that is taken off a code.
    """
    if DTYPE == "fp4":
        return (2.0 * number_of(_code(y, DTYPE, False, False, 4), DTYPE, 0.0)).to(tl.int32)
    if DTYPE == "int2" and not ASYMMETRIC:
        return 2 * ((y > -1).to(tl.int32) + (y > 0).to(tl.int32) + (y > 1).to(tl.int32)) - ZERO
    return 2 * _code(y, DTYPE, ASYMMETRIC, False, BITS) - ZERO


@triton.jit
def fit(
    x, centroids, assigned, scale, zero, strides, sizes,
    DTYPE: tl.constexpr, ASYMMETRIC: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    STEP: tl.constexpr, MIDDLE: tl.constexpr, FLOOR: tl.constexpr, LEAST: tl.constexpr,
    GRID: tl.constexpr, CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr, CHANNEL: tl.constexpr, HAS_CLUSTERS: tl.constexpr,
    PER_HEAD: tl.constexpr, D: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """`fitting.fitted` of every group, float32. A program takes groups as `extremes` does. To be
    launched without fused multiply-adds, which would round otherwise.
    """
    batch = tl.program_id(2).to(tl.int64)
    token, col, group, keep, there = _groups(batch, sizes, GROUP, CHANNEL, D, ALONG, ACROSS)
    value = _residual(
        x, centroids, assigned, batch, token, col, keep, strides, sizes, HAS_CLUSTERS, PER_HEAD, D
    )
    low = tl.min(tl.where(keep, value, float("inf")), axis=0)
    high = tl.max(tl.where(keep, value, float("-inf")), axis=0)
    low, high = tl.where(there, low, 0.0), tl.where(there, high, 0.0)
    mid = (low + high) * 0.5 if ASYMMETRIC else tl.zeros_like(low)
    half = tl.maximum(high - mid if ASYMMETRIC else tl.maximum(high, -low), FLOOR)
    exponent = (half.to(tl.int32, bitcast=True) >> 23) - 126
    per = ((GRID - exponent + 127) << 23).to(tl.float32, bitcast=True)
    back = ((exponent - GRID + 127) << 23).to(tl.float32, bitcast=True)
    y = _to_even((value - mid[None, :]) * per[None, :])
    reach = half * per
    weight = tl.where(keep, 2 * tl.abs(y) + _to_even(reach)[None, :], 0.0).to(tl.int32)
    whole = y.to(tl.int32)
    # sums of 64 terms of at most 2^9 x 3 2^9 x 30 stay below 2^31
    wide: tl.constexpr = tl.int32 if GROUP <= 64 else tl.int64
    if ASYMMETRIC:
        total = tl.sum(weight.to(wide), axis=0).to(tl.float32)
        first = tl.sum((weight * whole).to(wide), axis=0).to(tl.float32)
    best = tl.full((ACROSS,), -1.0, tl.float32)
    found, shift = tl.zeros((ACROSS,), tl.float32), tl.zeros((ACROSS,), tl.float32)
    one = tl.full((ACROSS,), 1.0, tl.float32)
    for i in tl.static_range(CANDIDATES):
        inverse = tl.div_rn(one, reach * ((1.0 - 0.15 * i) * STEP))
        twice = _twice(y * inverse[None, :] + MIDDLE, DTYPE, ASYMMETRIC, BITS, ZERO)
        weighted = weight * twice
        product = tl.sum((weighted * whole).to(wide), axis=0).to(tl.float32)
        square = tl.sum((weighted * twice).to(wide), axis=0).to(tl.float32)
        spread, common, cut = square, product, tl.zeros((ACROSS,), tl.float32)
        if ASYMMETRIC:
            codes = tl.sum(weighted.to(wide), axis=0).to(tl.float32)
            spread = total * square - codes * codes
            common = total * product - codes * first
            cut = square * first - codes * product
        spread = tl.maximum(spread, 1.0)
        fitting = tl.div_rn(common, spread)
        score = common * fitting
        better = score > best
        best = tl.where(better, score, best)
        found = tl.where(better, fitting, found)
        if ASYMMETRIC:
            shift = tl.where(better, tl.div_rn(cut, spread), shift)
    spoilt = (low - low) + (high - high)  # NaN, where anything is NaN or infinite
    tl.store(scale + group, tl.maximum(2.0 * found * back, LEAST) + spoilt, mask=there)
    tl.store(zero + group, mid + shift * back, mask=there)


@triton.jit
def write_codes(
    x, centroids, assigned, scale, zero, data, strides, sizes,
    DTYPE: tl.constexpr, ASYMMETRIC: tl.constexpr, OFFICIAL: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, CHANNEL: tl.constexpr,
    HAS_CLUSTERS: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Packed codes of a tensor given what they are computed with: float32 `scale` and `zero` per
    group.

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
        value = _residual(
            x, centroids, assigned, batch, token, col, keep, strides, sizes, HAS_CLUSTERS, PER_HEAD,
            D,
        )  # fmt: skip
        if ASYMMETRIC:
            value -= tl.load(zero + group, mask=keep, other=0.0)
        divisor = tl.load(scale + group, mask=keep, other=1.0)
        beyond = tl.where(value > 0, 1024.0, tl.where(value < 0, -1024.0, 0.0))
        value = tl.where(divisor > 0, tl.div_rn(value, tl.where(divisor > 0, divisor, 1.0)), beyond)
        code = _code(value, DTYPE, ASYMMETRIC, OFFICIAL, BITS)
        total |= tl.where(keep, code, 0) << (
            BITS * (per_byte - 1 - place) if OFFICIAL else BITS * place
        )
    inside = (at < rows) & (across < columns)
    tl.store(data + (batch * rows + at) * columns + across, total.to(tl.uint8), mask=inside)


@triton.jit
def encode_bytes(
    x, row, strides, sizes,
    DTYPE: tl.constexpr, TOP: tl.constexpr, NATIVE: tl.constexpr,
    GROUP: tl.constexpr, CHANNEL: tl.constexpr, D: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Codes of 8 bits and fp16 scales of symmetric groups, at the addresses of a `row` of a table:
    a group is read once. TOP: the number that its largest element becomes.
    """
    _, tokens, heads, _ = sizes
    batch = tl.program_id(2).to(tl.int64)
    token, col, group, keep, there = _groups(batch, sizes, GROUP, CHANNEL, D, ALONG, ACROSS)
    value = _residual(x, x, x, batch, token, col, keep, strides, sizes, False, False, D)
    absmax = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-8)
    scale = tl.maximum(
        tl.div_rn(absmax, tl.full((ACROSS,), TOP, tl.float32)).to(tl.float16), 2.0**-24
    )
    tl.store(at_address(row, 1, tl.float16) + group, scale, mask=there)
    number = tl.div_rn(value, tl.broadcast_to(scale.to(tl.float32)[None, :], (ALONG, ACROSS)))
    if NATIVE:
        bounded = tl.minimum(tl.maximum(number, -448.0), 448.0)
        code = bounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = _code(number, DTYPE, False, False, 8).to(tl.uint8)
    place = (batch * tokens + token) * (heads * D) + col
    tl.store(at_address(row, 0, tl.uint8) + place, code, mask=keep)
