"""Flags of the three causal commands, which all have all of them with other defaults, and the
records that they stand for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rcm.core.errors import ConfigError
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.inference.wan_flags import (
    PROMPT,
    NetworkFile,
    add_machine_flags,
    add_single_network_flags,
    add_video_flags,
    single_network,
    wan_parser,
)
from rcm.kernels.kv_codec.spec import DTYPES, FLAGS, GRANULARITIES, MODES, SMOOTHINGS, KVCodecSpec
from rcm.nets.wan.fp8 import chosen_layers
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.compressed import Reduce
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.eviction.relax_forcing_paper import RelaxForcingPaper
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.plan import StepSchedule
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.schedule import CAUSAL_MID_TIMES, parse_schedules, parse_times

SUV_PROMPT = (
    "The camera follows behind a white vintage SUV with a black roof rack as it speeds up a steep"
    " dirt road surrounded by pine trees on a steep mountain slope, dust kicks up from its tires,"
    " the sunlight shines on the SUV as it speeds along the dirt road, casting a warm glow over the"
    " scene."
)
BENCHMARK = 3
"""Warm-ups and timed runs of --benchmark."""
GRAPHS = ("auto", "on", "off")
_GROUP_CHOICES = {"kv_dtype": DTYPES, "kv_smoothing": SMOOTHINGS, "kv_granularity": GRANULARITIES}


@dataclass(frozen=True)
class Defaults:
    """What differs between the three commands when nothing is said."""

    method: str = "none"
    pattern: tuple[int, int] = (3, 3)
    save_path: str = "output/causal_generated_video.mp4"
    prompt: str = SUV_PROMPT


@dataclass(frozen=True)
class Method:
    """An extrapolation method: its flags with their defaults, and its policy from their values."""

    flags: Mapping[str, Any]
    make: Callable[..., CachePolicy]


def _sliding(window_blocks: int, sw_sink_blocks: int) -> SlidingWindow:
    if window_blocks < 1 or not 0 <= sw_sink_blocks < window_blocks:
        raise ConfigError(
            f"--window_blocks {window_blocks} must be at least 1 and --sw_sink_blocks"
            f" {sw_sink_blocks} at least 0 and below it"
        )
    # the release counts cached blocks, sinks among them; the policy the blocks that a chunk sees,
    # its own included, beside the sinks
    return SlidingWindow(window_blocks - sw_sink_blocks + 1, sw_sink_blocks)


def _infinity(no_rope_cut_single_frame: bool, **values: Any) -> InfinityRope:
    names = ("blocks", "sinks", "horizon", "flush_interval", "cut_delta", "cuts")
    return InfinityRope(
        **dict(zip(names, values.values(), strict=True)),
        cut_single_frames=not no_rope_cut_single_frame,
    )


METHODS: dict[str, Method] = {
    "none": Method({}, CachePolicy),
    "sliding_window": Method({"window_blocks": 6, "sw_sink_blocks": 0}, _sliding),
    "rolling_sink": Method(
        {"total_blocks": 6, "sink_blocks": 5, "recent_blocks": 1},
        lambda **v: RollingSink(*v.values()),
    ),
    "infinity_rope": Method(
        {
            "cache_blocks": 6,
            "ir_sink_blocks": 1,
            "f_limit": 21,
            "flush_interval_blocks": 0,
            "rope_cut_delta": 21,
            "no_rope_cut_single_frame": False,
        },
        _infinity,
    ),
    "deep_forcing": Method(
        {
            "df_sink_frames": 10,
            "df_budget_frames": 16,
            "df_recent_frames": 4,
            "df_observation_layers": 0,
        },
        lambda reduce, ntk_time, **v: DeepForcing(*v.values(), reduce=reduce, ntk_time=ntk_time),
    ),
    "memrope": Method(
        {
            "mr_sink_frames": 3,
            "mr_local_frames": 4,
            "mr_alpha_long": 0.01,
            "mr_alpha_short": 0.1,
            "mr_per_position": False,
        },
        lambda **v: MemRope(*v.values()),
    ),
    "relax_forcing": Method(
        {
            "rx_sink_frames": 4,
            "rx_budget_frames": 16,
            "rx_recent_frames": 4,
            "rx_alignment_weight": 0.5,
        },
        lambda reduce, ntk_time, **v: RelaxForcing(*v.values(), reduce=reduce, ntk_time=ntk_time),
    ),
    "relax_forcing_paper": Method(
        {
            "rx_sink_blocks": 2,
            "rx_history_blocks": 1,
            "rx_tail_blocks": 1,
            "rx_pool_blocks": 8,
            "rx_redundancy": 0.5,
            "f_limit": 21,
        },
        lambda reduce, **v: RelaxForcingPaper(*v.values(), reduce=reduce),
    ),
}
"""Name of --extrapolation_method -> method. The last one is an addition; the others are the
release's.
"""


def causal_parser(name: str, *, about: str | None, defaults: Defaults) -> argparse.ArgumentParser:
    """The parser of a causal command."""
    parser = wan_parser(name, about=about)
    add_video_flags(
        parser,
        sizes=("1.3B", "14B"),
        size="1.3B",
        num_samples=1,
        num_frames=81,
        resolution="480p",
        prompt=defaults.prompt,
    )
    parser.set_defaults(save_path=defaults.save_path)
    _add_prompts(parser)
    _add_sampling(parser, defaults)
    _add_image(parser)
    _add_extrapolation(parser, defaults.method)
    _add_kv_cache(parser)
    add_single_network_flags(parser, dit_path="")
    add_machine_flags(parser)
    _add_running(parser)
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "scenes",
        "--prompt may be a timeline: 'a harbour at dawn[5s] | the same in a storm[3s#]'; # begins a"
        " scene (infinity_rope).",
    ).add_argument
    add(
        "--scene_file", metavar="FILE", help="a timeline, one segment per line, instead of --prompt"
    )
    add(
        "--prompt_file",
        metavar="FILE",
        help="several videos: one prompt or timeline per line, instead of --prompt",
    )
    add(
        "--prompt_switch",
        choices=("keep", "recache"),
        default="keep",
        help="recache: rewrite the cache under a new prompt [%(default)s]",
    )
    add(
        "--prompt_blend",
        type=int,
        default=0,
        metavar="N",
        help="chunks over which a prompt goes over into the next one [%(default)s]",
    )


def _add_sampling(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    first, chunk = defaults.pattern
    add = parser.add_argument_group(
        "sampling", "Few steps with --distilled, else many steps with guidance."
    ).add_argument
    add("--distilled", action="store_true", help="few-step sampling of a distilled network")
    add(
        "--first_chunk_t",
        type=int,
        metavar="N",
        help=f"latent frames of the first chunk [{first}; with an image 1]",
    )
    add(
        "--chunk_t",
        type=int,
        default=chunk,
        metavar="N",
        help="latent frames of the later chunks [%(default)s]",
    )
    add("--num_steps", type=int, metavar="N", help="steps of every chunk [50; with --distilled 4]")
    add(
        "--sigma_max",
        type=float,
        default=1600.0,
        help="noise level of the first step [%(default)g]",
    )
    add(
        "--mid_t",
        nargs="+",
        metavar="T",
        help="--distilled: times between the steps, fractions allowed [15/16 5/6 5/8]",
    )
    add(
        "--steps_per_chunk",
        type=int,
        nargs="+",
        metavar="N",
        help="--distilled: steps of each generated chunk, the last number repeats",
    )
    add(
        "--mid_t_schedules",
        default="",
        metavar="T,T;T",
        help='--mid_t per entry of --steps_per_chunk ("15/16,5/6,5/8;5/6"; empty: one step)',
    )
    add(
        "--guidance_scale",
        type=float,
        help="many steps: classifier-free guidance, 1 or less: none [3]",
    )
    add("--timestep_shift", type=float, help="many steps: shift of the grid [3]")
    add("--negative_prompt", metavar="TEXT", help="many steps [Wan's own, in Chinese]")
    add(
        "--context_from_last_step",
        action="store_true",
        help="noisy context: a chunk's last step is its context, no pass after it",
    )
    add(
        "--context_from_last_step_start_chunk",
        type=int,
        metavar="N",
        help="first chunk that leaves noisy context, an image counts [0]",
    )
    add(
        "--noise_device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where noise is drawn; auto: on --device, as the release does",
    )
    for axis in ("t", "h", "w"):
        add(
            f"--ntk_{axis}",
            type=float,
            default=1.0,
            metavar="R",
            help="NTK ratio of the rotary axis [%(default)g]",
        )


def _add_image(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("image").add_argument
    add("--image_path", default="", metavar="FILE", help="the first frame: image to video")
    add(
        "--adaptive_resolution",
        action="store_true",
        help="keep the image's shape, with about the pixels of the table's size",
    )


def _add_extrapolation(parser: argparse.ArgumentParser, method: str) -> None:
    group = parser.add_argument_group(
        "extrapolation", "What of the past is kept; a flag belongs to the method in its help."
    )
    group.add_argument(
        "--extrapolation_method", choices=tuple(METHODS), default=method, help="[%(default)s]"
    )
    owners: dict[str, list[str]] = {}
    for name, known in METHODS.items():
        for flag in known.flags:
            owners.setdefault(flag, []).append(name)
    for flag, names in owners.items():
        default = METHODS[names[0]].flags[flag]
        told = f"{', '.join(names)} [{default:g}]"
        if isinstance(default, bool):
            group.add_argument(
                f"--{flag}",
                action="store_true",
                default=None,
                help=f"{', '.join(names)}: {_SWITCHES[flag]}",
            )
        else:
            group.add_argument(
                f"--{flag}",
                type=type(default),
                metavar="N" if isinstance(default, int) else "X",
                help=told,
            )


_SWITCHES = {
    "no_rope_cut_single_frame": "cuts do not move one-frame chunks",
    "mr_per_position": "a mean per token position, as in the paper, not one per head",
}


def _add_kv_cache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "key-value cache",
        "How keys (_k) and values (_v) of finished chunks are stored; docs/kv_cache.md.",
    ).add_argument
    for name, default in FLAGS.items():
        choices = next(
            (found for prefix, found in _GROUP_CHOICES.items() if name.startswith(prefix)), None
        )
        if name == "kv_mode":
            choices = MODES
        if isinstance(default, bool):
            add(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
        elif choices is not None:
            add(f"--{name}", choices=choices, default=default, help="[%(default)s]")
        else:
            add(f"--{name}", type=type(default), default=default, metavar="N", help="[%(default)s]")
    add(
        "--kv_pre_rope_keys",
        action="store_true",
        help="cache keys before rotation [when keys are quantised]",
    )
    add(
        "--kv_dense_prefix_cache",
        action="store_true",
        help="also keep every restored chunk: faster, and no memory is saved",
    )
    add(
        "--kv_hot_chunks",
        type=int,
        default=0,
        metavar="N",
        help="newest chunks that stay as they are [%(default)s]",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("running").add_argument
    add(
        "--num_runs",
        type=int,
        default=1,
        metavar="N",
        help="timed samplings of the same video, the last one is written [%(default)s]",
    )
    add(
        "--benchmark",
        action="store_true",
        help=f"the same as --warmup_iters {BENCHMARK} --num_runs {BENCHMARK}",
    )
    add(
        "--streaming_vae",
        action="store_true",
        help="decode and write each chunk as it is made, not all at the end",
    )
    add(
        "--fp8",
        default="off",
        metavar="LAYERS",
        help="linear layers in FP8: off, auto, all or names; tells its error [%(default)s]",
    )
    add(
        "--fp8_attention",
        action="store_true",
        help="attention over the cache in FP8 (H100, H200; a plain cache); inexact",
    )
    add(
        "--tiny_decoder",
        default="",
        metavar="FILE",
        help="decode with a tiny decoder (taew2_1.pth) instead of Wan's: previews [off]",
    )
    add(
        "--graphs",
        choices=GRAPHS,
        default="auto",
        help="passes as CUDA graphs; auto: on one GPU, wherever they can be [%(default)s]",
    )


def settle_flags(flags: argparse.Namespace, defaults: Defaults) -> None:
    """Fill in defaults that depend on other flags. `ConfigError` for a flag that would have no
    effect.
    """
    chosen_layers(flags.fp8)
    if flags.tiny_decoder and flags.image_path:
        raise ConfigError(
            "--tiny_decoder does not encode, and --image_path must be encoded; leave one of"
            " them out"
        )
    method = METHODS[flags.extrapolation_method]
    for name in sorted({flag for known in METHODS.values() for flag in known.flags}):
        value = getattr(flags, name)
        if name in method.flags:
            setattr(flags, name, method.flags[name] if value is None else value)
        elif value is not None:
            owners = " or ".join(known for known, m in METHODS.items() if name in m.flags)
            raise ConfigError(
                f"--{name} belongs to --extrapolation_method {owners}, not to"
                f" {flags.extrapolation_method}"
            )
    _settle_sampling(flags)
    if flags.benchmark:
        flags.warmup_iters, flags.num_runs = (
            flags.warmup_iters or BENCHMARK,
            (BENCHMARK if flags.num_runs == 1 else flags.num_runs),
        )
    if flags.image_path == "" and flags.adaptive_resolution:
        raise ConfigError(
            "--adaptive_resolution follows the shape of an image; give --image_path with it"
        )
    if flags.image_path:
        if flags.first_chunk_t not in (None, 1):
            print(
                "note: the image is the first chunk, one latent frame; --first_chunk_t"
                f" {flags.first_chunk_t} is not used",
                flush=True,
            )
        flags.first_chunk_t = 1
    flags.first_chunk_t = (
        defaults.pattern[0] if flags.first_chunk_t is None else flags.first_chunk_t
    )
    if flags.scene_file is not None and flags.prompt_file is not None:
        raise ConfigError("--scene_file and --prompt_file both say what to make; give one of them")


def _settle_sampling(flags: argparse.Namespace) -> None:
    few = {
        "mid_t": flags.mid_t,
        "steps_per_chunk": flags.steps_per_chunk,
        "mid_t_schedules": flags.mid_t_schedules or None,
    }
    many = {
        name: getattr(flags, name)
        for name in ("guidance_scale", "timestep_shift", "negative_prompt")
    }
    idle = [
        f"--{name}"
        for name, value in (many if flags.distilled else few).items()
        if value is not None
    ]
    if idle and flags.distilled:
        raise ConfigError(
            f"{', '.join(idle)} belong to many-step sampling; leave them out, or leave out"
            " --distilled"
        )
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} need --distilled: many-step sampling has a grid of its own"
        )
    if flags.num_steps is not None and flags.steps_per_chunk is not None:
        raise ConfigError(
            "--num_steps and --steps_per_chunk both set the number of steps; give one of them"
        )
    if flags.context_from_last_step_start_chunk is not None and not flags.context_from_last_step:
        raise ConfigError(
            "--context_from_last_step_start_chunk has no effect with clean context; add"
            " --context_from_last_step"
        )
    flags.context_from_last_step_start_chunk = flags.context_from_last_step_start_chunk or 0
    flags.num_steps = (4 if flags.distilled else 50) if flags.num_steps is None else flags.num_steps
    flags.guidance_scale = 3.0 if flags.guidance_scale is None else flags.guidance_scale
    flags.timestep_shift = 3.0 if flags.timestep_shift is None else flags.timestep_shift
    flags.negative_prompt = (
        NEGATIVE_PROMPT if flags.negative_prompt is None else flags.negative_prompt
    )


def recipe_of(flags: argparse.Namespace) -> SamplingRecipe:
    """How every chunk is sampled. `ConfigError` for schedules that do not fit, in the words of the
    flags.
    """
    common = {
        "pattern": f"c{flags.first_chunk_t}-{flags.chunk_t}",
        "sigma_max": flags.sigma_max,
        "noisy_context": flags.context_from_last_step,
        "noisy_context_start_chunk": flags.context_from_last_step_start_chunk,
    }
    if not flags.distilled:
        recipe = SamplingRecipe(
            "ode",
            **common,
            ode_steps=flags.num_steps,
            shift=flags.timestep_shift,
            guidance=flags.guidance_scale,
        )
    else:
        several = flags.steps_per_chunk is not None
        schedule = StepSchedule.from_lists(
            steps=(
                flags.steps_per_chunk
                if several
                else ()
                if flags.mid_t_schedules
                else (flags.num_steps,)
            ),
            schedules=parse_schedules(flags.mid_t_schedules),
            default_mids=CAUSAL_MID_TIMES if flags.mid_t is None else parse_times(flags.mid_t),
            knob="--steps_per_chunk" if several or flags.mid_t_schedules else "--num_steps",
        )
        recipe = SamplingRecipe("few_step", **common, mids=schedule.mids)
    recipe.plan(0)  # raises for times that do not decrease from the first one
    return recipe


def policy_of(
    flags: argparse.Namespace, *, cuts: frozenset[int], reduce: Reduce | None
) -> CachePolicy:
    """What the cache keeps."""
    method = METHODS[flags.extrapolation_method]
    values = {name: getattr(flags, name) for name in method.flags}
    if flags.extrapolation_method == "infinity_rope":
        values["cuts"] = cuts
    if flags.extrapolation_method in ("deep_forcing", "relax_forcing", "relax_forcing_paper"):
        values["reduce"] = reduce
    if flags.extrapolation_method in ("deep_forcing", "relax_forcing"):
        values["ntk_time"] = flags.ntk_t
    return method.make(**values)


def codec_spec_of(flags: argparse.Namespace) -> KVCodecSpec | None:
    """How the cache stores what it keeps; None: as it is. `ConfigError` for a flag of a quantised
    cache without one.
    """
    spec = KVCodecSpec.from_flags(vars(flags))
    if not (spec.key.is_identity and spec.value.is_identity):
        if flags.fp8_attention:
            raise ConfigError(
                "--fp8_attention needs a plain cache; leave out --kv_dtype_k and --kv_dtype_v, or"
                " --fp8_attention"
            )
        return spec
    for name, set_to in (
        ("kv_hot_chunks", flags.kv_hot_chunks),
        ("kv_dense_prefix_cache", flags.kv_dense_prefix_cache),
    ):
        if set_to:
            raise ConfigError(
                f"--{name} belongs to a quantised cache; choose --kv_dtype_k and --kv_dtype_v"
                " with it"
            )
    return None


def networks_of(flags: argparse.Namespace) -> tuple[NetworkFile, ...]:
    """The network."""
    return single_network(flags)


EXTRAPOLATION = Defaults(
    method="sliding_window", save_path="output/causal_extrapolated_video.mp4", prompt=PROMPT
)
QUANT = Defaults(save_path="output/causal_quant_video.mp4")
CAUSAL = Defaults(pattern=(1, 1))
"""Defaults of the three commands."""
