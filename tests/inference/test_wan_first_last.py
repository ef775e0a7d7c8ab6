"""Wan2.1's image-to-video networks from flags to an mp4: one image, or a first and a last one, each
with CLIP's tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from rcm.core.dtypes import Precision
from rcm.encoders.clip_vision import ClipVision
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT_FLF2V, NEGATIVE_PROMPT_I2V
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.inference.wan2pt1_i2v_diffusion_infer import main
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.wan.model import WanDiT
from rcm.pipelines.image_condition import fit_image, image_channels, read_image
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents
from rcm.pipelines.video_io import read_mp4
from rcm.pipelines.wan_sizes import FrameSize
from tests.encoders.test_clip_vision import random_clip
from tests.faults.case import Fault, each
from tests.support.tiny_nets import tiny_net
from tests.support.tiny_wan_files import PROMPT, SIZES, WanFiles, original_layout, tiny_codec, write_wan_files

TOKENS = 17
"""Of one image through the tiny CLIP."""


def network(*, images: int) -> WanDiT:
    sizes = {**SIZES, "image_branch": True, "image_dim": 160, "image_positions": 2 * TOKENS if images == 2 else 0}
    return tiny_net(seed=4 + images, dtype=torch.float32, in_dim=36, **sizes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    made = write_wan_files(tmp_path_factory.mktemp("checkpoints"))
    generator = torch.Generator().manual_seed(8)
    for name, size in (("first", (20, 40, 3)), ("last", (33, 21, 3))):
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(made.folder / f"{name}.png")
    for images in (1, 2):
        torch.save(original_layout(network(images=images)), made.folder / f"wan{images}.pth")
    torch.save(random_clip(), made.folder / "clip.pth")
    return made


def words(files: WanFiles, *, images: int, network: int | str | None = None) -> list[str]:
    """A command with so many images, for the network that reads as many, or another."""
    folder, net = files.folder, images if network is None else network
    flags = [*files.shared_flags, "--clip_path", str(folder / "clip.pth"), "--prompt", PROMPT, "--num_steps", "2"]
    flags += ["--dit_path", str(folder / f"wan{net}.pth") if isinstance(net, int) else net, "--image_path", str(folder / "first.png")]
    return [*flags, *(["--last_image_path", str(folder / "last.png")] if images == 2 else [])]


@pytest.mark.slow
@pytest.mark.parametrize(("images", "shift", "negative"), [(1, 5.0, NEGATIVE_PROMPT_I2V), (2, 16.0, NEGATIVE_PROMPT_FLF2V)])
def test_the_video_is_that_of_its_condition(files, tmp_path, images, shift, negative) -> None:
    """Against the network, the sampler and the encoders called one by one, with the defaults of the
    original.
    """
    assert main([*words(files, images=images), "--save_path", str(tmp_path / "a.mp4")]) == 0
    pixels = [read_image(files.folder / f"{name}.png") for name in ("first", "last")[:images]]
    clip, text = ClipVision.from_file(files.folder / "clip.pth", dtype=torch.float32), UMT5TextEncoder.from_files(files.text)
    tokens = torch.cat([clip.encode(image.permute(2, 0, 1)[None].float() / 127.5 - 1) for image in pixels], dim=1)
    assert tokens.shape[1] == images * TOKENS
    first, *last = (fit_image(image, FrameSize(32, 48)) for image in pixels)
    channels = image_channels(tiny_codec(), first, num_frames=5, last=last[0] if last else None)
    cond, other = (Condition(text.encode([words]).float(), concat=channels, image=tokens) for words in (PROMPT, negative))
    denoiser = Denoiser(network(images=images).requires_grad_(False), Precision.preset("fp32"))
    recipe = WholeVideoRecipe("ode", sigma_max=5000, steps=2, shift=shift, guidance=5.0, solver="unipc")
    options = {"shape": (1, 16, 2, 4, 6), "generator": torch.Generator().manual_seed(0)}
    expected = tiny_codec().decode(whole_latents(Guided(denoiser, other, 5.0), cond, recipe, **options))[0].clamp(-1, 1)
    assert (read_mp4(tmp_path / "a.mp4").mean(dim=0) - expected.mean(dim=0)).abs().mean() < 0.08


def test_both_images_decide(files, tmp_path) -> None:
    for name, more in (("a", []), ("b", ["--last_image_path", str(files.folder / "first.png")])):
        assert main([*words(files, images=2), *more, "--save_path", str(tmp_path / f"{name}.mp4")]) == 0
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "b.mp4").read_bytes()


def test_random_weights_need_no_file(tmp_path, monkeypatch) -> None:
    from rcm.nets.wan import config

    tiny = replace(config.PRESETS["tiny"], in_dim=36, image_branch=True, image_positions=514, text_len=512)
    monkeypatch.setitem(config.PRESETS, "flf2v-14B", tiny)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    flags = ["--random_weights", "--model_size", "flf2v-14B", "--device", "cpu", "--size", "32x48", "--num_frames", "5", "--num_steps", "1"]
    images = ["--image_path", str(tmp_path / "a.png"), "--last_image_path", str(tmp_path / "b.png"), "--save_path", str(tmp_path / "a.mp4")]
    assert main([*flags, *images]) == 0


def refused(name: str, refusal: str, *more: str, images: int = 1, network: int | str | None = None) -> Fault:
    def argv(folder: Path) -> list[object]:
        files = write_wan_files(folder)
        for each_name in ("first", "last"):
            Image.new("RGB", (24, 24), "red").save(folder / f"{each_name}.png")
        for count in (1, 2):
            torch.save(original_layout(globals()["network"](images=count)), folder / f"wan{count}.pth")
        torch.save(random_clip(), folder / "clip.pth")
        chosen = str(files.high) if network == "A14B" else network
        asked = [word.replace("FOLDER", str(folder)) for word in more]
        return [*words(files, images=images, network=chosen), "--save_path", folder / "a.mp4", *asked]

    def nothing_written(folder: Path) -> None:
        assert not (folder / "a.mp4").exists()

    return Fault(name, kind="first and last frames", refusal=refusal, main=main, argv=argv, after=nothing_written)


FAULTS = [
    refused("two images for I2V", r"tokens of 1 images, this command gives 2: .*without --last_image_path", images=2, network=1),
    refused("one image for FLF2V", r"tokens of 2 images, this command gives 1: .*with --last_image_path", network=2),
    refused("an expert of Wan2.2", r"tokens of 0 images.*wan2pt2_i2v_diffusion_infer", network="A14B"),
    refused("no CLIP", r"--clip_path .*none.pth does not exist; fetch models_clip", "--clip_path", "FOLDER/none.pth"),
    refused("another CLIP", r"wan1.pth is not the CLIP file", "--clip_path", "FOLDER/wan1.pth"),
    refused("no last image", r"no image file at .*none.png", "--last_image_path", "FOLDER/none.png", images=2),
    refused("no picture", r"cannot decode .*wan1.pth", "--last_image_path", "FOLDER/wan1.pth", images=2),
    refused("one frame, before files", r"need at least 5 frames, got 1; change --num_frames", "--num_frames", "1", images=2, network=""),
    refused("no network", r"--dit_path is not given; fetch the folder of huggingface.co/Wan-AI/Wan2.1-I2V", network=""),
]


@each(FAULTS)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
