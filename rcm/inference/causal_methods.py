"""Extrapolation methods of the causal commands: what of the past a chunk sees, as flags and as
policies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rcm.core.errors import ConfigError
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.compressed import Reduce
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.eviction.relax_forcing_paper import RelaxForcingPaper
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow


@dataclass(frozen=True)
class Method:
    """An extrapolation method: its flags with their defaults, and its policy from their values in
    that order.
    """

    flags: Mapping[str, Any]
    make: Callable[..., CachePolicy]


def _method(make: Callable[..., CachePolicy], **flags: Any) -> Method:
    return Method(flags, make)


def _sliding(window_blocks: int, sw_sink_blocks: int) -> SlidingWindow:
    if window_blocks < 1 or not 0 <= sw_sink_blocks < window_blocks:
        raise ConfigError(
            f"--window_blocks {window_blocks} must be at least 1 and --sw_sink_blocks"
            f" {sw_sink_blocks} at least 0 and below it"
        )
    # the release counts cached blocks, sinks among them; the policy the blocks that a chunk sees,
    # its own included, beside the sinks
    return SlidingWindow(window_blocks - sw_sink_blocks + 1, sw_sink_blocks)


def _infinity(
    blocks: int, sinks: int, horizon: int, flush: int, delta: int, uncut: bool, cuts: frozenset[int]
) -> InfinityRope:
    return InfinityRope(blocks, sinks, horizon, flush, delta, not uncut, cuts)


METHODS: dict[str, Method] = {
    "none": _method(CachePolicy),
    "sliding_window": _method(_sliding, window_blocks=6, sw_sink_blocks=0),
    "rolling_sink": _method(RollingSink, total_blocks=6, sink_blocks=5, recent_blocks=1),
    "infinity_rope": _method(
        _infinity,
        cache_blocks=6,
        ir_sink_blocks=1,
        f_limit=21,
        flush_interval_blocks=0,
        rope_cut_delta=21,
        no_rope_cut_single_frame=False,
    ),
    "deep_forcing": _method(
        DeepForcing,
        df_sink_frames=10,
        df_budget_frames=16,
        df_recent_frames=4,
        df_observation_layers=0,
    ),
    "memrope": _method(
        MemRope,
        mr_sink_frames=3,
        mr_local_frames=4,
        mr_alpha_long=0.01,
        mr_alpha_short=0.1,
        mr_per_position=False,
    ),
    "relax_forcing": _method(
        RelaxForcing,
        rx_sink_frames=4,
        rx_budget_frames=16,
        rx_recent_frames=4,
        rx_alignment_weight=0.5,
    ),
    "relax_forcing_paper": _method(
        RelaxForcingPaper,
        rx_sink_blocks=2,
        rx_history_blocks=1,
        rx_tail_blocks=1,
        rx_pool_blocks=8,
        rx_redundancy=0.5,
        f_limit=21,
    ),
}
"""Name of --extrapolation_method -> method. The last one is an addition; the others are the
release's.
"""


_MEANS = {
    "window_blocks": "cached blocks that a chunk sees, sinks included",
    "sw_sink_blocks": "first blocks that stay visible",
    "total_blocks": "first blocks that are kept",
    "sink_blocks": "of those, how many a chunk sees, in turn",
    "recent_blocks": "newest blocks that a chunk sees",
    "cache_blocks": "cached blocks, sinks included",
    "ir_sink_blocks": "first blocks that stay",
    "f_limit": "frames within which all positions lie",
    "flush_interval_blocks": "drop all but sinks and newest block every N blocks; 0: never",
    "rope_cut_delta": "frames by which a cut shifts a chunk's positions",
    "no_rope_cut_single_frame": "cuts do not shift one-frame chunks",
    "df_sink_frames": "first frames that stay",
    "df_budget_frames": "frames that the cache keeps in all",
    "df_recent_frames": "newest frames that stay",
    "df_observation_layers": "last layers that select tokens; 0: all",
    "mr_sink_frames": "first frames that stay",
    "mr_local_frames": "newest frames that stay",
    "mr_alpha_long": "update rate of the slow running mean",
    "mr_alpha_short": "update rate of the fast running mean",
    "mr_per_position": "a mean per token position, as in the paper, not one per head",
    "rx_sink_frames": "first frames that stay",
    "rx_budget_frames": "frames that the cache keeps in all",
    "rx_recent_frames": "newest frames that stay",
    "rx_alignment_weight": "resemblance to recent frames (1) or variety (0)",
    "rx_sink_blocks": "first blocks that stay visible",
    "rx_history_blocks": "blocks that are selected from the past",
    "rx_tail_blocks": "newest blocks that stay visible",
    "rx_pool_blocks": "blocks whose later half is selected from",
    "rx_redundancy": "penalty for resembling the newest blocks",
}
"""Flag -> its help."""


def add_method_flags(group: argparse._ArgumentGroup, *, default: str) -> None:
    """--extrapolation_method, and the flags of all methods: None where they are not given."""
    group.add_argument(
        "--extrapolation_method",
        choices=tuple(METHODS),
        default=default,
        help="see docs/inference.md [%(default)s]",
    )
    for flag, value in {k: v for known in METHODS.values() for k, v in known.flags.items()}.items():
        owners = _owners(flag, ", ")
        options: dict[str, Any] = {
            "type": type(value),
            "metavar": "N" if isinstance(value, int) else "X",
            "help": f"{owners}: {_MEANS[flag]} [{value:g}]",
        }
        if isinstance(value, bool):
            options = {"action": "store_true", "help": f"{owners}: {_MEANS[flag]}"}
        group.add_argument(f"--{flag}", default=None, **options)


def settle_method_flags(flags: argparse.Namespace) -> None:
    """Fill in the defaults of the chosen method. `ConfigError` for a flag of another."""
    method = METHODS[flags.extrapolation_method]
    for name in sorted({flag for known in METHODS.values() for flag in known.flags}):
        value = getattr(flags, name)
        if name in method.flags:
            setattr(flags, name, method.flags[name] if value is None else value)
        elif value is not None:
            raise ConfigError(
                f"--{name} belongs to --extrapolation_method {_owners(name, ' or ')}, not to"
                f" {flags.extrapolation_method}"
            )


def _owners(flag: str, between: str) -> str:
    return between.join(name for name, method in METHODS.items() if flag in method.flags)


def policy_of(
    flags: argparse.Namespace, *, cuts: frozenset[int], reduce: Reduce | None
) -> CachePolicy:
    """What the cache keeps."""
    method = METHODS[flags.extrapolation_method]
    extras: dict[str, Any] = {}
    if flags.extrapolation_method == "infinity_rope":
        extras["cuts"] = cuts
    if flags.extrapolation_method in ("deep_forcing", "relax_forcing", "relax_forcing_paper"):
        extras["reduce"] = reduce
    if flags.extrapolation_method in ("deep_forcing", "relax_forcing"):
        extras["ntk_time"] = flags.ntk_t
    return method.make(*(getattr(flags, name) for name in method.flags), **extras)
