"""Flags of the three causal commands, which all have all of them with other defaults, and the
records that they stand for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.inference.causal_methods import add_method_flags, policy_of, settle_method_flags
from rcm.inference.flag_table import add_flags
from rcm.inference.stream_recipe import FEW, KINDS, MANY, check_pairs, laid_over, refuse
from rcm.inference.wan_flags import (
    PROMPT,
    add_machine_flags,
    add_single_network_flags,
    add_video_flags,
    unguided,
    wan_parser,
)
from rcm.kernels.fp8_attention.api import WIDTH, obstacle
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import (
    DTYPES,
    FLAGS,
    GRANULARITIES,
    MODES,
    SCALE_FITS,
    SMOOTHINGS,
    KVCodecSpec,
)
from rcm.nets.kv_coded import KVCodec as CacheCodec
from rcm.nets.kv_memo import MemoisedCodec
from rcm.nets.kv_view import Keys
from rcm.nets.wan.fp8 import chosen_layers
from rcm.pipelines.stream_spec import StreamSpec
from rcm.pipelines.wan_pipeline import LATENT_CHANNELS, SPATIAL_STRIDE
from rcm.pipelines.wan_ranks import num_ranks
from rcm.pipelines.wan_sizes import FrameSize
from rcm.rollout.recipe import SamplingRecipe

SUV_PROMPT = (
    "The camera follows behind a white vintage SUV with a black roof rack as it speeds up a steep"
    " dirt road surrounded by pine trees on a steep mountain slope, dust kicks up from its tires,"
    " the sunlight shines on the SUV as it speeds along the dirt road, casting a warm glow over the"
    " scene."
)
BENCHMARK = 3
"""Warm-ups and timed runs of --benchmark."""
_CHOICES = {
    "kv_mode": MODES,
    "kv_dtype": DTYPES,
    "kv_smoothing": SMOOTHINGS,
    "kv_granularity": GRANULARITIES,
    "kv_scale_fit": SCALE_FITS,
}
_STORED = {
    "kv_dtype": "type of stored elements; bf16: not quantised",
    "kv_smoothing": "applied before quantising",
    "kv_group_size": "elements per scale; 0: the whole axis",
    "kv_granularity": "which elements share a scale; auto: keys by channel, values by token",
    "kv_asymmetric": "integers with a zero point besides the scale",
    "kv_scale_fit": "search: half the error of 2 bits at the same size",
    "kv_mode": "which implementation's arithmetic",
    "kv_clip_percentile": "of smoothing clip",
    "kv_smooth_alpha": "of smoothing balance",
    "kv_qvg_clusters": "of smoothing qvg: k-means clusters per chunk",
    "kv_qvg_iters": "of smoothing qvg: iterations of k-means",
    "kv_qvg_stages": "of smoothing qvg: times that clusters are subtracted",
    "kv_qvg_share_assignments": "qvg: one assignment for all heads",
    "kv_qvg_warm_start": "qvg: start from the previous chunk's centroids",
    "kv_triton_restore": "Triton kernels on CUDA; off: plain torch, equal bit for bit",
    "kv_bias_correction": "correct the excess attention to quantised keys",
}
"""Flag without its side -> its help."""


@dataclass(frozen=True)
class Defaults:
    """What differs between the three commands when nothing is said."""

    method: str = "none"
    pattern: tuple[int, int] = (3, 3)
    save_path: str = "output/causal_generated_video.mp4"
    prompt: str = SUV_PROMPT


_PROMPTS = """
scene_file FILE                    a timeline, one segment per line, instead of --prompt
prompt_file FILE                   several videos: one prompt or timeline per line, instead of
  --prompt
prompt_switch keep|recache = keep  recache: recompute the cache under a new prompt [%(default)s]
prompt_blend N = 0                 number of chunks over which a prompt blends into the next one
  [%(default)s]
"""
_SAMPLING = """
distilled                  few-step sampling of a distilled network
first_chunk_t
chunk_t                    latent frames of the later chunks [%(default)s]
num_steps                  steps of every chunk [50; with --distilled 4]
sigma_max = 1600.0         noise level of the first step [%(default)g]
mid_t                      --distilled: times between the steps, fractions allowed
  [15/16 5/6 5/8]
steps_per_chunk            --distilled: steps of each generated chunk, the last number repeats
mid_t_schedules = ""       --mid_t per entry of --steps_per_chunk
  ("15/16,5/6,5/8;5/6"; empty: one step)
guidance_scale             many steps: classifier-free guidance, 1 or less: none [3]
timestep_shift             many steps: shift of the grid [3]
negative_prompt            many steps [Wan's own, in Chinese]
context_from_last_step     noisy context: cache the keys and values of a chunk's last step, without
  another pass over the clean chunk
context_from_last_step_start_chunk  first chunk cached with noisy context; an image is chunk 0 [0]
noise_device auto|cpu|cuda = auto   where noise is drawn; auto: on --device, as the release does
ntk_t R = 1.0              NTK ratio of the rotary embedding in time [%(default)g]
ntk_h R = 1.0              the same in height [%(default)g]
ntk_w R = 1.0              the same in width [%(default)g]
"""
_IMAGE = """
image_path FILE = ""  the first frame: image to video
adaptive_resolution   keep the image's shape, with about the pixels of the table's size
"""
_CACHE = """
kv_pre_rope_keys       cache keys before rotation [when keys are quantised]
kv_dense_prefix_cache  also keep every restored chunk: faster, but saves no memory
kv_hot_chunks N = 0    number of newest chunks that are not quantised [%(default)s]
"""
_RUNNING = f"""
num_runs N = 1             timed samplings of the same video, the last one is written [%(default)s]
benchmark                  the same as --warmup_iters {BENCHMARK} --num_runs {BENCHMARK}
streaming_vae              decode and write each chunk as it is made, not all at the end
fp8 LAYERS = off           linear layers in FP8: off, auto, all or names; tells its error
  [%(default)s]
fp8_attention              attention over the cache in FP8 (H100, H200; a plain cache); inexact
tiny_decoder FILE = ""     decode with a tiny decoder (taew2_1.pth) instead of Wan's: previews [off]
graphs auto|on|off = auto  passes as CUDA graphs; auto: on one GPU, wherever they can be
  [%(default)s]
"""


def causal_parser(name: str, *, about: str | None, defaults: Defaults) -> Arguments:
    """The parser of a causal command."""
    parser = wan_parser(name, about=about)
    group = parser.add_argument_group
    add_video_flags(parser, prompt=defaults.prompt)
    parser.set_defaults(save_path=defaults.save_path)
    scenes = (
        "--prompt may be a timeline: 'a harbour at dawn[5s] | the same in a storm[3s#]'; # begins a"
        " scene (infinity_rope)."
    )
    add_flags(group("scenes", scenes), _PROMPTS)
    first, chunk = defaults.pattern
    add_flags(
        group("sampling", "Few steps with --distilled, else many steps with guidance."),
        _SAMPLING,
        KINDS,
        first_chunk_t={"help": f"latent frames of the first chunk [{first}; with an image 1]"},
        chunk_t={"default": chunk},
    )
    add_flags(group("image"), _IMAGE)
    kept = "What of the past is kept; a flag belongs to the method that its help begins with."
    add_method_flags(group("extrapolation", kept), default=defaults.method)
    stored = "How keys (_k) and values (_v) of finished chunks are stored; docs/kv_cache.md."
    _add_kv_cache(group("key-value cache", stored))
    add_single_network_flags(parser, dit_path="")
    add_machine_flags(parser)
    add_flags(group("running"), _RUNNING)
    unguided(parser)
    for file in ("prompt_file", "scene_file"):
        parser.idle("prompt", beside=file, refuse=False)
    parser.idle("vae_path", "vae_tile", beside="tiny_decoder", refuse=False)
    return parser


def _add_kv_cache(group: argparse._ArgumentGroup) -> None:
    """The codec's own flags, whose names and defaults are its record's, and those of the cache."""
    for name, default in FLAGS.items():
        part = name.removesuffix("_k").removesuffix("_v")
        choices, told = _CHOICES.get(part), f"{_STORED[part]} [%(default)s]"
        options: dict[str, Any] = {"type": type(default), "metavar": "N", "help": told}
        if isinstance(default, bool):
            state = "on" if default else "off"
            options = {
                "action": argparse.BooleanOptionalAction,
                "help": f"{_STORED[part]} [{state}]",
            }
        elif choices is not None:
            options = {"choices": choices, "help": told}
        group.add_argument(f"--{name}", default=default, **options)
    add_flags(group, _CACHE)


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
    settle_method_flags(flags)
    _settle_sampling(flags)
    if flags.benchmark:
        flags.warmup_iters = flags.warmup_iters or BENCHMARK
        flags.num_runs = BENCHMARK if flags.num_runs == 1 else flags.num_runs
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
    if flags.first_chunk_t is None:
        flags.first_chunk_t = defaults.pattern[0]
    if flags.scene_file is not None and flags.prompt_file is not None:
        raise ConfigError("--scene_file and --prompt_file both say what to make; give one of them")


def _settle_sampling(flags: argparse.Namespace) -> None:
    if flags.distilled:
        refuse(
            flags, MANY, "belong to many-step sampling; leave them out, or leave out --distilled"
        )
    else:
        refuse(flags, FEW, "need --distilled: many-step sampling has a grid of its own")
    check_pairs(flags)
    meant = {
        "num_steps": 4 if flags.distilled else 50,
        "guidance_scale": 3.0,
        "timestep_shift": 3.0,
        "negative_prompt": NEGATIVE_PROMPT,
        "context_from_last_step_start_chunk": 0,
    }
    for name, value in meant.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)


def recipe_of(flags: argparse.Namespace) -> SamplingRecipe:
    """How every chunk is sampled. `ConfigError` for schedules that do not fit, in the words of the
    flags.
    """
    pattern = f"c{flags.first_chunk_t}-{flags.chunk_t}"
    base = SamplingRecipe("few_step" if flags.distilled else "ode", pattern)
    recipe = laid_over(flags, base)
    if flags.distilled:  # what was settled for many steps is not of these
        recipe = replace(recipe, shift=base.shift, guidance=base.guidance)
    recipe.plan(0)  # raises for times that do not decrease from the first one
    return recipe


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


def stream_spec_of(
    flags: argparse.Namespace,
    recipe: SamplingRecipe,
    stored: KVCodecSpec | None,
    *,
    num_frames: int,
    cuts: frozenset[int],
    size: FrameSize,
    device: torch.device,
) -> StreamSpec:
    """What a session over a video is opened with; `stored`: how its cache is. `ConfigError` for
    what does not go together.
    """
    policy = policy_of(flags, cuts=cuts, reduce=_summed_over_ranks if num_ranks() > 1 else None)
    keys: Keys | None = "pre_rope" if flags.kv_pre_rope_keys else None
    if stored is not None and stored.keys_before_rotation and policy.any_keys:
        keys = "pre_rope"
    if keys not in (None, policy.keys) and not policy.any_keys:
        raise ConfigError(
            f"--kv_pre_rope_keys: {flags.extrapolation_method} turns rotated keys on, so they are"
            " cached rotated; leave it out"
        )
    if flags.fp8_attention and (why := obstacle(device, width=WIDTH)) is not None:
        raise ConfigError(f"--fp8_attention is not possible here: {why}; leave it out")
    codec: CacheCodec | None = None if stored is None else KVCodec(stored)
    if codec is not None and flags.kv_dense_prefix_cache:
        codec = MemoisedCodec(codec)
    noise_device = device if flags.noise_device == "auto" else torch.device(flags.noise_device)
    spec = StreamSpec(
        recipe,
        (LATENT_CHANNELS, size.height // SPATIAL_STRIDE, size.width // SPATIAL_STRIDE),
        batch=flags.num_samples,
        num_frames=num_frames,
        seed=flags.seed,
        noise="video",
        generator=torch.Generator(noise_device).manual_seed(flags.seed),
        policy=policy,
        keys=keys,
        kv_codec=codec,
        hot_chunks=flags.kv_hot_chunks,
        attention="fp8" if flags.fp8_attention else "net",
        graphs=_graphs(flags, device=device),
    )
    assert spec.cache_frames > 0  # asks the policy, which may refuse the pattern
    return spec


def _graphs(flags: argparse.Namespace, *, device: torch.device) -> Literal["on", "off"]:
    reasons = {
        "--kv_dense_prefix_cache looks up what it restored before, pass by pass": (
            flags.kv_dense_prefix_cache
        ),
        "--kv_hot_chunks codes chunks between passes": flags.kv_hot_chunks > 0,
        "--kv_bias_correction attends chunk by chunk": flags.kv_bias_correction,
        "--no-kv_triton_restore restores in plain torch": not flags.kv_triton_restore,
        "several GPUs share each pass": num_ranks() > 1,
        f"--device {flags.device} has none": device.type != "cuda",
    }
    against = [why for why, holds in reasons.items() if holds]
    if flags.graphs == "on" and against:
        raise ConfigError(f"--graphs on: {against[0]}; use --graphs auto")
    return "off" if against or flags.graphs == "off" else "on"


def _summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over the ranks, which hold other heads."""
    total = x.clone()
    dist.all_reduce(total)
    return total


EXTRAPOLATION = Defaults(
    method="sliding_window", save_path="output/causal_extrapolated_video.mp4", prompt=PROMPT
)
QUANT = Defaults(save_path="output/causal_quant_video.mp4")
CAUSAL = Defaults(pattern=(1, 1))
"""Defaults of the three commands."""
