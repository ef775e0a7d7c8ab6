"""What a coded cache is to be: frozen records, checked when made, and the flags that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds, require_kind

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
DTYPES = ("bf16", "fp8", "fp4", "int8", "int4", "int2")
SMOOTHINGS = ("none", "clip", "balance", "hadamard", "reorder", "qvg")
GRANULARITIES = ("auto", "token", "channel", "head", "tensor")
MODES = ("rcm", "release", "official")
SCALE_FITS = ("none", "search")
INTEGERS = ("int8", "int4", "int2")
BITS = {"bf16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4, "int2": 2}


@dataclass(frozen=True)
class SideSpec:
    """How keys, or values, are stored.

    dtype        storage of one element; "bf16" keeps it.
    smoothing    what is done before quantising and undone after.
    group_size   elements that share a scale, along the axis of the granularity; <= 0 or more than
                 the axis: the whole axis.
    granularity  "token": groups of channels of one token and head. "channel": groups of tokens of
                 one channel. "head": groups over tokens and channels of a head. "tensor": over
                 everything of a sample. "auto": keys channel, values token.
    asymmetric   integers only: groups have a zero (their minimum) next to the scale, after KIVI
                 (arXiv 2402.02750).
    scale_fit    types of 4 and 2 bits, mode "rcm". "none": scales follow from the extremes of their
                 group. "search": a few steps are tried, and scale (and zero) fitted to the codes by
                 least squares (`fitting.py`); as many bytes, the same restore.
    """

    dtype: str = "bf16"
    smoothing: str = "none"
    group_size: int = 64
    granularity: str = "auto"
    asymmetric: bool = False
    scale_fit: str = "none"

    @property
    def is_identity(self) -> bool:
        """Whether what is stored is what came, in bf16."""
        return self.dtype == "bf16" and self.smoothing == "none"


@dataclass(frozen=True)
class KVCodecSpec:
    """A codec for keys and values. Raises `ConfigError` naming the flag for what cannot be.

    mode  "rcm": codes are computed with the scale that is stored; residuals with the centroids that
          are stored; scales are fp16 for types of 8 bits and with a zero, else e4m3 times a power
          of two per sample. "release": the arithmetic of the Causal-rCM release of June
          2026. "official": that of the package quant-videogen 0.1.0 (integers, groups of channels,
          none or qvg). docs/kv_cache.md says how they differ.
    bias_correction   attention takes off what coded keys draw too much of it (`bias.py`), chunk by
          chunk. Attention is then by segments and no part of a captured graph.
    """

    key: SideSpec = SideSpec()
    value: SideSpec = SideSpec()
    mode: str = "rcm"
    clip_percentile: float = 0.999
    smooth_alpha: float = 0.5
    qvg_stages: int = 1
    qvg_clusters: int = 256
    qvg_share_assignments: bool = True
    qvg_iters: int = 4
    qvg_warm_start: bool = True
    triton_restore: bool = True
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_kinds(self, prefix="kv_")
        _one_of("kv_mode", self.mode, MODES)
        for side in SIDES:
            self._check_side(side)
        if not 0 <= self.smooth_alpha <= 1:
            raise ConfigError(f"--kv_smooth_alpha must lie in 0..1, got {self.smooth_alpha}")
        if not 0 < self.clip_percentile <= 1:
            raise ConfigError(
                "--kv_clip_percentile is a share above 0 and at most 1, such as 0.999, got"
                f" {self.clip_percentile}"
            )
        for name in ("qvg_clusters", "qvg_stages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--kv_{name} must be at least 1, got {getattr(self, name)}")
        if self.bias_correction and self.key.dtype == "bf16":
            raise ConfigError(
                "--kv_bias_correction is for coded keys, and these stay in bf16; choose"
                " --kv_dtype_k, or leave it out"
            )
        if self.bias_correction and self.key.scale_fit != "none":
            raise ConfigError(
                "--kv_bias_correction takes off what scales from the extremes of a group cause, and"
                f" --kv_scale_fit_k {self.key.scale_fit} leaves none of it; give one of them"
            )
        if self.qvg_iters < 0:
            raise ConfigError(f"--kv_qvg_iters must not be negative, got {self.qvg_iters}")

    def side(self, side: Side) -> SideSpec:
        """The record of keys or of values."""
        return self.key if side == "key" else self.value

    def granularity(self, side: Side) -> str:
        """The granularity of a side with "auto" resolved: keys by channel, values by token; bf16
        and all of "official" by token.
        """
        chosen = self.side(side)
        if chosen.granularity != "auto":
            return chosen.granularity
        return (
            "channel"
            if side == "key" and chosen.dtype != "bf16" and self.mode != "official"
            else "token"
        )

    @property
    def keys_before_rotation(self) -> bool:
        """Whether the cache should hold keys before their rotation: always where keys are coded, as
        rotation spreads their outliers.
        """
        return not self.key.is_identity

    def describe(self) -> str:
        """One line for a log."""
        parts = [f"KV cache: mode {self.mode}"]
        for side in SIDES:
            s = self.side(side)
            text = (
                s.dtype
                if s.dtype == "bf16"
                else f"{s.dtype} by {self.granularity(side)}, groups of {s.group_size}"
            )
            text += ", asymmetric" if s.asymmetric else ""
            text += "" if s.scale_fit == "none" else f", scales by {s.scale_fit}"
            if s.smoothing == "qvg":
                text += (
                    f", qvg {self.qvg_clusters} clusters x {self.qvg_stages}, {self.qvg_iters}"
                    " iterations"
                )
            elif s.smoothing != "none":
                text += f", {s.smoothing}"
            parts.append(f"{side}s {text}")
        return "; ".join([*parts, "bias of the keys taken off"] if self.bias_correction else parts)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> KVCodecSpec:
        """From the values of `FLAGS` by name, such as `vars(args)`; what is absent takes its
        default, other names are not looked at.
        """
        value = {name: flags.get(name, default) for name, default in FLAGS.items()}
        key, values = (
            SideSpec(**{f.name: value[f"kv_{f.name}_{side[0]}"] for f in fields(SideSpec)})
            for side in SIDES
        )
        both = {f.name: value[f"kv_{f.name}"] for f in fields(cls) if f.name not in SIDES}
        return cls(key=key, value=values, **both)

    def _check_side(self, side: Side) -> None:
        s, end = self.side(side), side[0]
        _one_of(f"kv_dtype_{end}", s.dtype, DTYPES)
        _one_of(f"kv_smoothing_{end}", s.smoothing, SMOOTHINGS)
        _one_of(f"kv_granularity_{end}", s.granularity, GRANULARITIES)
        if isinstance(s.group_size, bool) or not isinstance(s.group_size, int):
            raise ConfigError(
                f"--kv_group_size_{end} must be a whole number (0: the whole axis), got"
                f" {s.group_size!r}"
            )
        require_kind(f"kv_asymmetric_{end}", s.asymmetric, bool)
        if s.asymmetric and s.dtype not in INTEGERS:
            raise ConfigError(
                f"--kv_asymmetric_{end} needs an integer type, got --kv_dtype_{end} {s.dtype}"
            )
        _one_of(f"kv_scale_fit_{end}", s.scale_fit, SCALE_FITS)
        if s.scale_fit != "none" and BITS[s.dtype] > 4:
            raise ConfigError(
                f"--kv_scale_fit_{end} is for types of 4 and 2 bits, got --kv_dtype_{end} {s.dtype}"
            )
        if s.scale_fit != "none" and self.mode != "rcm":
            raise ConfigError(
                f"--kv_scale_fit_{end} is not known to --kv_mode {self.mode}; use --kv_mode rcm"
            )
        if s.asymmetric and self.mode == "release":
            raise ConfigError(
                f"--kv_asymmetric_{end} is not known to --kv_mode release; use --kv_mode rcm or"
                " official"
            )
        if self.mode != "official" or s.is_identity:
            return
        if s.dtype not in INTEGERS:
            raise ConfigError(
                "--kv_mode official stores int8, int4 or int2 (or bf16 as it is), got"
                f" --kv_dtype_{end} {s.dtype}"
            )
        if s.smoothing not in ("none", "qvg"):
            raise ConfigError(
                f"--kv_mode official smooths with none or qvg, got --kv_smoothing_{end}"
                f" {s.smoothing}"
            )
        if self.granularity(side) != "token":
            raise ConfigError(
                f"--kv_mode official groups channels of a token, got --kv_granularity_{end}"
                f" {s.granularity}; use token"
            )


def kivi(dtype: str = "int2", *, group_size: int = 64) -> KVCodecSpec:
    """KIVI (arXiv 2402.02750): keys by channel, values by token, each group with a zero and a
    scale.
    """
    side = SideSpec(dtype=dtype, group_size=group_size, asymmetric=True)
    return KVCodecSpec(key=side, value=side)


FLAGS: dict[str, Any] = {
    **{f"kv_{f.name}_{side[0]}": f.default for f in fields(SideSpec) for side in SIDES},
    **{f"kv_{f.name}": f.default for f in fields(KVCodecSpec) if f.name not in SIDES},
}
"""Flag name -> default. Switches that are on by default are turned off by `--no_...` where the
command line defines them so.
"""


def _one_of(flag: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"--{flag} must be one of {', '.join(choices)}, got {value!r}")
