"""A path is enough: checkpoints open by themselves, generate what their network generates, and
refuse what contradicts them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.layout import TokenLayout
from rcm.pipelines.first_block import first_latents, read_first_frames
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.streaming import collected, stream_video
from rcm.pipelines.text_to_video import whole_latents
from rcm.pipelines.video_io import VideoError, write_mp4
from rcm.pipelines.weight_files import open_weights
from rcm.train.export import export
from tests.support.tiny_checkpoint import (
    CODEC,
    FEW_STEP,
    LATENT_SHAPE,
    MANY_STEP,
    PROMPT,
    STUDENT,
    TEACHER,
    TEXT,
    describe_world,
    world_net,
    write_checkpoint,
)

PROMPTS = [PROMPT, "a blue square moving up"]
SHAPE = (2, *LATENT_SHAPE)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(job):
    return open_checkpoint(job, weights="reg")


def in_memory(net=None) -> Denoiser:
    return Denoiser(net or world_net(), Precision.preset("fp32")).eval_params()


def test_a_path_alone_generates_the_video_of_the_network_in_memory(model, job):
    cond, options = Condition(TEXT.encode(PROMPTS)), {"shape": SHAPE, "generator": torch.Generator().manual_seed(5)}
    expected, _ = collected(stream_video(in_memory(), CODEC, cond, STUDENT, **options))
    for path in (job, job / "checkpoints" / "iter_000000007", job / "checkpoints" / "iter_000000007" / "model"):
        video, report = open_checkpoint(path, weights="reg").generate(PROMPTS, seed=5)
        assert torch.equal(video, expected)
    assert report.num_frames == 11 and len(report.chunk_seconds) == 2
    assert report.chunk_seconds == sorted(report.chunk_seconds)
    assert not torch.equal(model.generate(PROMPTS, seed=6)[0], expected)
    assert not any(p.requires_grad for p in model.denoiser.net.parameters())


def test_averaged_weights_are_the_default(job, model):
    averaged = open_checkpoint(job)
    for (name, mine), theirs in zip(averaged.denoiser.net.named_parameters(), model.denoiser.net.parameters(), strict=True):
        assert torch.equal(mine, 1.01 * theirs), name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_files_open_like_the_folder(job, tmp_path, suffix):
    file = export(job, tmp_path / f"student{suffix}", weights="reg", dtype=torch.float32)
    opened = open_checkpoint(file)
    assert torch.equal(opened.generate([PROMPT])[0], open_checkpoint(job, weights="reg").generate([PROMPT])[0])
    Path(f"{file}.json").unlink()
    if suffix == ".safetensors":
        assert open_checkpoint(file).recipe == STUDENT
    else:
        with pytest.raises(CheckpointError, match="does not describe itself"):
            open_checkpoint(file)


@pytest.mark.parametrize("recipe", [MANY_STEP, STUDENT], ids=["whole", "causal"])
def test_what_stays_in_memory_is_an_option(tmp_path, recipe):
    """The network leaves before a whole video is decoded, and is read again for the next; a stream
    holds it. The videos are the same.
    """
    write_checkpoint(tmp_path, recipe)
    plain, low = (open_checkpoint(tmp_path, weights="reg", memory=name) for name in ("none", "low"))
    first, again = (low.generate([PROMPT], seed=2)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, plain.generate([PROMPT], seed=2)[0])
    assert plain.network.is_loaded and low.network.is_loaded == (recipe is STUDENT)
    with pytest.raises(ConfigError, match="choose --offload from none, idle, low"):
        open_checkpoint(tmp_path, memory="some")


def test_guidance_runs_the_negative_prompt_only_above_one(tmp_path):
    net = write_checkpoint(tmp_path, TEACHER)
    model = open_checkpoint(tmp_path, weights="reg")
    cond, negative = Condition(TEXT.encode([PROMPT])), Condition(TEXT.encode([""]))
    for scale in (2.0, 1.0):
        denoiser = Guided(in_memory(net), negative, scale) if scale > 1 else in_memory(net)
        options = {"shape": (1, *LATENT_SHAPE), "generator": torch.Generator().manual_seed(0)}
        expected, _ = collected(stream_video(denoiser, CODEC, cond, TEACHER, **options))
        given = None if scale == TEACHER.guidance else scale
        torch.testing.assert_close(model.generate([PROMPT], guidance=given)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [MANY_STEP, FEW_STEP], ids=["many", "few"])
def test_bidirectional_checkpoints_sample_whole_videos(tmp_path, recipe):
    net = write_checkpoint(tmp_path, recipe)
    model = open_checkpoint(tmp_path, weights="reg")
    assert (model.recipe, model.sampler) == (None, recipe)
    (chunk,) = model.stream([PROMPT], seed=2, guidance=1.0)
    expected = whole_latents(
        in_memory(net), Condition(TEXT.encode([PROMPT])), recipe, shape=(1, *LATENT_SHAPE), generator=torch.Generator().manual_seed(2)
    )
    assert torch.equal(chunk.latents, expected)
    assert torch.equal(chunk.frames, CODEC.decode(expected))
    if recipe.guidance > 1:
        (guided,) = model.stream([PROMPT], seed=2)
        assert (guided.latents - expected).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="cannot continue given first frames"):
        model.stream([PROMPT], prefix=torch.zeros(1, 24, 3, 4, 4))


def test_whole_video_few_step_sampling_by_hand(tmp_path):
    """Start noise scaled to the first time, jump to x0, renoise with the same generator
    (docs/reference/sampling.md#few-steps).
    """
    net = in_memory(write_checkpoint(tmp_path, FEW_STEP))
    cond, generator = Condition(TEXT.encode([PROMPT])), torch.Generator().manual_seed(4)
    layout = TokenLayout.bidirectional(6, grid=(2, 2))
    first, middle, last = FEW_STEP.times()
    assert (last, first > middle) == (0.0, True)
    shape = (1, *LATENT_SHAPE)
    with torch.no_grad():
        x = torch.randn(shape, generator=generator).double() * first
        x0 = x - first * net.velocity(x, torch.full((1, 1), first, dtype=torch.float64), cond, layout)
        x = (1 - middle) * x0 + middle * torch.randn(shape, generator=generator).double()
        x0 = x - middle * net.velocity(x, torch.full((1, 1), middle, dtype=torch.float64), cond, layout)
    got = whole_latents(net, cond, FEW_STEP, shape=shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(got, x0.float(), rtol=0, atol=1e-6)


def test_a_sampler_that_contradicts_the_checkpoint_is_refused_unless_told(model):
    other = replace(STUDENT, pattern="c1-1")
    with pytest.raises(ConfigError, match=r"pattern: the checkpoint was trained for 'c3-3'.*--ignore_recipe"):
        model.stream([PROMPT], recipe=other)
    chunks = list(model.stream([PROMPT], recipe=other, ignore_recipe=True))
    assert len(chunks) == 6
    with pytest.raises(ConfigError, match=r"trained for c3-3 'few_step' sampling, the sampler asks for whole-video"):
        model.stream([PROMPT], recipe=FEW_STEP)
    assert len(list(model.stream([PROMPT], recipe=FEW_STEP, ignore_recipe=True))) == 1
    assert len(list(model.stream([PROMPT], recipe=STUDENT.with_steps(1)))) == 2


def test_lengths_are_pixel_frames_that_codec_and_pattern_divide(model):
    video, _ = model.generate([PROMPT], num_frames=17)
    assert video.shape[2] == 17
    for wrong, fits in ((12, "11 or 17"), (13, "11 or 17"), (2, "5"), (0, "5")):
        with pytest.raises(ConfigError, match=rf"num_frames={wrong} .*choose num_frames={fits}$"):
            model.stream([PROMPT], num_frames=wrong)
    assert sum(chunk.frames.shape[2] for chunk in model.stream([PROMPT], num_frames=71)) == 71, "longer than the network's 16 positions"


def test_prefix_is_checked_before_anything_runs(model):
    given = torch.zeros(1, 24, 3, 4, 4)
    assert [c.block for c in model.stream(PROMPTS, prefix=given)] == [0, 1]
    with pytest.raises(ConfigError, match="do not end on a block"):
        model.stream([PROMPT], prefix=given[:, :, :2])
    with pytest.raises(ConfigError, match=r"must be \[1 or 2, 24, k, 4, 4\]"):
        model.stream(PROMPTS, prefix=given[:, :, :, :3])
    with pytest.raises(ConfigError, match="must decrease strictly from 0.5.*; raise sigma_max above 15, or change mid_t"):
        model.stream([PROMPT], recipe=replace(STUDENT, sigma_max=1.0))
    for nothing in ([], PROMPT):
        with pytest.raises(ConfigError, match="prompts must be a list"):
            model.stream(nothing)


def test_first_frames_of_a_clip_become_the_prefix(tmp_path, model):
    clip = torch.rand(3, 9, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    path = write_mp4(tmp_path / "clip.mp4", clip, fps=8)
    pixels = read_first_frames(path, num_frames=5, height=8, width=8)
    given = first_latents(path, codec=CODEC, num_latents=3, height=8, width=8)
    assert given.shape == (1, 24, 3, 4, 4)
    torch.testing.assert_close(CODEC.decode(given), pixels, rtol=0, atol=1e-5)
    frames = torch.cat([c.frames for c in model.stream([PROMPT], prefix=given)], dim=2)
    torch.testing.assert_close(frames[:, :, :5], pixels, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"has 9 frame\(s\), 13 are needed"):
        first_latents(path, codec=CODEC, num_latents=7, height=8, width=8)


def test_an_image_is_one_latent_frame(tmp_path):
    path = tmp_path / "half.png"
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    image.save(path)
    latents = first_latents(path, codec=CODEC, num_latents=1, height=8, width=16)
    pixels = CODEC.decode(latents)
    assert pixels.shape == (1, 3, 1, 8, 16)
    torch.testing.assert_close(pixels[0, :, 0, 4, 2], torch.tensor([1.0, -1.0, -1.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels[0, :, 0, 4, 13], torch.tensor([-1.0, -1.0, 1.0]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="an image is one latent frame"):
        first_latents(path, codec=CODEC, num_latents=3, height=8, width=16)
    path.write_bytes(b"not an image")
    with pytest.raises(VideoError, match="cannot decode"):
        first_latents(path, codec=CODEC, num_latents=1, height=8, width=16)


def altered(job: Path, tmp_path: Path, change) -> Path:
    """The checkpoint as a file whose tensors went through `change`."""
    file = export(job, tmp_path / "changed.pt", weights="reg", dtype=torch.float32)
    state = torch.load(file)
    change(state)
    torch.save(state, file)
    return file


def test_missing_extra_and_misshapen_tensors_are_named(job, tmp_path):
    def spoil(state):
        del state["net.blocks.1.ffn.0.weight"]
        state["net.blocks.9.ffn.0.weight"] = torch.zeros(1)
        state["net.head.head.bias"] = torch.zeros(3)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(altered(job, tmp_path, spoil))
    for name in ("changed.pt", "blocks.1.ffn.0.weight", "blocks.9.ffn.0.weight", "head.head.bias has shape (3,)"):
        assert name in str(caught.value)


def test_weights_of_another_network_are_named(job, tmp_path):
    file = export(job, tmp_path / "a.pt", weights="reg", dtype=torch.float32)
    described = json.loads(Path(f"{file}.json").read_text())
    described["network"]["ffn_dim"] = 64
    Path(f"{file}.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"does not fit this network.*ffn.0.weight has shape \(48, 32\), expected \(64, 32\)"):
        open_checkpoint(file)


def test_unreadable_checkpoints_say_so(job, tmp_path):
    with pytest.raises(ConfigError, match=r"path of the checkpoint is empty \(--ckpt\)"):
        open_checkpoint("")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a DCP checkpoint, nor the folder of a job.*an iter_. folder, or an exported file"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown weights 'best'"):
        open_checkpoint(job, weights="best")
    with pytest.raises(CheckpointError, match=r"no net_fake_score\.\* weights"):
        open_checkpoint(job, weights="fake_score")
    file = export(job, tmp_path / "cut.pt", weights="reg")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        open_weights(file)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds a list"):
        open_weights(file)


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        ({"codec": {"name": "pixels"}}, ConfigError, "the codec 'pixels'; this version decodes 'toy' and 'wan_vae'"),
        ({"text": {"name": "t9"}}, ConfigError, "embeddings of 't9'; this version encodes with 'toy' and 'umt5'"),
        ({"codec": {"name": "wan_vae", "path": "gone.pth"}}, CheckpointError, "there is no gone.pth; say where .* with --vae_path"),
        ({"text": {"name": "umt5", "path": "gone.pth"}}, CheckpointError, "gone.pth"),
        ({"codec": None}, CheckpointError, "which codec"),
        ({"text": {"name": "toy", "length": 3}}, CheckpointError, "does not know"),
        ({"latent_shape": [12, 6, 4, 4]}, CheckpointError, "network.out_dim is 24, extra.latent_shape.0. is 12"),
        ({"latent_shape": [24, 6]}, CheckpointError, r"latent_shape is list .24, 6., expected a list of 4 values"),
        ({"recipe": None}, CheckpointError, "neither a recipe nor a sampler"),
        ({"precision": {"compute": "float3"}}, CheckpointError, "precision.compute is 'float3', expected one of"),
    ],
)
def test_incomplete_or_later_descriptions_are_refused(job, tmp_path, extra, error, words):
    file = export(job, tmp_path / "a.pt", weights="reg")
    describe_world(world_net(), STUDENT, **extra).write(Path(f"{file}.json"))
    with pytest.raises(error, match=words):
        open_checkpoint(file)


def test_precision_is_that_of_the_run_unless_asked(job, tmp_path):
    file = export(job, tmp_path / "a.pt", weights="reg")
    describe_world(world_net(), STUDENT, precision={"compute": "bfloat16", "time": "float32"}).write(Path(f"{file}.json"))
    policy = open_checkpoint(file).denoiser.precision
    assert (policy.params, policy.compute, policy.reduce, policy.time) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    assert open_checkpoint(file, precision="fp64").denoiser.net.head.head.weight.dtype == torch.float64


def test_umt5_leaves_before_sampling_and_is_not_read_again(model, monkeypatch):
    """The 11 GB are freed once the prompts are encoded; a second stream of the same prompts finds
    its condition.
    """
    width, rows = model.denoiser.net.config.text_dim, model.denoiser.net.config.text_len
    text = UMT5TextEncoder.random(text_len=rows, text_dim=width, dtype=torch.float32)
    log: list[str] = []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: log.append(f"encode {len(prompts)}") or encode(prompts))
    monkeypatch.setattr(text, "unload", lambda: log.append("unload"))
    wan = replace(model, text=text, _kept={})
    first = [chunk.frames for chunk in wan.stream([PROMPT, PROMPT], seed=1, guidance=2.0)]
    assert log == ["encode 2", "encode 1", "unload"]  # prompts, the negative prompt
    again = [chunk.frames for chunk in wan.stream([PROMPT, PROMPT], seed=1, guidance=2.0)]
    assert log == ["encode 2", "encode 1", "unload", "unload"] and all(map(torch.equal, first, again))
    wan.condition(["other words"])
    assert log[-1] == "encode 1"
