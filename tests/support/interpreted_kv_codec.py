"""Runs the codec's kernels in Triton's interpreter and prints, as JSON, which results differ from
plain torch in any bit.

TRITON_INTERPRET=1 python -m tests.support.interpreted_kv_codec few|cases|several|mutants
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rcm.kernels.kv_codec import cluster_kernels, fused, fused_clusters, kernels, restore_kernels
from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.blob import Blob, reference
from rcm.kernels.kv_codec.clusters import Clustering, cluster, features, members, spherical
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.formats import E4M3, CodeFormat
from rcm.kernels.kv_codec.smoothing import Undo
from rcm.kernels.kv_codec.spec import INTEGERS, SMOOTHINGS, KVCodecSpec, SideSpec
from tests.support import interpreter_casts, mutants

SHAPE = (2, 11, 3, 16)
MODE_DTYPES = [*itertools.product(("rcm", "release"), ("fp8", "fp4", *INTEGERS)), *itertools.product(("official",), INTEGERS)]
FORMATS = {
    f"{mode} {dtype} {granularity}{' asymmetric' if asymmetric else ''}": CodeFormat(dtype, 8, granularity, asymmetric, mode)
    for (mode, dtype), granularity, asymmetric in itertools.product(MODE_DTYPES, ("token", "channel"), (False, True))
    if not (asymmetric and (dtype not in INTEGERS or mode == "release")) and not (mode == "official" and granularity == "channel")
}
MUTANTS = {
    "exponents of e4m3": ("half.to(tl.float32) * 256.0", "half.to(tl.float32) * 128.0", "release int8 token"),
    "sign of e4m3": ("(((bits & 127) << 7) | ((bits & 128) << 8))", "((bits & 127) << 7)", "rcm fp8 token"),
    "e4m3 without sign": ("+ ((y.to(tl.int32, bitcast=True) >> 24) & 128)", "", "rcm fp8 token"),
    "halves up": ("return (y + 12582912.0) - 12582912.0", "return tl.floor(y + 0.5)", "rcm int4 token"),
    "last group of tokens": (
        "(batch * tl.cdiv(tokens, GROUP) + tl.program_id(1)) * width", "(batch * (tokens // GROUP) + tl.program_id(1)) * width",
        "rcm int4 channel",
    ),
    "unit forgotten": (
        "    scale *= tl.load(at_address(row, 3, tl.float32) + batch)\n    value", "    scale *= 1.0\n    value", "rcm int2 channel",
    ),
    "unit of bytes forgotten": (
        "    scale *= tl.load(at_address(row, 3, tl.float32) + batch)\n    zero", "    scale *= 1.0\n    zero", "rcm int2 token",
    ),
    "zero forgotten": ("value += _stored(at_address(row, 2, scales), group, known, E4M3)", "value += 0.0", "rcm int4 channel asymmetric"),
    "bytes reversed": ("if HIGH_FIRST else BITS * place\n", "if not HIGH_FIRST else BITS * place\n", "rcm int2 channel"),
    "scale of a tile": ("first = tl.program_id(0) * (TOKENS * per_byte) // GROUP", "first = tl.program_id(0)", "tiles in a group of int8"),
    "tokens of a byte": ("* PLACES + place\n", "* PLACES\n", "rcm int4 channel"),
    "angles of a head": ("% (D // 2))[None, :]", ")[None, :]", "several none int4"),
    "groups of a row": ("tile * (COLS // GROUP) + tl.arange", "tl.arange", "rcm fp8 token"),
    "sign of four bits": ("tl.where(code >= 8, -0.5 * half, 0.5 * half)", "0.5 * half", "rcm fp4 token"),
    "padding in the extremes": ("(inside < GROUP) & (token < tokens)", "(inside < GROUP)", "rcm int8 channel asymmetric"),
    "one stage": ("for i in tl.static_range(STAGES)", "for i in tl.static_range(1)", "clusters 2 shared"),
    "order of the stages": ("stage = i if FIRST_FIRST", "stage = i if not FIRST_FIRST", "clusters 2 official"),
    "head of the assignment": ("token) * heads + head, mask", "token) * heads, mask", "clusters 1 per head"),
    "head of the restored assignment": ("token * heads + head, mask", "token * heads, mask", "clusters 1 per head"),
    "batch of the assignment": ("tl.load(assigned + line, mask", "tl.load(assigned - batch * tokens + line, mask", "clusters 1 shared"),
    "one blob for all": ("blob = tl.program_id(2) // batches", "blob = 0 * tl.program_id(2)", "several int4 by head"),
    "start of a blob": ("start = tl.load(starts + blob)", "start = blob * tokens", "several int4 by head"),
    "rows of a head": ("batch * heads + head, token * D", "batch * heads, token * D", "several int4 by head"),
    "bytes of an uneven group": ("at // PER_BYTE, at % PER_BYTE, row * tl.cdiv", "at // PER_BYTE, 0 * at, row * tl.cdiv", "several uneven"),
    "places of a byte": (
        "tl.join(first, third), tl.join(second, fourth)", "tl.join(first, second), tl.join(third, fourth)", "rcm int2 token",
    ),
    "groups of bytes": ("byte // (GROUP // per_byte)", "byte // GROUP", "rcm int4 token"),
    "sign of the transform": ("tl.join(a + b, a - b)", "tl.join(a + b, b - a)", "several hadamard int4"),
    "turned the other way": ("odd * cos + even * sin)", "odd * cos - even * sin)", "several none int4"),
    "balance forgotten": ('if UNDO == "balance"', 'if UNDO == "none of them"', "several balance int4"),
    "order forgotten": ('if UNDO == "reorder"', 'if UNDO == "none of them"', "several reorder int4"),
    "a field not copied": ("if tl.program_id(1) == field:", "if tl.program_id(1) == field and field != 4:", "several qvg int4"),
    "scale of 8 bits": ("tl.max(tl.abs(value), axis=0), 1e-8)", "tl.max(value, axis=0), 1e-8)", "rcm int8 channel"),
    "place of a byte": ("place = (batch * tokens + token) * (heads * D) + col", "place = token * (heads * D) + col", "rcm fp8 token"),
    "weights of a fit": ("2 * tl.abs(y) + _to_even(reach)[None, :]", "1.0", "fit int2 channel"),
    "padding in a fit": ("tl.where(keep, 2 * tl.abs(y)", "tl.where(y == y, 2 * tl.abs(y)", "fit int2 channel"),
    "one step": ("(1.0 - 0.15 * i) * STEP", "1.0 * STEP", "fit int4 token"),
    "middle of a fit": ("mid + shift * back", "low", "fit int2 token asymmetric"),
    "stride of the output": ("+ head * stride_n + col % D, value", "+ col, value", "rcm int4 token"),
}  # fmt: skip


def sample(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Elements of every size, halves among them, an outlier channel, a token of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[..., 2] *= 30
    x[:, 1] = (x[:, 1] * 2).round() / 2
    x[:, 3] = torch.tensor([7.0, 0.5, 1.5, -2.5, -0.5, 3.5, 0.0, -0.0]).repeat(shape[3] // 8)
    x[-1] *= 2.0**-7
    x[0, 2] = 0
    return x.to(dtype)


def differences(x: Tensor, fmt: CodeFormat, subtract: tuple[Tensor, Tensor] | None, clusters: object) -> list[str]:
    """What of encode and restore is not equal to plain torch."""
    wanted = coding.encode(x if subtract is None else x - members(*subtract), fmt)
    got = fused.encode(x, fmt, subtract)
    found = [] if got is not None else ["encode refused"]
    for name in ("data", "scales", "zeros", "unit") if got is not None else ():
        mine, theirs = getattr(got, name), getattr(wanted, name)
        if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(_bits(mine), _bits(theirs))):
            found.append(name)
    blob = Blob(wanted, Undo(), clusters, x.dtype).packed()
    return found + restored_differences([blob])


def restored_differences(blobs: list[Blob]) -> list[str]:
    """What of restoring blobs of one form with one launch, out of order and into the midst of other
    memory, is not equal to plain torch.
    """
    found, (b, s, n, d) = [], blobs[0].shape
    starts = [2 + (s + 3) * i for i in range(len(blobs))][::-1]
    table = KVCodec(KVCodecSpec()).addresses(blobs)
    for dtype in (torch.float32, torch.bfloat16):
        room = torch.full((b, (s + 3) * len(blobs), n + 2, d + 2), float("nan"), dtype=dtype)
        view = room[:, :, 1 : 1 + n, :d]
        if not fused.restore(blobs[0], table, torch.tensor(starts), view):
            found.append("restore refused")
        for start, blob in zip(starts, blobs, strict=True):
            if not torch.equal(view[:, start : start + s], reference(blob).to(dtype)):
                found.append(f"restored {dtype}")
        if room.isnan().sum() != room.numel() - len(blobs) * b * s * n * d:
            found.append("wrote elsewhere")
    if fused.row_of(blobs[0]).tolist() != [*blobs[0].addresses, 0]:
        found.append("row of one blob")
    return found


def turned_differences(blobs: list[Blob]) -> list[str]:
    """The same for restoring and turning in one launch, against one after the other."""
    b, s, n, d = blobs[0].shape
    angle = torch.randn(s * len(blobs), d // 2, generator=torch.Generator().manual_seed(2))
    out, (cos, sin) = torch.empty(b, s * len(blobs), n, d, dtype=torch.bfloat16), (angle.cos(), angle.sin())
    table = KVCodec(KVCodecSpec()).addresses(blobs)
    fused.restore(blobs[0], table, torch.arange(len(blobs)) * s, out, turn=(cos, sin))
    plain = torch.cat([reference(blob).to(torch.bfloat16) for blob in blobs], dim=1).float()
    even, odd = plain[..., 0::2], plain[..., 1::2]
    c, t = cos[None, :, None], sin[None, :, None]
    wanted = torch.stack([even * c - odd * t, odd * c + even * t], dim=-1).flatten(-2).to(torch.bfloat16)
    return [] if torch.equal(out, wanted) else ["turned"]


def deposited_differences(blobs: list[Blob]) -> list[str]:
    """Whether the bytes of a blob, all of them, arrive at the addresses of another."""
    *_, target = blobs[1].likes(3, "cpu")
    fused.deposit(blobs[0], KVCodec(KVCodecSpec()).addresses([target])[0])
    pairs = zip(target.fields, blobs[0].fields, strict=True)
    return [f"field {i}" for i, (mine, x) in enumerate(pairs) if x is not None and not torch.equal(_bits(mine), _bits(x))]


def several_sides() -> dict[str, SideSpec]:
    """Every smoothing and granularity."""
    return {
        **{f"{smoothing} {kind}": SideSpec(kind, smoothing, 8) for smoothing in SMOOTHINGS for kind in ("int4", "int2")},
        **{f"int4 by {axis}": SideSpec("int4", "none", 8, axis, asymmetric=True) for axis in ("head", "tensor")},
        "uneven": SideSpec("int4", "none", 5, "token"),
        "bf16": SideSpec("bf16", "none"),
        "bf16 hadamard": SideSpec("bf16", "hadamard"),
        "fp8 balance": SideSpec("fp8", "balance"),
    }


def several_differences(side: SideSpec) -> list[str]:
    """What differs when three blobs are restored, turned and deposited."""
    codec = KVCodec(KVCodecSpec(side, side, triton_restore=False, qvg_clusters=4, qvg_iters=2))
    blobs = [codec.encode(sample(torch.float32).roll(i, 1), side="key", layer=0) for i in range(3)]
    return restored_differences(blobs) + turned_differences(blobs) + deposited_differences(blobs)


def clustered_differences(k: int, *, warm: bool) -> list[str]:
    """What k-means by kernels assigns or centres otherwise than plain torch; the last bits of sums
    apart.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 150, 3, 16, generator=generator)
    start = torch.randn(2, 1, k, 16, generator=generator) if warm else None
    mine = fused_clusters.spherical(x[:, 3:140], k, iters=3, start=start)
    plain = spherical(features(x[:, 3:140], shared=True), k, iters=3, start=start)
    found = [] if torch.equal(mine[0].long(), plain[0]) else ["assigned"]
    return found if (mine[1] - plain[1]).abs().max() < 1e-6 else [*found, "centres"]


def several() -> dict[str, list[str]]:
    """Name -> what differs."""
    found = {name: several_differences(side) for name, side in several_sides().items()}
    found |= {f"k-means of {k}, warm {warm}": clustered_differences(k, warm=warm) for k, warm in ((5, False), (70, True))}
    single = KVCodec(KVCodecSpec(SideSpec("int4", "qvg", 8), triton_restore=False, qvg_clusters=1))
    found["one cluster"] = restored_differences([single.encode(sample(torch.float32), side="key", layer=0)])
    return found


def cases() -> dict[str, tuple]:
    """Name -> arguments of `differences`."""
    found: dict[str, tuple] = {name: (sample(torch.float32), fmt, None, None) for name, fmt in FORMATS.items()}
    found["fp16 input, whole axis"] = (sample(torch.float16), CodeFormat("int4", 0, "channel", False, "rcm"), None, None)
    found["bf16 input"] = (sample(torch.bfloat16), CodeFormat("int4", 8, "token", True, "rcm"), None, None)
    found["slice of heads"] = (sample(torch.float32, (2, 5, 6, 16))[:, :, 1:4], CodeFormat("int2", 8, "token", False, "rcm"), None, None)
    for kind, group in (("int8", 32), ("int4", 32), ("int2", 32)):
        fmt = CodeFormat(kind, group, "channel", False, "rcm")
        found[f"tiles in a group of {kind}"] = (sample(torch.float32, (2, 75, 3, 16)), fmt, None, None)
    for dtype, asymmetric, granularity in itertools.product(("int2", "int4", "fp4"), (False, True), ("channel", "token")):
        if not (asymmetric and dtype == "fp4"):
            fmt = CodeFormat(dtype, 8, granularity, asymmetric, "rcm", fit=True)
            found[f"fit {dtype} {granularity}{' asymmetric' if asymmetric else ''}"] = (sample(torch.bfloat16), fmt, None, None)
    found["fit, groups of 70 tokens"] = (
        sample(torch.float32, (2, 75, 3, 16)),
        CodeFormat("int2", 70, "channel", True, "rcm", fit=True),
        None,
        None,
    )
    for stages, shared in itertools.product((1, 2), (True, False)):
        for mode, granularity in (("rcm", "token"), ("release", "channel")):
            x = sample(torch.float32)
            parts = cluster(x, Clustering(4, 2, stages, shared, mode))
            fmt = CodeFormat("int2", 8, granularity, False, mode)
            name = f"clusters {stages} {'shared' if shared else 'per head'}{'' if mode == 'rcm' else ', release by channel'}"
            found[name] = (parts.residual, fmt, parts.subtract, parts.clusters)
    parts = cluster(sample(torch.float32), Clustering(4, 2, 1, True, "rcm"))
    fmt = CodeFormat("int2", 8, "channel", False, "rcm", fit=True)
    found["fit int2, clusters"] = (parts.residual, fmt, parts.subtract, parts.clusters)
    x = sample(torch.float32)
    parts = cluster(x, Clustering(4, 3, 2, False, "official"))
    fmt = CodeFormat("int2", 8, "token", False, "official")
    found["clusters 2 official"] = (parts.residual - members(*parts.subtract), fmt, None, parts.clusters)
    return found


def run_cases(*, every: bool = True) -> dict[str, list[str]]:
    """Every case and what differs; or one case per rule of the kernels."""
    few = (
        "rcm fp8 token",
        "rcm fp4 channel",
        "fit int2 channel",
        "fit int2 token asymmetric",
        "release int8 token",
        "rcm int4 channel asymmetric",
        "rcm int2 channel",
    )
    also = ("clusters 2", "slice", "official int4", "tiles")
    chosen = {name: case for name, case in cases().items() if every or name in few or name.startswith(also)}
    return {name: differences(*arguments) for name, arguments in chosen.items()}


def run_few() -> dict[str, list[str]]:
    """One case per rule of the kernels."""
    return run_cases(every=False)


CLUSTER_MUTANTS = {
    "length of the mean": ("unit = mean / tl.maximum(length, 1e-12)[:, None]", "unit = mean"),
    "squares of centres": ("square[None, :] - 2 *", "-2 *"),
    "later blocks of centres": ("tl.where(closer, first + at, index)", "tl.where(closer, at, index)"),
    "points past the end": ("mask=there[:, None], other=0.0)\n    best", "mask=there[:, None], other=1.0)\n    best"),
    "one tile": ("for tile in range(tiles):", "for tile in range(1):"),
    "length of the sum": ("tl.maximum(tl.sqrt(tl.sum(total * total, axis=1)), 1e-12)", "tl.sum(total * total, axis=1)"),
    "empty clusters": ("tl.maximum(tl.sqrt(tl.sum(total * total, axis=1)), 1e-12)", "tl.sqrt(tl.sum(total * total, axis=1))"),
}


def run_mutants() -> dict[str, bool]:
    """Whether each broken kernel shows on the case named for it."""
    caught, known = {}, cases()
    with tempfile.TemporaryDirectory() as folder:
        package = sys.modules["rcm.kernels.kv_codec"]
        for name, (old, new, case) in MUTANTS.items():
            encodes = mutants.places(kernels, old) > 0
            package.kernels = mutants.load(kernels, old=old, new=new, folder=Path(folder)) if encodes else kernels
            package.restore_kernels = restore_kernels if encodes else mutants.load(restore_kernels, old=old, new=new, folder=Path(folder))
            kind = case.removeprefix("several ")
            caught[name] = bool(differences(*known[case]) if case in known else several_differences(several_sides()[kind]))
        for name, (old, new) in CLUSTER_MUTANTS.items():
            broken = mutants.load(cluster_kernels, old=old, new=new, folder=Path(folder))
            package.cluster_kernels = broken
            caught[name] = any(clustered_differences(k, warm=warm) for k, warm in ((5, False), (70, True)))
    return caught


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


if __name__ == "__main__":
    interpreter_casts.install()
    fused.ELEMENTS, fused.MAX_COLS = 256, 32
    json.dump({"few": run_few, "cases": run_cases, "several": several, "mutants": run_mutants}[sys.argv[1]](), sys.stdout)
