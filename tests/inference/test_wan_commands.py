"""The four Wan commands on a folder of tiny files in the public layouts, for real: from flags to an
mp4.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from rcm.core.dtypes import Precision
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.inference import wan_models
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.pipelines.image_condition import fit_image, image_channels, read_image
from rcm.pipelines.residency import Resident
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents
from rcm.pipelines.video_io import probe, read_mp4
from rcm.pipelines.wan_sizes import FrameSize
from tests.support.dist import run_ranks
from tests.support.tiny_wan_files import PROMPT, WanFiles, dit, expect_a_tiny_vae, original_layout, tiny_codec

COMMANDS = ("wan2pt1_t2v_rcm_infer", "wan2pt1_t2v_diffusion_infer", "wan2pt2_i2v_rcm_infer", "wan2pt2_i2v_diffusion_infer")


def own_flags(command: str, files: WanFiles) -> list[str]:
    """What a command needs beside the shared flags."""
    if command.startswith("wan2pt1"):
        return ["--dit_path", str(files.dit)]
    image = ["--image_path", str(files.folder / "first.png")]
    return [*image, "--high_noise_model_path", str(files.high), "--low_noise_model_path", str(files.low)]


def sample(command: str, files: WanFiles, out: Path, *flags: str, prompt: str = PROMPT) -> int:
    main = import_module(f"rcm.inference.{command}").main
    return main([*files.shared_flags, *own_flags(command, files), "--prompt", prompt, "--save_path", str(out), *flags])


def report(command: str, files: WanFiles, tmp_path: Path, *flags: str) -> dict:
    assert sample(command, files, tmp_path / "a.mp4", "--report", str(tmp_path / "a.json"), *flags) == 0
    return json.loads((tmp_path / "a.json").read_text())


def close_to_file(frames: torch.Tensor, path: Path) -> bool:
    """Whether a file shows `frames` [B, 3, F, H, W] side by side, up to the codec's loss of
    colour.
    """
    expected = torch.cat(list(frames.clamp(-1, 1)), dim=-1)
    return bool((read_mp4(path).mean(dim=0) - expected.mean(dim=0)).abs().mean() < 0.08)


def text_of(files: WanFiles, prompt: str) -> torch.Tensor:
    return UMT5TextEncoder.from_files(files.text).encode([prompt]).float()


def test_few_step_text_to_video(files, tmp_path, capsys):
    out, preview = tmp_path / "new" / "a.mp4", tmp_path / "p.png"
    told = tmp_path / "r.json"
    flags = ("--num_samples", "2", "--seed", "4", "--preview_grid", str(preview), "--report", str(told))
    assert sample(COMMANDS[0], files, out, *flags) == 0
    info = probe(out)
    assert (info.width, info.height, info.num_frames, info.fps) == (2 * 48, 32, 5, 16.0)
    denoiser = Denoiser(dit().requires_grad_(False), Precision.preset("fp32"))
    recipe = WholeVideoRecipe("rcm_few_step", sigma_max=80.0, steps=4)
    cond = Condition(text_of(files, PROMPT)).expand(2)
    latents = whole_latents(denoiser, cond, recipe, shape=(2, 16, 2, 4, 6), generator=torch.Generator().manual_seed(4))
    assert close_to_file(tiny_codec().decode(latents), out)
    assert Image.open(preview).size[0] > 5 * 40
    record = json.loads(told.read_text())
    assert record["random_weights"] is False and "watermark" not in record
    assert [round(1000 * t, 2) for t in record["times"]] == [987.65, 933.78, 852.9, 608.98, 0.0]
    assert (record["tokens"], record["latent_shape"], record["peak_memory_gib"], record["ranks"]) == (12, [2, 16, 2, 4, 6], None, 1)
    assert {"load", "text", "network", "decode", "write", "total"} <= set(record["seconds"])
    assert len(record["steps"]) == 4 and record["steps"][0]["expert"] == "dit"
    said = capsys.readouterr().out
    assert "2 x 5 frames of 32x48" in said and "12 tokens" in said
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("step")] == [f"step {k}/4" for k in (1, 2, 3, 4)]
    assert "seconds: " in said and f"wrote {out}" in said


@pytest.mark.parametrize(("sampler", "solver"), [("Euler", "euler"), ("UniPC", "unipc")])
def test_many_step_text_to_video(files, tmp_path, sampler, solver):
    out = tmp_path / "a.mp4"
    flags = ("--num_steps", "3", "--sampler", sampler, "--num_samples", "1", "--negative_prompt", "a cat", "--guidance_scale", "2")
    assert sample(COMMANDS[1], files, out, *flags) == 0
    denoiser = Denoiser(dit().requires_grad_(False), Precision.preset("fp32"))
    recipe = WholeVideoRecipe("ode", sigma_max=5000, steps=3, shift=5.0, guidance=2.0, solver=solver)
    guided = Guided(denoiser, Condition(text_of(files, "a cat")), 2.0)
    options = {"shape": (1, 16, 2, 4, 6), "generator": torch.Generator().manual_seed(0)}
    latents = whole_latents(guided, Condition(text_of(files, PROMPT)), recipe, **options)
    assert close_to_file(tiny_codec().decode(latents), out)


@pytest.mark.slow
def test_guidance_0_is_none_as_everywhere(files, tmp_path):
    """Not the negative prompt alone, which the formula would give."""
    for scale in ("0", "1", "8"):
        assert sample(COMMANDS[1], files, tmp_path / f"{scale}.mp4", "--num_steps", "2", "--guidance_scale", scale) == 0
    none, one, more = ((tmp_path / f"{scale}.mp4").read_bytes() for scale in ("0", "1", "8"))
    assert none == one != more


def test_few_step_image_to_video(files, tmp_path):
    out = tmp_path / "a.mp4"
    assert sample(COMMANDS[2], files, out, "--num_steps", "2", "--boundary", "0.95") == 0
    channels = image_channels(tiny_codec(), fit_image(read_image(files.folder / "first.png"), FrameSize(32, 48)), num_frames=5)
    cond = Condition(text_of(files, PROMPT), concat=channels)
    high, low = (Denoiser(dit(in_dim=36, seed=seed).requires_grad_(False), Precision.preset("fp32")) for seed in (1, 2))

    class Two(Denoiser):
        def velocity(self, x, t, cond, layout, *, cache=None):
            return (high if t[0, 0] >= 0.95 else low).velocity(x, t, cond, layout)

    recipe = WholeVideoRecipe("rcm_few_step", sigma_max=200.0, steps=2)
    options = {"shape": (1, 16, 2, 4, 6), "generator": torch.Generator().manual_seed(0)}
    latents = whole_latents(Two(high.net, high.precision), cond, recipe, **options)
    assert close_to_file(tiny_codec().decode(latents), out)


def test_image_to_video_flags(files, tmp_path):
    sde = report(COMMANDS[2], files, tmp_path)
    assert (sde["recipe"]["solver"], sde["recipe"]["sigma_max"]) == ("consistency", 200.0)
    assert [step["expert"] for step in sde["steps"]] == ["high_noise_model"] * 2 + ["low_noise_model"] * 2
    stochastic = (tmp_path / "a.mp4").read_bytes()
    ode = report(COMMANDS[2], files, tmp_path, "--ode")
    assert ode["recipe"]["solver"] == "euler"
    assert (tmp_path / "a.mp4").read_bytes() != stochastic
    many = report(COMMANDS[3], files, tmp_path, "--num_steps", "4", "--num_samples", "1", "--timestep_shift", "3", "--guidance_scale", "1")
    assert (many["recipe"]["shift"], many["recipe"]["guidance"], many["recipe"]["solver"]) == (3.0, 1.0, "unipc")
    assert [round(1000 * step["t"], 1) for step in many["steps"][:2]] == [999.8, 899.8]
    assert [step["expert"] for step in many["steps"]] == ["high_noise_model"] + ["low_noise_model"] * 3


def test_same_bytes_for_the_same_seed_under_every_memory_policy(files, tmp_path):
    names = [("none", "--offload", "none"), ("idle",), ("low", "--low_memory"), ("other", "--seed", "9")]
    made = {}
    for name, *flags in names:
        assert sample(COMMANDS[2], files, tmp_path / f"{name}.mp4", *flags) == 0
        made[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert made["none"] == made["idle"] == made["low"]
    assert made["other"] != made["idle"]


@pytest.mark.parametrize(("flags", "rests"), [((), "free"), (("--warmup_iters", "1"), "cpu"), (("--offload", "none"), "keep")])
def test_the_finished_expert_waits_on_the_host_only_if_it_is_needed_again(files, tmp_path, monkeypatch, flags, rests):
    asked = []
    rest = Resident.rest
    monkeypatch.setattr(Resident, "rest", lambda self, idle: asked.append(idle) or rest(self, idle))
    assert sample(COMMANDS[2], files, tmp_path / "a.mp4", *flags) == 0
    assert rests in asked and not {"free", "cpu"} & set(asked) - {rests}


def test_a_text_cache_replaces_the_encoder(files, tmp_path, monkeypatch):
    cache = ("--text_cache", str(tmp_path / "cache"))
    assert sample(COMMANDS[0], files, tmp_path / "a.mp4", *cache) == 0

    def refuse(*_, **__):
        raise AssertionError("the text encoder was read although every prompt is cached")

    monkeypatch.setattr("rcm.encoders.umt5.load_umt5", refuse)
    assert sample(COMMANDS[0], files, tmp_path / "b.mp4", *cache) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_prompt_that_is_too_long_says_what_was_cut(files, tmp_path):
    from loguru import logger

    heard: list[str] = []
    sink = logger.add(heard.append, level="WARNING")
    try:
        assert sample(COMMANDS[0], files, tmp_path / "a.mp4", prompt="red " * 520 + "cat") == 0
    finally:
        logger.remove(sink)
    assert "longer than 512 tokens; left out: 'red red red red red red red red red cat'" in "".join(heard)


@pytest.mark.slow
def test_precisions(files, tmp_path, monkeypatch):
    made, settings = {}, {}
    real = wan_models.share_tokens

    def watched(denoiser, **options):
        settings[name] = (denoiser.net.fused, denoiser.precision.compute, denoiser.precision.time)
        return real(denoiser, **options)

    monkeypatch.setattr(wan_models, "share_tokens", watched)
    for name in ("fast", "exact", "bf16_fp32_time", "fp32"):
        assert sample(COMMANDS[0], files, tmp_path / "a.mp4", "--precision", name) == 0
        made[name] = read_mp4(tmp_path / "a.mp4")
    assert torch.equal(made["fast"], made["exact"]), "without CUDA there are no fused kernels"
    assert not torch.equal(made["fast"], made["bf16_fp32_time"]), "988 is not 987.654"
    assert (made["fast"] - made["fp32"]).abs().mean() < 0.2
    assert settings == {
        "fast": ("auto", torch.bfloat16, torch.bfloat16),
        "exact": ("off", torch.bfloat16, torch.bfloat16),
        "bf16_fp32_time": ("auto", torch.bfloat16, torch.float32),
        "fp32": ("off", torch.float32, torch.float32),
    }


@pytest.mark.slow
def test_compiling_is_asked_for_by_name(files, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(wan_models, "parallelize", lambda net, **options: asked.append(options["compile"]) or net)
    assert sample(COMMANDS[0], files, tmp_path / "a.mp4") == 0
    assert asked == []
    assert sample(COMMANDS[0], files, tmp_path / "a.mp4", "--compile") == 0
    assert asked == [True]
    monkeypatch.setattr(wan_models, "num_ranks", lambda: 2)
    assert sample(COMMANDS[0], files, tmp_path / "a.mp4", "--compile") == 2
    assert "--compile works on one GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_low_rank_updates_are_merged(files, tmp_path, capsys, monkeypatch):
    """The same video as from a file in which they are merged by hand; one given twice is refused
    before anything is loaded.
    """
    down, up = (
        torch.randn(2, 256, generator=torch.Generator().manual_seed(1)),
        torch.randn(256, 2, generator=torch.Generator().manual_seed(2)),
    )
    name = "blocks.0.self_attn.o"
    update = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    torch.save(update, tmp_path / "lora.pt")
    net = dit()
    with torch.no_grad():
        net.get_submodule(name).weight += 0.5 * up @ down
    torch.save(original_layout(net), tmp_path / "merged.pth")
    for out, flags in (("a", ("--lora", f"{tmp_path / 'lora.pt'}=0.5")), ("b", ("--dit_path", str(tmp_path / "merged.pth"))), ("c", ())):
        assert sample(COMMANDS[0], files, tmp_path / f"{out}.mp4", *flags) == 0
    merged, by_hand, without = (read_mp4(tmp_path / f"{name}.mp4") for name in "abc")
    assert (merged - by_hand).abs().max() < 0.05
    assert (merged - without).abs().mean() > 0.02
    monkeypatch.setattr(wan_models, "load_wan", None)
    twice = (f"{tmp_path / 'lora.pt'}=0.5", str(tmp_path / "lora.pt"))
    assert sample(COMMANDS[0], files, tmp_path / "d.mp4", "--lora", twice[0], "--lora", twice[1]) == 2
    assert "which is part of the network already" in capsys.readouterr().err


@pytest.mark.slow
def test_live_weights_where_a_file_has_both(files, tmp_path):
    both = {f"net_ema.{name}": tensor for name, tensor in original_layout(dit()).items()}
    both |= {f"net.{name}": tensor for name, tensor in original_layout(dit(seed=7)).items()}
    torch.save(both, tmp_path / "both.pt")
    torch.save(original_layout(dit(seed=7)), tmp_path / "live.pth")
    given = (("ema", "both.pt", "ema"), ("live", "both.pt", "live"), ("alone", "live.pth", "ema"))
    for out, name, weights in given:
        assert sample(COMMANDS[0], files, tmp_path / f"{out}.mp4", "--dit_path", str(tmp_path / name), "--weights", weights) == 0
    ema, live, alone = ((tmp_path / f"{out}.mp4").read_bytes() for out, *_ in given)
    assert live == alone and live != ema


def test_tiles_are_asked_for_in_pixels(files, tmp_path, monkeypatch):
    asked = []
    real = wan_models.WanVAECodec.from_file

    def watched(*given, **options):
        asked.append(options["tile"])
        return real(*given, **options)

    monkeypatch.setattr(wan_models.WanVAECodec, "from_file", watched)
    for flags in ((), ("--vae_tile", "64")):
        assert sample(COMMANDS[0], files, tmp_path / "a.mp4", "--size", "96x64", *flags) == 0
    assert asked == [None, 8]


@pytest.mark.slow
def test_warm_up_runs_are_not_counted(files, tmp_path):
    record = report(COMMANDS[0], files, tmp_path, "--warmup_iters", "1", "--num_steps", "1")
    assert len(record["steps"]) == 1 and "load" not in record["seconds"]


def test_random_weights_need_no_files_and_say_so(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rcm.inference.wan_models.preset", lambda name: dit().config)
    monkeypatch.chdir(tmp_path)
    main = import_module(f"rcm.inference.{COMMANDS[0]}").main
    flags = ["--random_weights", "--device", "cpu", "--size", "32x48", "--num_frames", "1", "--report", "x.json"]
    assert main(flags) == 0
    record = json.loads(Path("x.json").read_text())
    assert record["random_weights"] is True and record["watermark"].startswith("RANDOM WEIGHTS")
    assert capsys.readouterr().out.count("RANDOM WEIGHTS") == 1
    assert probe("outputs/generated_video.mp4").num_frames == 1


def _on_ranks(files: WanFiles, out: str) -> int:
    expect_a_tiny_vae(pytest.MonkeyPatch())
    return sample(COMMANDS[3], files, Path(out), "--num_steps", "2", "--num_samples", "1", "--boundary", "0.9")


def _without_tokenizer(files: WanFiles, out: str) -> int:
    return sample(COMMANDS[0], files, Path(out), "--size", "32x64", "--tokenizer_path", "gone")


@pytest.mark.dist
def test_a_refusal_of_the_first_rank_ends_the_others_too(files, tmp_path):
    assert run_ranks(2, _without_tokenizer, files, str(tmp_path / "a.mp4"), tmp_path=tmp_path) == [2, 2]


@pytest.mark.dist
def test_two_ranks_write_what_one_writes(files, tmp_path):
    assert sample(COMMANDS[3], files, tmp_path / "one.mp4", "--num_steps", "2", "--num_samples", "1") == 0
    assert run_ranks(2, _on_ranks, files, str(tmp_path / "two.mp4"), tmp_path=tmp_path) == [0, 0]
    assert (read_mp4(tmp_path / "one.mp4") - read_mp4(tmp_path / "two.mp4")).abs().max() < 0.05
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["one.mp4", "two.mp4"]
