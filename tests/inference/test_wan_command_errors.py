"""What the Wan commands refuse: one sentence that names the thing and the flag, exit status 2, no
file left behind, no work begun.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.inference import wan_command, wan_models
from rcm.inference.wan_command import wan_main
from tests.support.tiny_wan_files import WanFiles, dit, original_layout, write_wan_files

RCM, DIFFUSION, I2V_RCM, I2V_DIFFUSION = (
    "wan2pt1_t2v_rcm_infer",
    "wan2pt1_t2v_diffusion_infer",
    "wan2pt2_i2v_rcm_infer",
    "wan2pt2_i2v_diffusion_infer",
)
SHARED = {
    "aspect_ratio": "16:9",
    "seed": 0,
    "save_path": "outputs/generated_video.mp4",
    "vae_path": "assets/checkpoints/Wan2.1_VAE.pth",
    "text_encoder_path": "assets/checkpoints/models_t5_umt5-xxl-enc-bf16.pth",
    "fps": 16.0,
    "device": "cuda",
    "weights": "ema",
}
MANY = {
    "num_steps": 50,
    "sigma_max": 5000,
    "sampler": "UniPC",
    "guidance_scale": 5.0,
    "timestep_shift": 5.0,
    "negative_prompt": NEGATIVE_PROMPT,
}
EXPERTS = {"boundary": 0.9, "adaptive_resolution": False, "model_size": "A14B", "resolution": "720p", "num_frames": 81}
DEFAULTS = {
    RCM: {
        "model_size": "1.3B",
        "num_samples": 1,
        "num_steps": 4,
        "sigma_max": 80.0,
        "dit_path": "",
        "num_frames": 77,
        "resolution": "480p",
    },
    DIFFUSION: {
        **MANY,
        "model_size": "14B",
        "num_samples": 4,
        "dit_path": "assets/checkpoints/Wan2.1-T2V-14B.pth",
        "num_frames": 81,
        "resolution": "480p",
    },
    I2V_RCM: {
        **EXPERTS,
        "num_samples": 1,
        "num_steps": 4,
        "sigma_max": 200.0,
        "ode": False,
        "high_noise_model_path": "assets/checkpoints/Wan2.2-I2V-A14B-high-rCM-merged.pth",
        "low_noise_model_path": "assets/checkpoints/Wan2.2-I2V-A14B-low-rCM-merged.pth",
    },
    I2V_DIFFUSION: {
        **EXPERTS,
        **MANY,
        "num_samples": 4,
        "high_noise_model_path": "assets/checkpoints/Wan2.2-I2V-A14B-high.pth",
        "low_noise_model_path": "assets/checkpoints/Wan2.2-I2V-A14B-low.pth",
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> WanFiles:
    made = write_wan_files(tmp_path_factory.mktemp("checkpoints"))
    Image.new("RGB", (40, 20), (200, 30, 30)).save(made.folder / "first.png")
    (made.folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (made.folder / "cut.pt").write_bytes(made.dit.read_bytes()[: made.dit.stat().st_size // 2])
    torch.save(original_layout(dit(in_dim=36)), made.folder / "image_network.pth")
    return made


def run(command: str, *flags: str) -> int:
    return import_module(f"rcm.inference.{command}").main(list(flags))


def good(command: str, files: WanFiles) -> list[str]:
    """Flags with which a command works."""
    if command in (RCM, DIFFUSION):
        return [*files.shared_flags, "--prompt", "a cat", "--dit_path", str(files.dit)]
    experts = ["--high_noise_model_path", str(files.high), "--low_noise_model_path", str(files.low)]
    return [*files.shared_flags, "--prompt", "a cat", "--image_path", str(files.folder / "first.png"), *experts]


@pytest.mark.parametrize("command", DEFAULTS)
def test_defaults_are_the_published_ones(command, monkeypatch):
    seen = {}

    def capture(parser, argv, plan):
        seen.update(vars(parser.parse_args(argv)))
        return 0

    module = import_module(f"rcm.inference.{command}")
    monkeypatch.setattr(module, "wan_main", capture)
    required = ["--image_path", "i.png", "--prompt", "p"] if command.startswith("wan2pt2") else []
    assert module.main(required) == 0
    expected = {**SHARED, **DEFAULTS[command]}
    assert {name: seen[name] for name in expected} == expected
    assert {type(seen["sigma_max"])} == {int if "diffusion" in command else float}


def test_the_prompt_is_required_where_it_was(capsys):
    for flags in (["--image_path", "i.png"], ["--prompt", "p"]):
        with pytest.raises(SystemExit) as end:
            run(I2V_RCM, *flags)
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--prompt" in said and "--image_path" in said
    with pytest.raises(SystemExit):
        run(I2V_DIFFUSION, "--prompt", "p")
    assert "--image_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        (RCM, ("--num_steps", "5"), "invalid choice"),
        (RCM, ("--model_size", "5B"), "1.3B"),
        (I2V_RCM, ("--model_size", "14B"), "A14B"),
        (DIFFUSION, ("--sampler", "DDIM"), "UniPC"),
        (DIFFUSION, ("--sigma_max", "80.5"), "invalid int value"),
        (RCM, ("--guidance_scale", "5"), "unrecognized arguments"),
        (DIFFUSION, ("--ode",), "unrecognized arguments"),
        (RCM, ("--num_step", "4"), "unrecognized arguments"),
        (RCM, ("--offload", "some"), "none"),
    ],
)
def test_the_parser_refuses(command, flags, told, capsys, tmp_path):
    required = ["--image_path", "i.png", "--prompt", "p"] if command.startswith("wan2pt2") else []
    with pytest.raises(SystemExit) as end:
        run(command, *required, *flags)
    assert end.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        (RCM, ("--dit_path", ""), "--dit_path is not given; fetch rCM_Wan2.1_T2V_1.3B_480p.pt"),
        (RCM, ("--dit_path", "gone.pt"), "--dit_path gone.pt does not exist; fetch"),
        (DIFFUSION, ("--dit_path", "gone.pt"), "Wan2.1-T2V-14B.pth, huggingface.co/worstcoder/Wan"),
        (I2V_RCM, ("--high_noise_model_path", "gone.pt"), "Wan2.2-I2V-A14B-high-rCM-merged.pth"),
        (I2V_DIFFUSION, ("--low_noise_model_path", "gone.pt"), "low_noise_model of"),
        (RCM, ("--vae_path", "gone.pth"), "--vae_path gone.pth does not exist; fetch Wan2.1_VAE.pth"),
        (RCM, ("--text_encoder_path", "gone.pth"), "models_t5_umt5-xxl-enc-bf16.pth (11.4 GB) of huggingface.co/Wan-AI"),
        (RCM, ("--tokenizer_path", "gone"), "no umT5 tokenizer"),
        (RCM, ("--model_size", "1.3B"), "--dit_path with --model_size 1.3B"),
        (I2V_RCM, ("--model_size", "A14B"), "--high_noise_model_path with --model_size A14B"),
        (RCM, ("--dit_path", "FOLDER/cut.pt"), "cut.pt"),
        (RCM, ("--dit_path", "FOLDER/first.png"), "first.png"),
        (RCM, ("--vae_path", "FOLDER/cut.pt"), "cut.pt"),
        (RCM, ("--dit_path", "FOLDER/image_network.pth"), "made for another task"),
        (RCM, ("--lora", "gone.safetensors"), "gone.safetensors"),
        (RCM, ("--lora", "some.safetensors=much"), "'much' after = is no number"),
        (RCM, ("--lora", "FOLDER/Wan2.1_VAE.pth"), "LoRA"),
        (RCM, ("--num_frames", "80"), "choose num_frames=77 or 81"),
        (RCM, ("--size", "30x48"), "multiples of 16"),
        (
            RCM,
            ("--num_samples", "171"),
            "frames of 32x8208 (HxW) are too large for an mp4, 8192 a side at most; lower --num_samples or --size",
        ),
        (RCM, ("--prompt", " "), "--allow_empty_prompt"),
        (RCM, ("--vae_tile", "30"), "--vae_tile 30 must be at least 64"),
        (I2V_RCM, ("--boundary", "900"), "--boundary 900 must be at most 0.999"),
        (I2V_RCM, ("--image_path", "gone.png"), "no image file at gone.png"),
        (I2V_RCM, ("--image_path", "FOLDER/broken.png"), "cannot decode"),
        (
            I2V_RCM,
            ("--image_path", "FOLDER/first.png", "--preview_grid", "FOLDER/first.png"),
            "first.png is a file that --image_path reads",
        ),
        (I2V_RCM, ("--adaptive_resolution",), "--size and --adaptive_resolution"),
        (RCM, ("--save_path", "a.avi"), "a.avi must end in .mp4"),
        (RCM, ("--save_path", "FOLDER/first.png/a.mp4"), "first.png is no folder"),
        (RCM, ("--preview_grid", "a.jpg"), "a.jpg must end in .png"),
        (RCM, ("--report", "a.txt"), "a.txt must end in .json"),
        (RCM, ("--device", "meta"), "--device meta has no memory; choose cuda or cpu"),
        (RCM, ("--attention", "magi"), "magi"),
        (RCM, ("--random_weights",), "name a size"),
    ],
)
def test_one_sentence_and_exit_status_2(files, tmp_path, capsys, monkeypatch, command, flags, told):
    monkeypatch.chdir(tmp_path)
    flags = tuple(flag.replace("FOLDER", str(files.folder)) for flag in flags)
    assert run(command, *good(command, files), "--save_path", "out.mp4", *flags) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0]
    assert "Traceback" not in said.err
    assert "step 1/" not in said.out, "found before any sampling"
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(("flags", "told"), [(("--resolution", "360p"), "480p, 720p"), (("--aspect_ratio", "2:1"), "16:9, 9:16")])
def test_the_table_lists_its_choices(files, tmp_path, capsys, flags, told):
    given = good(RCM, files)
    at = given.index("--size")
    del given[at : at + 2]
    assert run(RCM, *given, *flags, "--save_path", str(tmp_path / "a.mp4")) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu_names_the_flag_and_the_cost(capsys):
    assert run(RCM) == 2
    said = capsys.readouterr().err
    assert "--device cpu" in said and "283 TFLOP" in said


def test_out_of_memory_names_the_knobs(files, tmp_path, capsys, monkeypatch):
    def full(*_, clock, **__):
        with clock.part("decode"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand so on")

    monkeypatch.setattr(wan_command, "run", full)
    assert run(RCM, *good(RCM, files), "--num_samples", "3", "--save_path", str(tmp_path / "a.mp4")) == 2
    said = capsys.readouterr().err
    for knob in (
        "in the part 'decode'",
        "20.00 GiB",
        "--num_samples 1",
        "--offload low",
        "--vae_tile 256",
        "--resolution",
        "--num_frames",
        "--nproc_per_node",
    ):
        assert knob in said
    assert "and so on" not in said
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(wan_command, "_check_launch", lambda device: None)
    monkeypatch.setattr(wan_command, "_device", lambda name: nullcontext(torch.device("cpu")))
    assert run(RCM, *good(RCM, files), "--save_path", str(tmp_path / "a.mp4")) == 2
    assert "out of memory" in capsys.readouterr().err, "the other ranks may have enough, so whoever has not says so"


def test_other_failures_are_not_dressed_up(files, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(wan_command, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(RCM, *good(RCM, files))


def test_ranks_that_do_not_fit_are_told_before_any_file_is_read(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wan_models, "num_ranks", lambda: 5)
    assert run(RCM, "--device", "cpu", "--save_path", str(tmp_path / "a.mp4")) == 2
    assert "choose --nproc_per_node from 1, 2, 3, 4, 6, 12" in capsys.readouterr().err


def test_launches_that_do_not_fit_the_machine(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(wan_command, "check_device", lambda *_, **__: None)
    assert run(RCM, "--device", "cuda:1") == 2
    assert "write --device cuda" in capsys.readouterr().err
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    assert run(RCM) == 2
    assert "3 ranks on a machine with 2 GPUs" in capsys.readouterr().err
    for name, value in {"WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "2"}.items():
        with monkeypatch.context() as other:
            other.setenv(name, value)
            wan_command._check_launch("cuda")


def test_only_the_first_rank_tells(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run(RCM, "--device", "cpu", "--prompt", "") == 2
    assert capsys.readouterr().err == ""
    assert wan_main is not None


def test_help_of_every_command_as_a_module():
    """In a process of its own, without the packages that only training or tests need."""
    script = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "webdataset", "wandb", "diffusers", "imageio")))
sys.argv = ["x", "--help"]
for command in {list(DEFAULTS)}:
    try:
        runpy.run_module("rcm.inference." + command, run_name="__main__")
    except SystemExit as end:
        print(command, "ended with", end.code)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(wan_command.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for command in DEFAULTS:
        assert f"{command} ended with 0" in done.stdout
    assert done.stdout.count("--random_weights") == 2 * len(DEFAULTS)
