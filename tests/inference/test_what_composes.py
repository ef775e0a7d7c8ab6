"""The table of what does not go with what in docs/inference.md, row by row: each says what happens,
and what is refused is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.inference import causal_film, causal_flags
from rcm.inference.causal_command import CausalJob, _spec
from rcm.inference.causal_flags import CAUSAL, causal_parser, codec_spec_of, recipe_of, settle_flags
from rcm.inference.causal_methods import METHODS
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import DTYPES, MODES, SMOOTHINGS, KVCodecSpec, SideSpec
from rcm.pipelines.wan_sizes import FrameSize
from tests.pipelines import test_stream_pairs as pairs

DOCS = Path(__file__).parents[2] / "docs" / "inference.md"
CODED = ("--kv_dtype_k", "int4", "--kv_dtype_v", "int4")
FEW = ("--distilled",)
CUDA = ("--device", "cuda", "--noise_device", "cpu", "--graphs", "on")


def planned(folder: Path, *flags: str) -> str:
    """What a causal command says to flags before it opens a file: its refusal, or nothing."""
    flags = causal_parser("causal", about="", defaults=CAUSAL).parse_args(["--save_path", str(folder / "a.mp4"), *flags])
    try:
        settle_flags(flags, CAUSAL)
        job = CausalJob(recipe_of(flags), codec_spec_of(flags), causal_film.timelines_of(flags))
        film = causal_film.film_of(flags, job.timelines[0], job.recipe.blocks, number=0, count=1)
        _spec(flags, job, film, size=FrameSize(32, 48), device=torch.device(flags.device))
    except ConfigError as error:
        return str(error)
    return ""


def refused(*sets: tuple[str, ...], words: str) -> Callable[[Path, Callable], None]:
    """Each set of flags is refused in such words, which hold its flags."""

    def check(folder: Path, printed: Callable[[], str]) -> None:
        for flags in sets:
            assert re.search(words, planned(folder, "--device", "cpu", *flags)), flags

    return check


def noted(*flags: str, words: str) -> Callable[[Path, Callable], None]:
    """A note says so, and the video is made."""

    def check(folder: Path, printed: Callable[[], str]) -> None:
        assert planned(folder, "--device", "cpu", *flags) == "" and re.search(f"note: .*{words}", printed())

    return check


def recached(folder: Path, printed: Callable[[], str]) -> None:
    named = {pairs.POLICIES[name][0].__class__ for name in pairs.MERGING}
    assert {name for name, method in METHODS.items() if method.make in named} == {"memrope", "deep_forcing", "relax_forcing"}
    pairs.test_a_recache_after_a_policy_merged_is_refused_and_the_stream_goes_on("mem")


def heads_apart(folder: Path, printed: Callable[[], str]) -> None:
    """Which codecs give every rank's heads what they give them among all."""
    x = torch.randn(1, 8, 4, 16, generator=torch.Generator().manual_seed(0))

    def apart(mode: str, dtype: str, smoothing: str) -> bool:
        side = SideSpec(dtype, smoothing, group_size=16)
        spec = KVCodecSpec(side, side, mode=mode, qvg_clusters=4)

        def restored(heads: torch.Tensor) -> torch.Tensor:
            codec = KVCodec(spec)
            return codec.decode(codec.encode(heads.contiguous(), side="key", layer=0), side="key")

        return not torch.equal(restored(x), torch.cat([restored(part) for part in x.chunk(2, dim=2)], dim=2))

    found = set()
    for mode in MODES:
        for dtype in DTYPES[1:]:
            for smoothing in SMOOTHINGS:
                try:
                    if apart(mode, dtype, smoothing):
                        found.add((mode, smoothing))
                except ConfigError:  # official: integers alone
                    pass
    assert found == {("rcm", "qvg"), ("release", "qvg")}


def graphs(folder: Path, printed: Callable[[], str]) -> None:
    words = {
        "--kv_hot_chunks": (*CODED, "--kv_hot_chunks", "1"),
        "--kv_dense_prefix_cache": (*CODED, "--kv_dense_prefix_cache"),
        "--kv_bias_correction": (*CODED, "--kv_bias_correction"),
        "--no-kv_triton_restore": (*CODED, "--no-kv_triton_restore"),
        "--device cpu has none": ("--device", "cpu"),
    }
    for told, flags in words.items():
        answer = planned(folder, *FEW, *CUDA, *flags)
        assert answer.startswith(f"--graphs on: {told}") and "--graphs auto" in answer, told
        assert planned(folder, *FEW, *CUDA, *flags, "--graphs", "auto") == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_flags, "num_ranks", lambda: 2)
        assert planned(folder, *FEW, *CUDA) == "--graphs on: several GPUs share each pass; use --graphs auto"


ROWS = {
    "`--kv_pre_rope_keys` with `deep_forcing`, `relax_forcing`": refused(
        *((*FEW, "--kv_pre_rope_keys", "--extrapolation_method", name) for name in ("deep_forcing", "relax_forcing")),
        words="--kv_pre_rope_keys: (deep|relax)_forcing turns rotated keys on",
    ),
    "`--prompt_switch recache` with `memrope`, `deep_forcing`, `relax_forcing`": recached,
    "a cut (`#`) without `infinity_rope`": noted(*FEW, "--prompt", "a[1s]|b[1s#]", words="--extrapolation_method infinity_rope only"),
    "`--image_path` with `--first_chunk_t` above 1": noted(
        *FEW, "--image_path", "a.png", "--first_chunk_t", "3", words="--first_chunk_t 3 is not used"
    ),
    "durations with `--num_frames`": noted(*FEW, "--prompt", "a[1s]|b[1s]", "--num_frames", "41", words="--num_frames 41 is not used"),
    "`--graphs on` with `--kv_hot_chunks`, `--kv_dense_prefix_cache`, `--kv_bias_correction`, `--no-kv_triton_restore`, several GPUs, or"
    " without CUDA": graphs,
    "`--guidance_scale`, `--timestep_shift`, `--negative_prompt` with `--distilled`; `--mid_t`, `--steps_per_chunk`, `--mid_t_schedules`"
    " without": refused(
        *((*FEW, flag, "2") for flag in ("--guidance_scale", "--timestep_shift", "--negative_prompt")),
        *((flag, "0.5") for flag in ("--mid_t", "--mid_t_schedules")),
        ("--steps_per_chunk", "2"),
        words="belong to many-step sampling|need --distilled",
    ),
    "`--num_steps` with `--steps_per_chunk`, `--scene_file` with `--prompt_file`": refused(
        (*FEW, "--num_steps", "2", "--steps_per_chunk", "2"),
        (*FEW, "--scene_file", "a", "--prompt_file", "b"),
        words="both (set|say) .*; give one of them",
    ),
    "`--mid_t_schedules` without `--steps_per_chunk`, `--context_from_last_step_start_chunk` without `--context_from_last_step`,"
    " `--adaptive_resolution` without `--image_path`, a flag of another `--extrapolation_method`": refused(
        (*FEW, "--mid_t_schedules", "0.5"),
        (*FEW, "--context_from_last_step_start_chunk", "1"),
        (*FEW, "--adaptive_resolution"),
        (*FEW, "--df_sink_frames", "3"),
        words="needs|no effect|give --image_path|belongs to --extrapolation_method",
    ),
    "`--kv_hot_chunks`, `--kv_dense_prefix_cache` without a quantised cache; `--kv_bias_correction` without quantised keys;"
    " `--kv_scale_fit_k` (or `_v`) with 8 bits or more": refused(
        (*FEW, "--kv_hot_chunks", "1"),
        (*FEW, "--kv_dense_prefix_cache"),
        (*FEW, "--kv_bias_correction", "--kv_dtype_v", "int4"),
        *((*FEW, "--kv_dtype_k", dtype, "--kv_scale_fit_k", "search") for dtype in ("bf16", "fp8", "int8")),
        words="belongs to a quantised cache|is for coded keys|is for types of 4 and 2 bits",
    ),
    "`--kv_scale_fit_k search` with `--kv_bias_correction`, or with `--kv_mode release` or `official`": refused(
        (*FEW, *CODED, "--kv_scale_fit_k", "search", "--kv_bias_correction"),
        *((*FEW, *CODED, "--kv_scale_fit_k", "search", "--kv_mode", mode) for mode in ("release", "official")),
        words="leaves none of it|is not known to --kv_mode",
    ),
    "`--fp8_attention` with a quantised cache": refused((*FEW, "--fp8_attention", *CODED), words="--fp8_attention needs a plain cache"),
    "`--tiny_decoder` with `--image_path`": refused(
        (*FEW, "--tiny_decoder", "a.pth", "--image_path", "a.png"), words="--tiny_decoder does not encode"
    ),
    "`--kv_smoothing_k qvg` (or `_v`) on several GPUs": heads_apart,
}


def table() -> dict[str, str]:
    """Rows of the table: what is together, and what happens."""
    lines = DOCS.read_text().split("| together | what happens |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return dict(tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines)


def test_the_table_has_these_rows():
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_what_the_table_says_happens(tmp_path, capsys, row):
    told = table()[row]
    ROWS[row](tmp_path, lambda: capsys.readouterr().out)
    expected = {"noted": "a note says so", "refused": "refused", "recached": "refused", "graphs": "refused", "heads_apart": "differs"}
    assert expected[ROWS[row].__qualname__.split(".")[0]] in told
