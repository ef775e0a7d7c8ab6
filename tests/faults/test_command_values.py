"""Values that the commands that sample cannot work with: refused before any work, naming the
flag.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rcm.inference import stream
from scripts import vbench_score
from tests.faults.case import Fault, each, kept_folder
from tests.support.tiny_wan_files import WanFiles, write_wan_files

HUGE = "9" * 20
DEADLINE = 5


@functools.cache
def wan_files() -> WanFiles:
    """Small files in Wan's layout, made once."""
    return write_wan_files(kept_folder())


def _nothing_written(folder: Path) -> None:
    left = [path for path in folder.rglob("*") if path.suffix in (".mp4", ".png", ".json") or "partial" in path.name]
    assert not left, left


def streamed(name: str, refusal: str, *words: str) -> Fault:
    """The shipped checkpoint streamed with these words."""
    argv = lambda folder: ["--save_path", folder / "a.mp4", "--device", "cpu", *words]  # noqa: E731
    return Fault(name, kind="values of stream", refusal=refusal, main=stream.main, argv=argv, after=_nothing_written, deadline=DEADLINE)


def sampled(name: str, refusal: str, *words: str, which: str = "diffusion") -> Fault:
    """A Wan command (rcm or diffusion, text to video) on tiny files with these words."""

    def argv(folder: Path) -> list[object]:
        files = wan_files()
        return [*files.shared_flags, "--dit_path", files.dit, "--prompt", "a cat", "--save_path", folder / "a.mp4", *words]

    main = import_module(f"rcm.inference.wan2pt1_t2v_{which}_infer").main
    return Fault(name, kind=f"values of wan {which}", refusal=refusal, main=main, argv=argv, after=_nothing_written, deadline=DEADLINE)


def plain(name: str, refusal: str, command: object, words: Sequence[str], *, kind: str) -> Fault:
    """A command with these words; FOLDER in them is the case's."""
    argv = lambda folder: [word.replace("FOLDER", str(folder)) for word in words]  # noqa: E731
    return Fault(name, kind=kind, refusal=refusal, main=command.main, argv=argv, after=_nothing_written, deadline=DEADLINE)


STREAM = [
    streamed("upscale beyond an mp4", "too large for an mp4.*--upscale", "--upscale", "256", *(["--prompt", "a red cross moving up"] * 8)),
    streamed("device that is none", "--device gpu7 cannot be used", "--device", "gpu7"),
    streamed("device of a number that is none", "--device cuda:99 cannot be used", "--device", "cuda:99"),
    streamed("device without tensors", "--device meta", "--device", "meta"),
    streamed("an empty prompt", "number 1 is empty", "--prompt", ""),
    streamed("a prompt of an entity", "number 1 is empty", "--prompt", "&nbsp;"),
    streamed("a prompt of no width", "number 1 is empty", "--prompt", "\u200b\u200d\ufeff"),
    streamed("a prompt that is no text", "number 1 is not UTF-8", "--prompt", "caf\udce9"),
    streamed("a checkpoint that is not there", "no checkpoint at", "--ckpt", "none", "--prompt", "a red cross moving up"),
]

WAN = [
    sampled("size beyond all memory", "--size 100000x100000 .*at most 8192", "--size", "100000x100000"),
    sampled("size of many digits", "is not HEIGHTxWIDTH", "--size", f"{HUGE}x16"),
    sampled("size of no area", "multiples of 16", "--size", "0x0"),
    sampled("size negative", "is not HEIGHTxWIDTH", "--size=-16x16"),
    sampled("size in other digits", "is not HEIGHTxWIDTH", "--size", "\u0661\u0666x16"),
    sampled("more pixels than memory", "GiB of pixels.*lower --num_samples", "--num_samples=4096", "--num_frames=81", "--size=480x832"),
    sampled("a prompt of no width", "--prompt is empty", "--prompt", "\u2060&#8203;"),
    sampled("a negative prompt that is no text", "--negative_prompt is not UTF-8", "--negative_prompt", "\udcff"),
    sampled("device that is none", "--device gpu7 cannot be used", "--device", "gpu7"),
    sampled("sigma below the second step", "must be above", "--sigma_max", "10", which="rcm"),
    sampled("tiles of no whole cells", "--vae_tile 65 must be a multiple of 8", "--vae_tile", "65"),
]

OTHERS = [
    plain("a folder that is not there", "none", vbench_score, ["--videos_path", "FOLDER/none"], kind="values of vbench_score"),
]


@each([*STREAM, *WAN, *OTHERS])
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
