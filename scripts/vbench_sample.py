"""Sample a VBench suite from a checkpoint: every prompt several times, under the names that the
scorer expects.

    python -m scripts.vbench_sample --dit_path outputs/.../toy_sf_dmd_c3-3 --no_augmented_prompt \\
        --max_prompts 20
    torchrun --nproc_per_node=8 -m rcm vbench sample --arch bidirectional --distilled --dit_path \\
        rCM_Wan2.1_T2V_1.3B_480p.pt
    torchrun --nproc_per_node=8 -m rcm vbench sample --arch causal --distilled --num_steps 4 \\
        --chunk_t 3 --first_chunk_t 3 --dit_path FILE
    python -m scripts.vbench_sample --suite i2v --vbench_repo ~/VBench --no_augmented_prompt \\
        --dit_path FILE

The same command continues a stopped run, on any number of ranks. Videos are written to
--output_dir, records of the run to OUTPUT_DIR_run. Sample i has the seed --seed + i for every
prompt. A checkpoint that describes itself is sampled as it was trained unless a flag says
otherwise; for Wan's own files the defaults are those of the release (4 steps, sigma_max 1600, or 50
steps, guidance 5 and shift 5 without --distilled).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import require_folder
from rcm.core.rng import require_seed
from rcm.evaluation.vbench_images import placed_crops, placed_list, require_images, with_images
from rcm.evaluation.vbench_manifest import beside
from rcm.evaluation.vbench_prompts import (
    T2V_FILE,
    SuiteItem,
    by_dimension,
    placed_extensions,
    read_rows,
    read_suite,
    with_extended,
)
from rcm.evaluation.vbench_sampling import Share, SuiteRun, group_of_video, sample_suite
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import check_device, command
from rcm.parallel.launch import this_launch
from rcm.storage.shipped import asset
from scripts.vbench_flags import add_model_flags, output_name, refuse_idle
from scripts.vbench_models import open_sampler

ASSETS = asset("vbench")


_SUITE = """
suite t2v|i2v = t2v     [%(default)s]
prompt_json FILE        prompt list [the public one; i2v: of --vbench_repo or assets/vbench]
augmented_prompts FILE  extended prompts [in --prompt_json, else assets/vbench/*augmented*]
no_augmented_prompt     give the model the short prompts
image_dir DIR           i2v: cropped first frames [crop/16-9 of --vbench_repo or assets/vbench]
vbench_repo DIR         i2v: clone of VBench with the list and the images
skip_missing_images     i2v: leave out prompts without an image
output_dir DIR          folder of the videos [beside --prompt_json, else outputs/vbench]
num_samples N = 5       videos per prompt [%(default)s]
seed int = 0            of sample 0 [%(default)s]
dimension NAME...       only prompts that these dimensions score
max_prompts N           only the first N prompts
dry_run                 say what would be sampled; reads no weights
"""


@command(log="INFO")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run(arguments(argv))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="scripts.vbench_sample", allow_abbrev=False, description=__doc__)
    paths = ("prompt_json", "augmented_prompts", "image_dir", "vbench_repo", "output_dir")
    suite = parser.add_argument_group("suite")
    add_flags(suite, _SUITE, **{name: {"type": Path} for name in paths})
    add_model_flags(parser)
    refuse_idle(parser)
    return parser.parse_args(argv)


def suite_items(flags: argparse.Namespace) -> list[SuiteItem]:
    """The prompts to sample, with the text that the model is given."""
    image_flags = [
        f"--{name}"
        for name in ("image_dir", "vbench_repo", "skip_missing_images")
        if getattr(flags, name)
    ]
    if flags.suite == "t2v" and image_flags:
        raise ConfigError(
            f"{', '.join(image_flags)} belong to --suite i2v; leave them out, or say --suite i2v"
        )
    if flags.no_augmented_prompt and flags.augmented_prompts is not None:
        raise ConfigError(
            "--no_augmented_prompt and --augmented_prompts contradict each other; give one of them"
        )
    listed = flags.prompt_json or _placed(flags)
    items = read_suite(listed)
    if flags.suite == "i2v":
        items = with_images(items)
    if flags.no_augmented_prompt:
        items = [replace(item, extended=None) for item in items]
    elif flags.augmented_prompts is not None:
        items = with_extended(items, flags.augmented_prompts, rows=read_rows(listed))
    elif flags.suite == "t2v" and any(item.extended is None for item in items):
        items = with_extended(items, placed_extensions(ASSETS), rows=read_rows(listed))
    if flags.dimension is not None:
        known = by_dimension(items)
        unknown = [name for name in flags.dimension if name not in known]
        if unknown:
            raise ConfigError(
                f"--dimension {unknown[0]} is not in {listed}, which has {', '.join(known)}"
            )
        items = [item for item in items if set(item.dimensions) & set(flags.dimension)]
    items, images = items[: flags.max_prompts], image_folder(flags)
    return (
        items
        if images is None
        else require_images(items, images, skip_missing=flags.skip_missing_images)
    )


def image_folder(flags: argparse.Namespace) -> Path | None:
    """Where the first frames are; None for text to video."""
    if flags.suite == "t2v":
        return None
    return flags.image_dir or placed_crops(
        ASSETS, clone=flags.vbench_repo, aspect_ratio=flags.aspect_ratio
    )


def _placed(flags: argparse.Namespace) -> Path:
    """The suite's list where none is named."""
    return (
        placed_list(ASSETS, clone=flags.vbench_repo, knob="--prompt_json")
        if flags.suite == "i2v"
        else ASSETS / T2V_FILE
    )


def run(flags: argparse.Namespace) -> None:
    """Check the flags, open the model, sample this rank's share."""
    require_seed(flags.seed, knob="--seed", draws=flags.num_samples)
    items, share = suite_items(flags), Share.of_launch(cp_size=flags.cp_size)
    parent = Path("outputs/vbench") if flags.prompt_json is None else flags.prompt_json.parent
    folder = flags.output_dir or parent / output_name(flags)
    require_folder(folder, f"--output_dir {folder}")
    job = SuiteRun(
        items, folder, num_samples=flags.num_samples, seed=flags.seed, image_dir=image_folder(flags)
    )
    extended = sum(item.extended is not None for item in items)
    who = (
        f"rank {share.dp_rank * share.cp_size + share.cp_rank}: "
        if share.dp_size * share.cp_size > 1
        else ""
    )
    if share == replace(share, dp_rank=0, cp_rank=0):
        print(
            f"{len(items)} prompts ({extended} extended) x {flags.num_samples} samples into"
            f" {folder}",
            flush=True,
        )
    if flags.dry_run:
        for dimension, members in by_dimension(items).items():
            print(f"  {dimension}: {len(members)} prompts")
        print(f"  first file: {items[0].video_name(0)}\n  text given: {items[0].text}")
        return
    check_device(flags.device)
    device = torch.device(flags.device)
    if device.type == "cuda":
        device = this_launch().device(flags.device)
        torch.cuda.set_device(device)
    with group_of_video(share, device=device):
        sampler = open_sampler(flags, device=device)
        about = {
            "dit_path": str(flags.dit_path),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        complete = sample_suite(
            job,
            sampler,
            share=share,
            settings={"suite": flags.suite, "extended_prompts": extended > 0},
            about=about,
            tell=lambda line: print(f"{who}{line}", flush=True),
        )
    if complete:
        print(
            f"{who}complete: {len(items) * flags.num_samples} videos in {folder}, records in"
            f" {beside(folder)}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
