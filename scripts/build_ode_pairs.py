"""Build shards of a teacher's ODE trajectories, which tf_kd and df_kd learn from: latent.pt [K, C,
T, H, W] (index 0 the ODE's clean end, then the states at --times), embed.pt, prompt.txt, and for a
causal teacher context.pt, the data it was conditioned on.

    python -m scripts.build_ode_pairs --teacher BIDIRECTIONAL --num 2048 --out DIR [--prompts FILE]
    python -m scripts.build_ode_pairs --teacher CAUSAL --latents 'SHARDS/*.tar' --out DIR

The same command continues a stopped build; --part 0/4 ... 3/4 split one among four processes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import require_folder
from rcm.data.latents import LatentShards
from rcm.data.prompts import read_prompts
from rcm.data.shard_writer import ShardSample, build_shards, shard_name
from rcm.inference.checkpoint_flags import HERE, KINDS
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import check_device, command
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.pipelines.ode_pairs import (
    KD_TIMES,
    ODEPairBuilder,
    TrajectoryPlan,
    check_inputs,
    check_numbers,
)
from rcm.samplers.schedule import parse_times
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_DEFAULT_NUM = 2048


_FLAGS = f"""
teacher PATH        job folder, iter_* folder or exported file that describes itself
weights = ema       averaged or last weights [%(default)s]
out str             folder of the shards
latents PATTERN     causal teacher: shards of the data it runs under
prompts FILE        bidirectional teacher: a prompt per line, or .jsonl
  [captions of the toy world's scenes]
num int             samples; prompts or videos repeat with other noise
  [as many as there are; toy captions: {_DEFAULT_NUM}]
times T...          RF times of the kept states, as model.config.kd_timesteps [1 15/16 5/6 5/8]
steps int           Euler steps of the grid that --times are added to [the teacher's]
shift float         shift of that grid [the teacher's]
guidance float      scale; above 1 with the negative prompt [the teacher's]
seed = 0            of the noise, and of the toy world's scenes
batch int = 16      samples computed together [%(default)s]
shard-size int = 256  samples per shard [%(default)s]
part I/N            build every N-th shard only, from shard I on
dtype {"|".join(DTYPES)} = bf16  stored number format [%(default)s]
device              [%(default)s]
precision           of the teacher [that of its training run]
"""


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    words = text.split("/")
    if (
        len(words) != 2
        or not all(word.isdigit() for word in words)
        or int(words[0]) >= int(words[1])
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(words[0]), int(words[1])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="scripts.build_ode_pairs", description=__doc__)
    add_flags(
        parser,
        _FLAGS,
        KINDS,
        teacher={"required": True},
        out={"type": Path, "required": True},
        times={"default": KD_TIMES},
        part={"type": parse_part, "default": (0, 1)},
        device=HERE,
    )
    return parser.parse_args(argv)


def toy_prompts(model: LoadedModel, num: int, *, seed: int) -> list[str]:
    """Captions of the first `num` scenes of the embedded world; `ConfigError` for a teacher of
    anything else.
    """
    if not isinstance(model.codec, ToyCodec):
        raise ConfigError(
            f"{model.source} is not a teacher of the toy world; give its prompts with --prompts"
            " FILE"
        )
    height, width = model.pixel_size
    world = ToyWorld(
        ToyWorldConfig.at_size(
            height, width, num_frames=model.codec.frames_for(model.latent_shape[1])
        )
    )
    return world.captions(world.scenes(num, seed=seed))


def clean_latents(model: LoadedModel, pattern: str) -> LatentShards:
    """Shards of the shape the teacher was trained on."""
    channels, frames, height, width = model.latent_shape
    text_shape = (model.denoiser.net.config.text_len, model.denoiser.net.config.text_dim)
    try:
        return LatentShards(
            pattern,
            num_latent_frames=frames,
            latent_channels=channels,
            latent_size=(height, width),
            text_shape=text_shape,
        )
    except ConfigError as error:
        raise ConfigError(f"--latents: {error}") from error


def inputs(options: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """`prompts` or `latents` of the builder."""
    check_inputs(
        model,
        prompts=options.prompts is not None or model.recipe is None,
        latents=options.latents is not None,
    )
    if options.latents is not None:
        return {"latents": clean_latents(model, options.latents)}
    if options.prompts is not None:
        return {"prompts": read_prompts(options.prompts)}
    return {
        "prompts": toy_prompts(
            model, _DEFAULT_NUM if options.num is None else options.num, seed=options.seed
        )
    }


def check(options: argparse.Namespace) -> tuple[float, ...]:
    """The times, once every number is seen to be possible: before the teacher is read."""
    times = parse_times(options.times)
    require_folder(options.out, f"--out {options.out}")
    check_numbers(times=times, shift=options.shift, guidance=options.guidance)
    check_device(options.device)
    return times


def build(options: argparse.Namespace) -> list[Path]:
    """Build the shards the options ask for; returns their paths."""
    times = check(options)
    model = open_checkpoint(
        options.teacher, weights=options.weights, device=options.device, precision=options.precision
    )
    plan = TrajectoryPlan.of(
        model,
        times=times,
        steps=options.steps,
        shift=options.shift,
        guidance=options.guidance,
        seed=options.seed,
    )
    given = inputs(options, model)
    builder = ODEPairBuilder(model, plan, **given)
    num = len(given.get("latents") or given["prompts"]) if options.num is None else options.num

    def make(start: int, stop: int) -> Iterator[ShardSample]:
        print(
            f"{shard_name(start // options.shard_size)}: samples {start} to {stop - 1} of {num}",
            flush=True,
        )
        return builder.samples(start, stop, batch=options.batch, dtype=DTYPES[options.dtype])

    return build_shards(
        options.out,
        num_samples=num,
        shard_size=options.shard_size,
        recipe=manifest(options, model, plan, given),
        make=make,
        part=options.part,
    )


def manifest(
    options: argparse.Namespace, model: LoadedModel, plan: TrajectoryPlan, given: dict[str, Any]
) -> dict[str, object]:
    """What the shards are made from: training reads `training_type`, `kd_timesteps` and `pattern`
    and refuses others.
    """
    told = model.description
    walked = {key: value for key, value in asdict(plan).items() if key != "times"}
    teacher = {
        "path": str(model.source.resolve()),
        "weights": options.weights,
        "stage": told.stage,
        "iteration": told.iteration,
    }
    causal = model.recipe is not None
    return {
        "source": "teacher trajectories",
        "training_type": "tf_kd" if causal else "df_kd",
        "kd_timesteps": list(plan.times),
        **(
            {"pattern": model.recipe.pattern, "latents": given["latents"].fingerprint()}
            if causal
            else {"prompts": _digest(given["prompts"])}
        ),
        "ode": walked,
        "teacher": teacher,
        "codec": told.extra.get("codec"),
        "text": told.extra.get("text"),
        "latent_shape": list(model.latent_shape),
        "dtype": options.dtype,
    }


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


@command(failure=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0, or 1 with one line on standard error."""
    options = arguments(argv)
    paths = build(options)
    print(f"{len(paths)} shards of trajectories: {options.out}/shard-*.tar")


if __name__ == "__main__":
    raise SystemExit(main())
