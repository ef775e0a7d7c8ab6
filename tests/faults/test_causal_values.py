"""What the causal commands cannot work with: values, schedules that do not fit, flags without
effect, files of scenes, patterns.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from tests.faults.case import Fault, each
from tests.faults.test_command_values import DEADLINE, _nothing_written, wan_files
from tests.support.tiny_wan_files import dit

FEW = "--distilled --num_steps 1"


def causal(
    name: str, refusal: str, words: str, which: str = "causal", write: Callable[[Path], object] = lambda folder: None, prompt: bool = True
) -> Fault:
    """A causal command on tiny files with these words; FOLDER in them is the case's, into which
    `write` puts what it needs.
    """

    def argv(folder: Path) -> list[object]:
        files = wan_files()
        write(folder)
        said = ["--prompt", "a cat"] if prompt else []
        shared = [*files.shared_flags, "--dit_path", files.dit, *said, "--save_path", folder / "a.mp4"]
        return [*shared, *(word.replace("FOLDER", str(folder)) for word in shlex.split(words))]

    main = import_module(f"rcm.inference.wan2pt1_t2v_{which}_infer").main
    return Fault(
        name, kind="values of the causal commands", refusal=refusal, main=main, argv=argv, after=_nothing_written, deadline=DEADLINE
    )


def scenes(name: str, refusal: str, content: bytes, flag: str = "--scene_file") -> Fault:
    """A file of scenes or prompts with this content."""
    write = lambda folder: (folder / "scenes.txt").write_bytes(content)  # noqa: E731
    return causal(name, refusal, f"{FEW} {flag} FOLDER/scenes.txt", write=write, prompt=False)


def _image(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20)).save(folder / "a.jpg")


SAMPLING = [
    causal("fewer schedules than steps", "1 mid-time schedules for 2 entries", "--distilled --steps_per_chunk 4 2 --mid_t_schedules 5/8"),
    causal("too few mid times", "Need 4 mid_t values for 5 steps", "--distilled --num_steps 5"),
    causal("too few in a schedule", "Need 3 mid_t values for 4 steps", "--distilled --steps_per_chunk 4 --mid_t_schedules 5/8"),
    *(
        []
        if torch.cuda.is_available()
        else [causal("noise of a card that is not there", "--noise_device cuda cannot be used", f"{FEW} --noise_device cuda")]
    ),
    causal("samples beyond a file", "too large for an mp4.*lower --num_samples", f"{FEW} --num_samples 400"),
    causal("times that grow", "must decrease strictly", "--distilled --num_steps 3 --mid_t 5/8 5/6"),
    causal("a time of one", "must decrease strictly", "--distilled --num_steps 2 --mid_t 1"),
    causal("times that are words", "cannot read times from", "--distilled --num_steps 2 --mid_t half"),
    causal("a time over zero", "cannot read times from", "--distilled --num_steps 2 --mid_t 1/0"),
    causal("frames between chunks", "choose 9 or 21", f"{FEW} --chunk_t 3 --first_chunk_t 3 --num_frames 13"),
    causal("fewer frames than the first chunk", "choose 9,", f"{FEW} --chunk_t 3 --first_chunk_t 3 --num_frames 5"),
    causal("an image alone", "is the image alone; choose 5", f"{FEW} --image_path FOLDER/a.jpg --num_frames 1", write=_image),
    causal("an image and half a chunk", "choose 9 or 17", f"{FEW} --image_path FOLDER/a.jpg --chunk_t 2 --num_frames 13", write=_image),
    causal("no image there", "a.jpg", f"{FEW} --image_path FOLDER/a.jpg"),
]


def extended(name: str, refusal: str, method: str, words: str = "") -> Fault:
    """The extrapolation command with a method and flags."""
    told = f"{FEW} --first_chunk_t 1 --chunk_t 1 --extrapolation_method {method} {words}"
    return causal(name, refusal, told, which="causal_extrapolation")


EXTRAPOLATION = [
    extended("sinks fill the window", "--sw_sink_blocks 2 .*below it", "sliding_window", "--window_blocks 2 --sw_sink_blocks 2"),
    extended("negative sinks", "--sw_sink_blocks -1", "sliding_window", "--sw_sink_blocks -1"),
    extended("sinks and recent beyond the bank", "set total_blocks to 8", "rolling_sink", "--recent_blocks 3"),
    extended("no recent blocks", "at least 1", "rolling_sink", "--recent_blocks 0"),
    extended("sinks fill the cache", "below cache_blocks=2", "infinity_rope", "--cache_blocks 2 --ir_sink_blocks 2"),
    extended("a horizon of one", "f_limit=1 must be at least 2", "infinity_rope", "--f_limit 1"),
    extended("no budget", "df_budget_frames=13; set it to 14", "deep_forcing", "--df_budget_frames 13"),
    extended("no sinks at all", "mr_sink_frames=-1", "memrope", "--mr_sink_frames -1"),
    extended("no local frames", "mr_local_frames=0", "memrope", "--mr_local_frames 0"),
    extended("a rate that is no number", "mr_alpha_long.*finite", "memrope", "--mr_alpha_long nan"),
    extended("a weight above one", "alignment_weight=1.5 must lie in", "relax_forcing", "--rx_alignment_weight 1.5"),
    extended("relaxed beyond its budget", "rx_budget_frames=7; set it to 8", "relax_forcing", "--rx_budget_frames 7"),
    extended("a horizon too short", "f_limit=3 frames are fewer than the 5", "relax_forcing_paper", "--f_limit 3"),
    extended("a switch of another method", "--no_rope_cut_single_frame belongs", "none", "--no_rope_cut_single_frame"),
    extended("a method that is not there", "invalid choice", "streaming_llm"),
]

CACHE = [
    causal("a type that is not there", "invalid choice", f"{FEW} --kv_dtype_k int3", which="causal_quant"),
    causal("no clusters", "--kv_qvg_clusters must be at least 1", f"{FEW} --kv_qvg_clusters 0", which="causal_quant"),
    causal("a percentile of percent", "--kv_clip_percentile", f"{FEW} --kv_clip_percentile 99.9", which="causal_quant"),
    causal(
        "a zero of a float", "--kv_asymmetric_k needs an integer type", f"{FEW} --kv_asymmetric_k --kv_dtype_k fp8", which="causal_quant"
    ),
]

SCENES = [
    causal("a duration of letters", r"\[-1s\] in segment 2 is no duration", f"{FEW} --prompt 'a[2s] | b[-1s]'"),
    causal("a segment without words", "segment 2 of the timeline has no prompt", f"{FEW} --prompt 'a[2s] | [1s]'"),
    causal("a scene of ages", "more than a day", f"{FEW} --prompt 'a[{'9' * 400}s]'"),
    causal("a scene of hours", "at most 100000", f"{FEW} --prompt 'a[80000s]'"),
    causal("no scene file", "no timeline at .*--scene_file", f"{FEW} --scene_file FOLDER/none.txt", prompt=False),
    scenes("an empty timeline", "has no segments", b"\n\n"),
    scenes("a timeline without time", "no line of .* has a duration", b"a\nb\n"),
    scenes("a timeline in Latin-1", "not UTF-8", b"caf\xe9[2s]\n"),
    scenes("an empty prompt file", "is empty", b"", flag="--prompt_file"),
    scenes("an empty line of prompts", "line 2 of .* is empty", b"a\n\nb\n", flag="--prompt_file"),
]


def _other_width(folder: Path) -> None:
    torch.save(dict(dit(in_dim=36).state_dict()), folder / "i2v.pt")


FILES = [
    causal("an image-to-video network", "reads 36 channels, this command gives 16", f"{FEW} --dit_path FOLDER/i2v.pt", write=_other_width),
    causal("no network", "--dit_path .*none.pt does not exist", f"{FEW} --dit_path FOLDER/none.pt"),
    causal("a network that is not named", "fetch Causal_rCM", f"{FEW} --dit_path ''"),
    causal("a video called txt", "must end in .mp4", f"{FEW} --save_path FOLDER/a.txt"),
    causal("a report called txt", "must end in .json", f"{FEW} --report FOLDER/a.txt"),
    causal(
        "a sheet in a folder that is a file",
        "cannot write there",
        f"{FEW} --preview_grid FOLDER/f/p.png",
        write=lambda f: (f / "f").write_text(""),
    ),
]


@each(SAMPLING + EXTRAPOLATION + CACHE + SCENES + FILES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
