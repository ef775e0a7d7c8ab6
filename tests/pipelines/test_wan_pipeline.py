"""The Wan pipeline with a small network, random text and a codec without weights: what it samples,
which model is where when.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError, NonFinite
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided, VelocityModel
from rcm.nets.layout import TokenLayout
from rcm.pipelines.experts import Expert
from rcm.pipelines.image_condition import fit_image, image_channels
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import POLICIES, MemoryPolicy, Resident
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents
from rcm.pipelines.wan_pipeline import GeneratedVideo, VideoRequest, WanPipeline
from rcm.pipelines.wan_ranks import check_ranks, fitting_ranks, share_tokens
from rcm.pipelines.wan_sizes import FrameSize
from tests.support.dist import run_ranks
from tests.support.stand_in_codec import StandInCodec
from tests.support.tiny_nets import tiny_net

CPU = torch.device("cpu")
FEW = WholeVideoRecipe("rcm_few_step", sigma_max=80.0, steps=4)
MANY = WholeVideoRecipe("ode", sigma_max=5000, steps=6, shift=5.0, guidance=3.0, solver="unipc")
REQUEST = VideoRequest("a red square", FEW, FrameSize(32, 48), num_frames=9, num_samples=2, seed=3)
IMAGE = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)


class Recorder(VelocityModel):
    """A velocity field of whole videos that notes the times and conditions it is asked for."""

    def __init__(self, factor: float) -> None:
        self.factor, self.times, self.conditions = factor, [], []

    def velocity(self, x, t, cond, layout, *, cache=None):
        assert layout == TokenLayout.bidirectional(x.shape[2], grid=self.token_grid(*x.shape[3:]))
        self.times.append(t[0, 0].item())
        self.conditions.append(cond)
        return self.factor * x + cond.text.mean().to(x)

    def token_grid(self, height, width):
        return height // 2, width // 2

    def prepare(self, cond):
        return replace(cond, text=cond.text + 0)  # a copy of its own, as a network's keys are


def text_encoder() -> UMT5TextEncoder:
    return UMT5TextEncoder.random(text_len=8, text_dim=24, dtype=torch.float32)


def pipeline(*networks: tuple[float, VelocityModel], memory: MemoryPolicy = POLICIES["idle"], **options) -> WanPipeline:
    """Experts in charge down to the given times; `resident` counts how often each was loaded."""
    clock = PartClock(CPU)

    def resident(model) -> Resident:
        found = Resident(lambda: loads.append(model) or model, move=lambda *_: None, device=CPU, clock=clock)
        found.loads = loads = []
        return found

    experts = [Expert(f"expert {i}", resident(model), down_to) for i, (down_to, model) in enumerate(networks)]
    codec = options.pop("codec", None) or StandInCodec()
    return WanPipeline(
        text=options.pop("text", None) or text_encoder(),
        experts=experts,
        codec=Resident(lambda: codec, move=lambda c, d: c.to(d), device=CPU, clock=clock),
        device=CPU,
        clock=clock,
        memory=memory,
        **options,
    )


def wan_denoiser(**changes) -> Denoiser:
    net = tiny_net(dtype=torch.float32, in_dim=changes.pop("in_dim", 16), out_dim=16, **changes)
    return Denoiser(net.requires_grad_(False), Precision.preset("fp32"))


def test_the_few_step_video_is_the_whole_video_of_its_prompt():
    denoiser = wan_denoiser()
    made = pipeline((0.0, denoiser)).generate(REQUEST)
    cond = Condition(text_encoder().encode([REQUEST.prompt])).expand(2)
    expected = whole_latents(denoiser, cond, FEW, shape=(2, 16, 3, 4, 6), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made.latents, expected)
    torch.testing.assert_close(made.frames, StandInCodec().decode(made.latents))
    assert tuple(made.frames.shape) == (2, 3, 9, 32, 48)
    assert [round(1000 * step.t, 1) for step in made.steps] == [987.7, 933.8, 852.9, 609.0]


def test_guidance_uses_the_negative_prompt():
    denoiser = wan_denoiser()
    text = text_encoder()
    request = replace(REQUEST, recipe=MANY, negative_prompt="blurred", num_samples=1)
    made = pipeline((0.0, denoiser)).generate(request)
    guided = Guided(denoiser, Condition(text.encode(["blurred"])), 3.0)
    options = {"shape": (1, 16, 3, 4, 6), "generator": torch.Generator().manual_seed(3)}
    expected = whole_latents(guided, Condition(text.encode([request.prompt])), MANY, **options)
    torch.testing.assert_close(made.latents, expected)
    stock = pipeline((0.0, denoiser)).generate(replace(request, negative_prompt=None))
    assert not torch.equal(stock.latents, made.latents)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (0.0, 1), (0.5, 1), (4.0, 2)])
def test_a_guidance_scale_of_one_or_less_is_none_and_above_it_follows_the_formula(scale, passes):
    """As in every command: the release skips the negative pass there."""
    recorder = Recorder(0.1)
    cond, negative = Condition(torch.full((1, 2, 3), 2.0)), Condition(torch.full((1, 2, 3), -1.0))
    recipe = WholeVideoRecipe("ode", sigma_max=80, steps=1, guidance=scale)
    options = {"shape": (1, 16, 1, 4, 4), "generator": torch.Generator().manual_seed(1)}
    made, _ = pipeline((0.0, recorder)).sample(cond, negative if scale > 1 else None, recipe, **options)
    noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    velocity = 0.1 * noise + (-1 + max(scale, 1.0) * 3)
    torch.testing.assert_close(made.double(), noise - 80 / 81 * velocity, atol=1e-6, rtol=1e-6)
    assert len(recorder.times) == passes
    whole = Recorder(0.1)
    pipeline((0.0, whole)).generate(replace(REQUEST, recipe=recipe, negative_prompt="blurred"))
    assert len(whole.times) == passes


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_take_over_once_at_the_boundary(policy):
    high, low = Recorder(0.1), Recorder(0.2)
    made = pipeline((0.9, high), (0.0, low), memory=POLICIES[policy])
    recipe = WholeVideoRecipe("rcm_few_step", sigma_max=200.0, steps=4)
    result = made.generate(replace(REQUEST, recipe=recipe))
    assert [round(1000 * t) for t in high.times] == [995, 934]
    assert [round(1000 * t) for t in low.times] == [853, 609]
    assert [step.expert for step in result.steps] == ["expert 0", "expert 0", "expert 1", "expert 1"]
    assert [len(expert.network.loads) for expert in made.experts] == [1, 1]
    freed = policy == "low"
    assert [expert.network.is_loaded for expert in made.experts] == [not freed, not freed]
    again = made.generate(replace(REQUEST, recipe=recipe))
    assert torch.equal(again.latents, result.latents), "a second video of the same pipeline, whatever was dropped meanwhile"
    assert [len(expert.network.loads) for expert in made.experts] == ([2, 2] if freed else [1, 1])


def test_an_idle_expert_is_dropped_before_the_next_one_is_read():
    """At no time are both in memory under "low", nor the keys that the first made of the prompts:
    the point of the policy.
    """
    alive: list[str] = []
    clock = PartClock(CPU)

    class Counted(Recorder):
        def __init__(self, name: str) -> None:
            super().__init__(0.1)
            self.name = name
            alive.append(name)

        def __del__(self) -> None:
            alive.remove(self.name)

        def prepare(self, cond):
            prepared = super().prepare(cond)
            keys.append(weakref.ref(prepared.text))
            return prepared

    seen = []
    keys: list[weakref.ref] = []

    def load(name: str) -> Counted:
        seen.append([*alive, *(key() for key in keys if key() is not None)])
        return Counted(name)

    experts = [
        Expert(name, Resident(lambda name=name: load(name), move=lambda *_: None, device=CPU, clock=clock), down_to)
        for name, down_to in (("high", 0.9), ("low", 0.0))
    ]
    codec = Resident(StandInCodec, move=lambda c, d: c.to(d), device=CPU, clock=clock)
    built = WanPipeline(text=text_encoder(), experts=experts, codec=codec, device=CPU, clock=clock, memory=POLICIES["low"])
    built.generate(replace(REQUEST, num_samples=1))
    assert seen == [[], []]
    assert alive == []


def test_boundaries_must_descend_to_zero():
    for bounds in ((0.5,), (0.2, 0.9, 0.0), (1.0, 0.0), (0.9, 0.9, 0.0)):
        with pytest.raises(ConfigError, match="--boundary"):
            pipeline(*((bound, Recorder(0.1)) for bound in bounds))


def test_an_image_becomes_extra_channels_of_both_branches():
    denoiser = wan_denoiser(in_dim=36)
    request = replace(REQUEST, recipe=MANY, image=IMAGE, num_samples=1, negative_prompt="blurred")
    made = pipeline((0.0, denoiser)).generate(request)
    channels = image_channels(StandInCodec(), fit_image(IMAGE, request.size), num_frames=9)
    text = text_encoder()
    guided = Guided(denoiser, Condition(text.encode(["blurred"])), 3.0)
    cond = Condition(text.encode([request.prompt]), concat=channels)
    options = {"shape": (1, 16, 3, 4, 6), "generator": torch.Generator().manual_seed(3)}
    torch.testing.assert_close(made.latents, whole_latents(guided, cond, MANY, **options))


def test_a_network_with_an_image_branch_is_given_clip_tokens():
    class Clip:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            assert tuple(images.shape) == (1, 3, 40, 50)
            return images.mean(dim=(2, 3)).repeat(1, 20).reshape(1, 3, 20).repeat(1, 1, 2)

    denoiser = wan_denoiser(in_dim=36, image_branch=True)
    request = replace(REQUEST, image=IMAGE, num_samples=2)
    made = pipeline((0.0, denoiser), clip=Clip()).generate(request)
    channels = image_channels(StandInCodec(), fit_image(IMAGE, request.size), num_frames=9)
    tokens = Clip().encode(IMAGE.permute(2, 0, 1)[None] / 127.5 - 1)
    cond = Condition(text_encoder().encode([request.prompt]), concat=channels, image=tokens).expand(2)
    expected = whole_latents(denoiser, cond, FEW, shape=(2, 16, 3, 4, 6), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made.latents, expected)


@pytest.mark.parametrize(
    ("in_dim", "branch", "images", "told"),
    [
        (16, False, (IMAGE, None), "reads 16 channels, 36 are given"),
        (36, False, (None, None), "reads 36 channels, 16 are given"),
        (36, True, (IMAGE, None), "image branch"),
        (36, False, (IMAGE, IMAGE), "made for a first frame alone, both are given"),
        (36, False, (None, IMAGE), "last frame is given without a first"),
    ],
)
def test_a_network_of_another_task_is_refused_with_its_name(in_dim, branch, images, told):
    made = pipeline((0.0, wan_denoiser(in_dim=in_dim, image_branch=branch)))
    with pytest.raises(ConfigError, match=told):
        made.generate(replace(REQUEST, image=images[0], last_image=images[1]))


def test_seeds():
    made = pipeline((0.0, Recorder(0.1)))
    first, again, other = (made.generate(replace(REQUEST, seed=seed)).latents for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "samples of one seed differ"


def test_text_and_codec_leave_as_the_policy_says():
    class Text:
        negative_prompt = ""

        def __init__(self) -> None:
            self.left: list[str] = []

        def encode(self, prompts):
            return torch.zeros(len(prompts), 8, 24)

        def unload(self) -> None:
            self.left.append("free")

        def to(self, device: str) -> None:
            self.left.append(device)

    for name, expected in (("none", []), ("idle", ["free"]), ("low", ["free"])):
        text = Text()
        made = pipeline((0.0, Recorder(0.1)), memory=POLICIES[name], text=text)
        made.generate(REQUEST)
        assert text.left == expected
    text = Text()
    pipeline((0.0, Recorder(0.1)), memory=MemoryPolicy(text="cpu"), text=text).generate(REQUEST)
    assert text.left == ["cpu"]


def test_nan_is_told_before_decoding():
    made = pipeline((0.0, Recorder(float("nan"))))
    with pytest.raises(NonFinite, match="NaN"):
        made.generate(REQUEST)
    assert "decode" not in made.clock.seconds


@pytest.mark.parametrize(
    ("change", "told"),
    [({"num_frames": 10}, "num_frames=9 or 13"), ({"num_samples": 0}, "--num_samples 0"), ({"size": FrameSize(40, 48)}, "40x48")],
)
def test_impossible_requests(change, told):
    with pytest.raises(ConfigError, match=told):
        pipeline((0.0, Recorder(0.1))).generate(replace(REQUEST, **change))


def test_steps_are_told_as_they_are_made():
    told = []
    made = pipeline((0.0, Recorder(0.1))).generate(REQUEST, on_step=lambda step, total: told.append((step.index, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert isinstance(made, GeneratedVideo) and all(step.seconds >= 0 for step in made.steps)


def _on_ranks() -> tuple[torch.Tensor, bool, int]:
    denoiser = share_tokens(wan_denoiser(in_dim=36), tokens_per_frame=6)
    widths = []
    denoiser.net.blocks[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[2]))
    text = text_encoder() if torch.distributed.get_rank() == 0 else None
    request = replace(REQUEST, recipe=MANY, image=IMAGE, negative_prompt="blurred")
    made = pipeline((0.0, denoiser), text=text or object()).generate(request)
    return made.latents, made.frames is None, max(widths)


@pytest.mark.dist
def test_two_ranks_make_the_video_of_one(tmp_path):
    request = replace(REQUEST, recipe=MANY, image=IMAGE, negative_prompt="blurred")
    alone = pipeline((0.0, wan_denoiser(in_dim=36))).generate(request)
    (first, no_frames, tokens), (second, also_none, _) = run_ranks(2, _on_ranks, tmp_path=tmp_path)
    torch.testing.assert_close(first, alone.latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(first, second)
    assert (no_frames, also_none) == (False, True), "rank 0 decodes"
    assert tokens == 3, "each rank computes half of the 6 tokens of a frame"


def test_numbers_of_ranks():
    assert fitting_ranks(num_heads=12, tokens_per_frame=1560) == (1, 2, 3, 4, 6, 12)
    assert fitting_ranks(num_heads=40, tokens_per_frame=3600) == (1, 2, 4, 5, 8, 10, 20, 40)
    with pytest.raises(ConfigError, match="choose --nproc_per_node from 1, 2, 3, 4, 6, 12"):
        check_ranks(8, num_heads=12, tokens_per_frame=1560)
    check_ranks(4, num_heads=12, tokens_per_frame=1560)
