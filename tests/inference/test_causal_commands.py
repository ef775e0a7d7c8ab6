"""The three causal commands on a folder of tiny files in the public layouts, for real: from flags
to an mp4.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from loguru import logger
from PIL import Image

from rcm.core.dtypes import Precision
from rcm.encoders.taehv import TinyDecoderCodec
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.inference import causal_film, causal_flags, causal_methods, wan_models
from rcm.inference.causal_flags import CAUSAL, EXTRAPOLATION, QUANT, causal_parser
from rcm.inference.causal_methods import METHODS
from rcm.kernels.kv_codec.spec import FLAGS
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.layout import TokenLayout
from rcm.pipelines import session
from rcm.pipelines.image_condition import fit_image, read_image
from rcm.pipelines.scenes import parse_timeline
from rcm.pipelines.streaming import stream_latents
from rcm.pipelines.video_io import probe, read_mp4, write_mp4
from rcm.pipelines.wan_sizes import FrameSize
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.dist import run_ranks
from tests.support.tiny_wan_files import PROMPT, WanFiles, dit, expect_a_tiny_vae, tiny_codec

PLAIN, CODED, LONG = "wan2pt1_t2v_causal_infer", "wan2pt1_t2v_causal_quant_infer", "wan2pt1_t2v_causal_extrapolation_infer"
DEFAULTS = {PLAIN: CAUSAL, CODED: QUANT, LONG: EXTRAPOLATION}
FEW = ("--distilled", "--num_steps", "2")


def sample(command: str, files: WanFiles, out: Path, *flags: str) -> int:
    main = import_module(f"rcm.inference.{command}").main
    prompt = () if {"--prompt", "--prompt_file", "--scene_file"} & set(flags) else ("--prompt", PROMPT)
    return main([*files.shared_flags, "--dit_path", str(files.dit), *prompt, "--save_path", str(out), *flags])


def made(command: str, files: WanFiles, folder: Path, *flags: str) -> torch.Tensor:
    """The pixels of a video."""
    assert sample(command, files, folder / "a.mp4", *flags) == 0
    return read_mp4(folder / "a.mp4")


def expected(latents: torch.Tensor, folder: Path) -> torch.Tensor:
    """Latents [B, C, T, h, w], decoded and through the same file format."""
    frames = tiny_codec().decode(latents)
    write_mp4(folder / "expected.mp4", torch.cat(list(frames), dim=-1), fps=16)
    return read_mp4(folder / "expected.mp4")


def network() -> Denoiser:
    return Denoiser(dit().requires_grad_(False), Precision.preset("fp32"))


def text_of(files: WanFiles, prompt: str) -> Condition:
    return Condition(UMT5TextEncoder.from_files(files.text).encode([prompt]).float())


def sampled(model, cond: Condition, recipe: SamplingRecipe, *, frames: int, batch: int = 1, seed: int = 0, **options) -> torch.Tensor:
    shape, generator = (batch, 16, frames, 4, 6), torch.Generator().manual_seed(seed)
    chunks = stream_latents(model, cond.expand(batch), recipe, shape=shape, generator=generator, **options)
    return torch.cat([x for _, x in chunks], dim=2)


def test_few_steps_with_schedules_per_chunk(files, tmp_path, capsys):
    flags = ("--distilled", "--steps_per_chunk", "4", "2", "--mid_t_schedules", "15/16,5/6 5/8; 5/8", "--context_from_last_step",
             "--context_from_last_step_start_chunk", "1", "--num_frames", "17", "--num_samples", "2", "--seed", "4",
             "--report", str(tmp_path / "r.json"), "--preview_grid", str(tmp_path / "p.png"))  # fmt: skip
    got = made(PLAIN, files, tmp_path, *flags)
    mids = ((15 / 16, 5 / 6, 5 / 8), (5 / 8,))
    recipe = SamplingRecipe("few_step", "c1-1", mids=mids, noisy_context=True, noisy_context_start_chunk=1)
    assert torch.equal(got, expected(sampled(network(), text_of(files, PROMPT), recipe, frames=5, batch=2, seed=4), tmp_path))
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (2 * 48, 32, 17, 16.0)
    record = json.loads((tmp_path / "r.json").read_text())
    video = record["videos"][0]
    assert record["recipe"]["mids"] == [list(m) for m in mids] and (video["latent_frames"], video["num_frames"]) == (5, 17)
    assert record["kv_codec"] is None and record["ranks"] == 1 and len(video["runs"]) == 1
    assert Image.open(tmp_path / "p.png").size[0] > 8 * 40
    said = capsys.readouterr().out
    assert "2 x 17 frames of 32x48 (HxW) in 5 chunks (c1-1); steps per chunk 4 2, noisy context from chunk 1" in said


@pytest.mark.slow
def test_many_steps_with_guidance(files, tmp_path):
    flags = ("--num_steps", "3", "--chunk_t", "2", "--num_frames", "17", "--negative_prompt", "a cat", "--guidance_scale", "2",
             "--timestep_shift", "5", "--sigma_max", "800")  # fmt: skip
    recipe = SamplingRecipe("ode", "c1-2", ode_steps=3, shift=5.0, guidance=2.0, sigma_max=800.0)
    guided = Guided(network(), text_of(files, "a cat"), 2.0)
    assert torch.equal(made(PLAIN, files, tmp_path, *flags), expected(sampled(guided, text_of(files, PROMPT), recipe, frames=5), tmp_path))
    alone = sampled(network(), text_of(files, PROMPT), recipe, frames=5)
    assert torch.equal(made(PLAIN, files, tmp_path, *flags[:-6], "--guidance_scale", "1", *flags[-4:]), expected(alone, tmp_path))


@pytest.mark.parametrize("start", [0, 1])
def test_an_image_is_the_first_chunk(files, tmp_path, start):
    """By hand, in the release's order of noise: start of T - 1 frames, two steps of T frames, then
    the image's own.
    """
    flags = (*FEW, "--mid_t", "5/8", "--num_frames", "13", "--image_path", str(files.folder / "first.png"), "--context_from_last_step",
             "--context_from_last_step_start_chunk", str(start))  # fmt: skip
    got = made(PLAIN, files, tmp_path, *flags)
    denoiser, cond, codec = network(), text_of(files, PROMPT), tiny_codec()
    image = codec.encode(fit_image(read_image(files.folder / "first.png"), FrameSize(32, 48))).double()
    source = torch.Generator().manual_seed(0)
    begin = torch.randn(1, 16, 3, 4, 6, generator=source)
    steps = [torch.randn(1, 16, 4, 4, 6, generator=source) for _ in range(2)]
    first, mid = 1600 / 1601, 5 / 8
    cache = denoiser.new_cache(num_frames=4, grid=(2, 3))

    def run(x, t, frame, *, append):
        view = cache.append() if append else cache.readonly()
        layout = TokenLayout.over_cache((frame,), grid=(2, 3), context_tokens=view.prefix_tokens)
        return denoiser.velocity(x, torch.tensor([[t]], dtype=torch.float64), cond, layout, cache=view)

    noisy = (1 - mid) * image + mid * torch.randn(1, 16, 1, 4, 6, generator=source).double() if start == 0 else image
    run(noisy, mid if start == 0 else 0.0, 0, append=True)
    latents = [image]
    for frame in (1, 2, 3):
        x = begin[:, :, frame - 1 : frame].double() * first
        x0 = x - first * run(x, first, frame, append=False)
        x = (1 - mid) * x0 + mid * steps[0][:, :, frame : frame + 1].double()
        latents.append(x - mid * run(x, mid, frame, append=True))
    assert torch.equal(got, expected(torch.cat(latents, dim=2).float(), tmp_path))


def test_an_image_decides_the_shape_and_the_first_chunk(files, tmp_path, capsys, monkeypatch):
    image = ("--image_path", str(files.folder / "first.png"))
    assert sample(LONG, files, tmp_path / "a.mp4", *FEW, *image, "--first_chunk_t", "3", "--chunk_t", "2", "--num_frames", "9") == 0
    assert "note: the image is the first chunk, one latent frame; --first_chunk_t 3 is not used" in capsys.readouterr().out
    monkeypatch.setattr("rcm.inference.wan_command.table_size", lambda *_: FrameSize(64, 48))
    flags = [x for x in files.shared_flags if x not in ("--size", "32x48")]
    main = import_module(f"rcm.inference.{PLAIN}").main
    argv = [*flags, "--dit_path", str(files.dit), *FEW, *image, "--adaptive_resolution", "--save_path", str(tmp_path / "b.mp4")]
    assert main(argv) == 0
    info = probe(tmp_path / "b.mp4")
    assert (info.width, info.height) == (80, 32), "about 64 x 48 pixels, two to one"


SCENES = "a red square[0.5s] | a cat[0.25s] | rain[0.5s#]"


def test_everything_at_once(files, tmp_path, capsys):
    """Image, timeline with a cut, relative positions, quantised cache, guidance, noisy context and
    streamed decoding: as one session.
    """
    flags = ("--num_steps", "2", "--guidance_scale", "2", "--chunk_t", "1", "--image_path", str(files.folder / "first.png"),
             "--prompt", SCENES, "--extrapolation_method", "infinity_rope", "--cache_blocks", "3", "--rope_cut_delta", "4",
             "--kv_dtype_k", "int4", "--kv_dtype_v", "int2", "--kv_smoothing_v", "qvg", "--kv_qvg_clusters", "3",
             "--context_from_last_step")  # fmt: skip
    plain = made(LONG, files, tmp_path, *flags)
    said = capsys.readouterr().out
    assert "note: 17 frames by the durations of the prompts; --num_frames 5 is not used" in said
    assert "keys int4 by channel" in said and "infinity_rope" in said
    assert torch.equal(made(PLAIN, files, tmp_path, *flags, "--streaming_vae"), plain), "the commands differ in defaults only"
    assert re.search(r"First chunk, decoded: [\d.]+ ms", capsys.readouterr().out)
    scene = tmp_path / "scenes.txt"
    scene.write_text(SCENES.replace(" | ", "\n"))
    renamed = [str(scene) if x == SCENES else "--scene_file" if x == "--prompt" else x for x in flags]
    assert torch.equal(made(CODED, files, tmp_path, *renamed, "--num_runs", "2", "--warmup_iters", "1"), plain), "every run is the same"
    assert torch.equal(made(CODED, files, tmp_path, *renamed, "--kv_dense_prefix_cache"), plain)
    switches = (("--kv_hot_chunks", "1"), ("--prompt_blend", "1"), ("--prompt_switch", "recache"), ("--ntk_t", "2"))
    for other in (*switches, ("--kv_bias_correction",)):
        assert not torch.equal(made(CODED, files, tmp_path, *renamed, *other), plain), other


METHOD_FLAGS = {
    "none": (),
    "sliding_window": ("--window_blocks", "2", "--sw_sink_blocks", "1"),
    "rolling_sink": ("--total_blocks", "3", "--sink_blocks", "2"),
    "infinity_rope": ("--cache_blocks", "2", "--flush_interval_blocks", "3", "--f_limit", "5", "--no_rope_cut_single_frame"),
    "deep_forcing": ("--df_sink_frames", "1", "--df_budget_frames", "4", "--df_recent_frames", "2", "--df_observation_layers", "1"),
    "memrope": ("--mr_sink_frames", "1", "--mr_local_frames", "2", "--mr_alpha_long", "0.2", "--mr_per_position"),
    "relax_forcing": ("--rx_sink_frames", "1", "--rx_budget_frames", "4", "--rx_recent_frames", "2", "--rx_alignment_weight", "0.9"),
    "relax_forcing_paper": ("--rx_sink_blocks", "1", "--rx_pool_blocks", "4", "--f_limit", "9"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_bounds_its_cache(files, tmp_path, method):
    pattern = ("--first_chunk_t", "1", "--chunk_t", "1", "--num_frames", "37", "--report", str(tmp_path / "r.json"))
    assert sample(LONG, files, tmp_path / "a.mp4", *FEW, *pattern, "--extrapolation_method", method, *METHOD_FLAGS[method]) == 0
    held = json.loads((tmp_path / "r.json").read_text())["videos"][0]["cache_bytes"]
    frames = {"none": 10, "sliding_window": 3, "rolling_sink": 5, "infinity_rope": 3, "deep_forcing": 5, "memrope": 6, "relax_forcing": 5}
    assert held == frames.get(method, 7) * 6 * 256 * 2 * 4


def test_the_release_s_window_counts_cached_blocks(files, tmp_path):
    flags = (*FEW, "--first_chunk_t", "1", "--chunk_t", "1", "--num_frames", "29", "--window_blocks", "3", "--sw_sink_blocks", "1")
    got = made(LONG, files, tmp_path, *flags)
    recipe = SamplingRecipe("few_step", "c1-1", mids=((15 / 16,),))
    wanted = sampled(network(), text_of(files, PROMPT), recipe, frames=8, policy=SlidingWindow(3, 1))
    assert torch.equal(got, expected(wanted, tmp_path))


def test_prompt_files_make_numbered_videos(files, tmp_path):
    listed = tmp_path / "prompts.txt"
    listed.write_text("a cat\nrain[0.5s] | snow[0.5s]\n")
    assert sample(PLAIN, files, tmp_path / "a.mp4", *FEW, "--prompt_file", str(listed), "--preview_grid", str(tmp_path / "p.png")) == 0
    assert [probe(tmp_path / f"a-00{i}.mp4").num_frames for i in range(2)] == [5, 13]
    assert (tmp_path / "p-001.png").exists() and not (tmp_path / "a.mp4").exists()
    recipe = SamplingRecipe("few_step", "c1-1", mids=((15 / 16,),))
    assert torch.equal(read_mp4(tmp_path / "a-000.mp4"), expected(sampled(network(), text_of(files, "a cat"), recipe, frames=2), tmp_path))


def test_the_report_of_times(files, tmp_path, capsys, monkeypatch):
    """Weights are looked at as they are read, not in the time of sampling."""
    monkeypatch.setattr(session, "require_finite_weights", lambda _: pytest.fail("scanned again"))
    assert sample(PLAIN, files, tmp_path / "a.mp4", *FEW, "--num_frames", "9", "--num_runs", "2") == 0
    said = capsys.readouterr().out
    names = ["DiT sampling", "First chunk latency (first-frame DiT latency)", "Second chunk latency", "VAE decoding", "Total"]
    means = {name: float(re.search(rf"^{re.escape(name)}: ([\d.]+) ms$", said, re.M)[1]) for name in names}
    assert len(re.findall(r"^run \d/2: DiT [\d.]+ ms, VAE [\d.]+ ms, Total [\d.]+ ms, FirstChunk [\d.]+ ms, SecondChunk", said, re.M)) == 2
    assert means["Total"] == pytest.approx(means["DiT sampling"] + means["VAE decoding"], abs=0.2)
    assert means["First chunk latency (first-frame DiT latency)"] + means["Second chunk latency"] < means["DiT sampling"]
    fps, frames = re.search(r"^FPS: ([\d.]+) \((\d+) frames\)$", said, re.M).groups()
    assert (int(frames), float(fps)) == (9, pytest.approx(9000 / means["Total"], rel=0.05))
    flags = causal_parser(PLAIN, about=None, defaults=CAUSAL).parse_args(["--benchmark"])
    causal_flags.settle_flags(flags, CAUSAL)
    assert (flags.warmup_iters, flags.num_runs) == (3, 3)


def test_random_weights_read_no_file(tmp_path, capsys, monkeypatch):
    main = import_module(f"rcm.inference.{LONG}").main
    small = ("--size", "16x16", "--num_frames", "9", "--distilled", "--num_steps", "1", "--device", "cpu")
    monkeypatch.setattr(wan_models, "preset", lambda name: dit().config)
    assert main(["--random_weights", *small, "--save_path", str(tmp_path / "a.mp4")]) == 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().out and probe(tmp_path / "a.mp4").num_frames == 9


def _on_ranks(files: WanFiles, folder: str, flags: tuple[str, ...]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        expect_a_tiny_vae(patch)
        return sample(LONG, files, Path(folder) / "many.mp4", *flags)


@pytest.mark.dist
def test_two_ranks_make_the_video_of_one(files, tmp_path):
    """Keys are chosen by all heads, of which each rank has half; the prompt changes under way."""
    flags = (*FEW, "--first_chunk_t", "1", "--chunk_t", "1", "--prompt", "a red square[0.75s] | a cat[1s]", "--extrapolation_method",
             "deep_forcing", *METHOD_FLAGS["deep_forcing"][:6])  # fmt: skip
    one = made(LONG, files, tmp_path, *flags)
    assert run_ranks(2, _on_ranks, files, str(tmp_path), flags, tmp_path=tmp_path) == [0, 0]
    assert (one - read_mp4(tmp_path / "many.mp4")).abs().mean() < 1e-3


RELEASE = {
    "model_size": "1.3B", "num_samples": 1, "sigma_max": 1600.0, "chunk_t": 1, "num_frames": 81, "resolution": "480p",
    "aspect_ratio": "16:9",
    "seed": 0, "save_path": "output/causal_generated_video.mp4", "image_path": "", "adaptive_resolution": False, "warmup_iters": 0,
    "num_runs": 1, "num_steps": 50, "guidance_scale": 3.0, "timestep_shift": 3.0, "first_chunk_t": 1, "steps_per_chunk": None,
    "mid_t_schedules": "", "context_from_last_step": False, "context_from_last_step_start_chunk": 0, "distilled": False,
    "vae_path": "assets/checkpoints/Wan2.1_VAE.pth",
}  # fmt: skip
OTHER = {
    CODED: {"first_chunk_t": 3, "chunk_t": 3, "save_path": "output/causal_quant_video.mp4"},
    LONG: {"first_chunk_t": 3, "chunk_t": 3, "save_path": "output/causal_extrapolated_video.mp4", "window_blocks": 6, "sw_sink_blocks": 0},
}


@pytest.mark.parametrize("command", [PLAIN, CODED, LONG])
def test_defaults_of_the_release(command):
    flags = causal_parser(command, about=None, defaults=DEFAULTS[command]).parse_args([])
    causal_flags.settle_flags(flags, DEFAULTS[command])
    wanted = RELEASE | OTHER.get(command, {})
    assert {name: getattr(flags, name) for name in wanted} == wanted
    assert {name: getattr(flags, name) for name in FLAGS} == FLAGS
    assert flags.prompt.startswith("A stylish woman" if command == LONG else "The camera follows behind a white vintage SUV")


@pytest.mark.parametrize("command", [PLAIN, CODED, LONG])
def test_help_has_a_line_for_every_flag(command, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(f"rcm.inference.{command}").main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    parser = causal_parser(command, about=None, defaults=DEFAULTS[command])
    for action in parser._actions:
        assert all(option in said for option in action.option_strings)
        name = action.option_strings[0]
        assert action.help and not (name.startswith("--kv_") and action.help.startswith("[")), name


def test_the_documented_uses_are_understood():
    """Every line of the table of uses, with the flags of each command."""
    text = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `(--[^`]+)`", text, re.M)
    uses = [shlex.split(row.replace("\\|", "|")) for row in rows if "--dit_path FILE" in row]
    assert len(uses) == 11
    for words in uses:
        flags = causal_parser(PLAIN, about=None, defaults=CAUSAL).parse_args(words)
        causal_flags.settle_flags(flags, CAUSAL)
        recipe, _ = causal_flags.recipe_of(flags), causal_flags.codec_spec_of(flags)
        timeline = parse_timeline(flags.prompt)
        frames = recipe.blocks.frames_before(timeline.num_blocks(recipe.blocks)) if timeline.is_timed else None
        frames = frames or causal_film.latent_frames_of(flags.num_frames, recipe.blocks)
        policy = causal_methods.policy_of(flags, cuts=frozenset(), reduce=None)
        assert recipe.blocks.num_blocks(frames) > 1 and (policy.capacity_frames(recipe.blocks) or frames) <= max(frames, 24)


def test_fp8_and_the_tiny_decoder_are_asked_for_by_name(files, tmp_path, capsys, monkeypatch):
    plain = made(PLAIN, files, tmp_path, *FEW, "--num_frames", "5")
    (tmp_path / "fp8").mkdir()
    assert (made(PLAIN, files, tmp_path / "fp8", *FEW, "--num_frames", "5", "--fp8", "all") - plain).abs().float().mean() > 0
    assert sample(PLAIN, files, tmp_path / "b.mp4", "--fp8", "qkw") == 2
    assert sample(PLAIN, files, tmp_path / "b.mp4", "--tiny_decoder", str(tmp_path / "no.pth")) == 2
    assert sample(PLAIN, files, tmp_path / "b.mp4", "--tiny_decoder", "x.pth", "--image_path", str(files.folder / "first.png")) == 2
    told = capsys.readouterr().err
    assert "unknown FP8 layers 'qkw'; set --fp8 to" in told and "does not encode" in told
    assert f"--tiny_decoder {tmp_path / 'no.pth'} does not exist; fetch taew2_1.pth" in told
    monkeypatch.setattr(wan_models, "TinyDecoderCodec", SmallTiny)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "taew2_1.pth").touch()  # Wan's decoder, which decodes nothing here, need not be there
    tiny = ("--tiny_decoder", str(tmp_path / "taew2_1.pth"), "--vae_path", str(tmp_path / "no.pth"))
    assert made(PLAIN, files, tmp_path / "tiny", *FEW, "--num_frames", "5", *tiny).shape == plain.shape
    assert sample(PLAIN, files, tmp_path / "b.mp4", *FEW, *tiny[2:]) == 2


@pytest.mark.slow
def test_fp8_attention_is_asked_for_by_name(files, tmp_path, capsys, monkeypatch):
    frames = ("--num_frames", "9")
    (tmp_path / "fp8").mkdir()
    plain, said = made(PLAIN, files, tmp_path, *FEW, *frames), []
    sink = logger.add(said.append)
    found = made(PLAIN, files, tmp_path / "fp8", *FEW, *frames, "--fp8_attention")
    logger.remove(sink)
    assert 0 < (found - plain).abs().float().mean() < 8, "other pixels, of 255 levels, and not by much"
    assert any("FP8 attention: error" in line for line in said)
    assert sample(PLAIN, files, tmp_path / "b.mp4", "--fp8_attention", "--kv_dtype_k", "int4") == 2
    monkeypatch.setattr(causal_flags, "obstacle", lambda *_, **__: "this card is a toaster")
    assert sample(PLAIN, files, tmp_path / "b.mp4", "--fp8_attention") == 2
    told = capsys.readouterr().err
    assert "--fp8_attention needs a plain cache; leave out" in told and "not possible here: this card is a toaster; leave it out" in told


class SmallTiny(TinyDecoderCodec):
    """The tiny decoder with random weights, whatever file is named."""

    @classmethod
    def from_file(cls, path, *, device="cpu", dtype=torch.bfloat16):
        return cls.random(device=device, dtype=dtype)
