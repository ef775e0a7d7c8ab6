"""Names, counts, numerics and refusals of the Wan network."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.layout import TokenLayout
from rcm.nets.lora import attach
from rcm.nets.wan.config import PRESETS, WanConfig, preset
from rcm.nets.wan.model import WanDiT
from tests.support.tiny_nets import GRID, condition, frame_times, latents, pattern, tiny_config, tiny_net

# docs/reference/wan.md#sizes, #tensors: parameters, tensors
PUBLISHED = {
    "1.3B": (1_418_996_800, 825),
    "14B": (14_288_491_584, 1095),
    "i2v-14B": (16_394_878_784, 1303),
    "A14B": (14_288_901_184, 1095),
}
LAYOUT = TokenLayout.bidirectional(3, grid=GRID)


def published_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original weights, written down from the table of
    docs/reference/wan.md#tensors (patch weight flattened).
    """
    d, f = config.dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, d)}

    def linear(name: str, out: int, inner: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inner), (out,)

    linear("patch_embedding", d, config.in_dim * 4)
    linear("text_embedding.0", d, 4096)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, 256)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    linear("head.head", 64, d)
    if config.image_branch:
        shapes |= {f"img_emb.proj.0.{p}": (1280,) for p in ("weight", "bias")} | {f"img_emb.proj.4.{p}": (d,) for p in ("weight", "bias")}
        linear("img_emb.proj.1", 1280, 1280)
        linear("img_emb.proj.3", d, 1280)
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (d,)
        linear(f"{block}.ffn.0", f, d)
        linear(f"{block}.ffn.2", d, f)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attention}.{name}", d, d)
            shapes[f"{block}.{attention}.norm_q.weight"] = shapes[f"{block}.{attention}.norm_k.weight"] = (d,)
        if config.image_branch:
            linear(f"{block}.cross_attn.k_img", d, d)
            linear(f"{block}.cross_attn.v_img", d, d)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (d,)
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_the_meta_device(name):
    with torch.device("meta"):
        net = WanDiT(preset(name))
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert shapes == published_shapes(preset(name))
    assert (sum(p.numel() for p in net.parameters()), len(shapes)) == PUBLISHED[name]


def test_configurations_refuse_what_does_not_fit():
    with pytest.raises(ConfigError, match="tiny, 1.3B"):
        preset("13B")
    with pytest.raises(ConfigError, match="num_heads=12"):
        replace(PRESETS["1.3B"], dim=1540)
    with pytest.raises(ConfigError, match="head size 4"):
        tiny_config(num_heads=16)
    with pytest.raises(ConfigError, match="patch"):
        tiny_config(patch=(2, 2, 2))
    for wrong in (
        {"num_layers": 0},
        {"ffn_dim": -4},
        {"text_len": 0},
        {"in_dim": 0},
        {"dim": 64.0},
        {"dim": "64"},
        {"patch": [1, 2, 2]},
        {"patch": (1, 0, 2)},
    ):
        with pytest.raises(ConfigError, match=f"net.{next(iter(wrong))}=.* must be a"):
            tiny_config(**wrong)
    with pytest.raises(ConfigError, match="net.eps=-1.0 must be positive"):
        tiny_config(eps=-1.0)
    with pytest.raises(ConfigError, match="latent width"):
        tiny_config().token_grid(4, 5)


@torch.no_grad()
def test_short_text_is_zero_padded_and_the_padding_is_attended_to():
    net = tiny_net()
    x, t, short = latents(3), frame_times(3), condition(net.config, length=5)
    base = net(x, t, short, LAYOUT)
    padded = torch.cat([short.text, short.text.new_zeros(2, net.config.text_len - 5, net.config.text_dim)], dim=1)
    torch.testing.assert_close(net(x, t, Condition(padded), LAYOUT), base, rtol=0, atol=0)
    shorter_net = tiny_net(text_len=5)
    assert (shorter_net(x, t, short, LAYOUT) - base).abs().max() > 1e-3, "the padding rows must count"


@torch.no_grad()
def test_concat_channels_follow_the_frames():
    """Whole-video channels are taken at the frames' positions: in a packed pass by both halves, in
    a chunk by its own frames.
    """
    net, frames = tiny_net(in_dim=6), 4
    structure = {"grid": GRID, "pattern": pattern("c1-1")}
    x, t, extra = latents(2 * frames), frame_times(2 * frames), latents(frames, channels=2, seed=7)
    cond = replace(condition(net.config), concat=extra)
    layout = TokenLayout.teacher_forcing(frames, **structure)
    by_hand = replace(cond, concat=torch.cat([extra, extra], dim=2))
    torch.testing.assert_close(net(x, t, cond, layout), net(x, t, by_hand, layout), rtol=0, atol=0)

    chunk = TokenLayout(GRID, (2,), TokenLayout.bidirectional(1, grid=GRID).mask, (0, 1))
    own = replace(cond, concat=extra[:, :, 2:3])
    torch.testing.assert_close(net(x[:, :, :1], t[:, :1], cond, chunk), net(x[:, :, :1], t[:, :1], own, chunk), rtol=0, atol=0)
    with pytest.raises(ValueError, match="concat has 2 frames"):
        net(x, t, replace(cond, concat=extra[:, :, :2]), layout)
    with pytest.raises(ValueError, match="needs position -1"):
        net(x[:, :, :1], t[:, :1], cond, replace(chunk, frame_index=(-1,)))


@torch.no_grad()
def test_prepared_conditions_change_nothing_but_the_work():
    for changes in ({}, {"image_branch": True}):
        net = tiny_net(**changes)
        x, t, cond = latents(3), frame_times(3), condition(net.config)
        prepared = net.prepare(cond)
        torch.testing.assert_close(net(x, t, prepared, LAYOUT), net(x, t, cond, LAYOUT), rtol=0, atol=0)
        one = net.prepare(condition(net.config, batch=1)).expand(2)
        torch.testing.assert_close(net(x, t, one, LAYOUT), net(x, t, condition(net.config, batch=1).expand(2), LAYOUT), rtol=0, atol=1e-12)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="prepared"):
        net(x, t, prepared, LAYOUT)


def test_refusals_name_what_is_wrong():
    net = tiny_net()
    x, t, cond = latents(3), frame_times(3), condition(net.config)
    with pytest.raises(TypeError, match="fps"):
        net(x, t, cond, LAYOUT, fps=16)
    cases = {
        "in_dim 4": (latents(3, channels=5), t, cond, LAYOUT),
        "x has 2 frames": (latents(2), t, cond, LAYOUT),
        "timestep must be": (x, t[:, 0], cond, LAYOUT),
        "timestep must be floating": (x, t.long(), cond, LAYOUT),
        re.escape("cond.expand(2)"): (x, t, condition(net.config, batch=1), LAYOUT),
        "text must be": (x, t, condition(net.config, length=9), LAYOUT),
        "image tokens are given": (x, t, replace(cond, image=cond.text), LAYOUT),
        "pass cache=": (x[:, :, :1], t[:, :1], cond, TokenLayout.cached_chunk(1, grid=GRID, pattern=pattern("c1-1"), num_frames=2)),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            net(*arguments)


def test_reduced_precision_stays_close_and_keeps_float32_where_promised():
    net, exact = tiny_net(dtype=torch.bfloat16), tiny_net(dtype=torch.bfloat16).double()
    seen = {}
    for name in ("time_embedding", "time_projection", "blocks.1", "head.norm", "head"):
        net.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    x, t, cond = latents(3, dtype=torch.bfloat16), frame_times(3).bfloat16(), condition(net.config, dtype=torch.bfloat16)
    with torch.no_grad():
        got, expected = net(x, t, cond, LAYOUT), exact(x.double(), t, cond.to(dtype=torch.float64), LAYOUT)
    assert seen == {name: torch.bfloat16 if name == "blocks.1" else torch.float32 for name in seen} and len(seen) == 5
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() / expected.abs().max() < 0.04


def test_initialisation_depends_on_the_seed_alone_and_starts_from_zero_output():
    nets = []
    for seed in (0, 0, 1):
        nets.append(WanDiT(tiny_config()))
        nets[-1].init_weights(torch.Generator().manual_seed(seed))
    same, again, other = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(same[name], again[name]) for name in same)
    drawn = [name for name in same if not torch.equal(same[name], other[name])]
    # all matrices and modulations but the head
    assert len(drawn) == sum(p.dim() > 1 for p in same.values()) - 1
    assert torch.count_nonzero(same["head.head.weight"]) == 0
    assert abs(same["blocks.0.ffn.0.weight"].std().item() - (2 / (64 + 96)) ** 0.5) < 0.01
    for name in ("text_embedding.0", "time_embedding.0", "time_projection.1"):
        assert abs(same[f"{name}.weight"].std().item() - 0.02) < 0.002, name
    with torch.no_grad():
        out = nets[0](latents(3, dtype=torch.float32), frame_times(3), condition(tiny_config(), dtype=torch.float32), LAYOUT)
    assert torch.count_nonzero(out) == 0


def test_every_parameter_gets_a_gradient():
    for changes in ({}, {"image_branch": True}):
        net = tiny_net(**changes)
        net(latents(3), frame_times(3), condition(net.config), LAYOUT).square().mean().backward()
        for name, p in net.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


@torch.no_grad()
def test_joined_projections_are_the_three_layers(tmp_path):
    """Values, names and a saved file stay; later loads reach both; what moves, learns or is another
    kind of layer is not joined.
    """
    net = tiny_net()
    before, attention = {name: x.clone() for name, x in net.state_dict().items()}, net.blocks[0].self_attn
    net.requires_grad_(False).join_projections()
    x = torch.randn(2, 3, 5, 64, dtype=torch.float64)

    def apart() -> torch.Tensor:
        return torch.cat([layer(x) for layer in (attention.q, attention.k, attention.v)], dim=-1)

    weight, bias = attention.joined
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), apart(), rtol=0, atol=1e-12)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.testing.assert_close(torch.load(tmp_path / "net.pt"), before, rtol=0, atol=0)
    net.load_state_dict({name: 2 * x for name, x in before.items()})
    torch.testing.assert_close(torch.nn.functional.linear(x, *attention.joined), apart(), rtol=0, atol=1e-12)
    held = attention.joined
    net.join_projections()
    assert attention.joined is held, "graphs that read it go on"
    plain = attention.k
    attach(net, ["self_attn.k"], roles=["student"], rank=2, alpha=2.0)
    assert attention.joined is None, "the adapters' layer has the very weights that were joined"
    attention.k = plain
    assert attention.joined is held
    attention.k.weight.data = attention.k.weight.data.clone()
    assert attention.joined is None
    net.join_projections()
    assert attention.joined is not None and net.float().blocks[0].self_attn.joined is None
    for change in (lambda: net.requires_grad_(True), lambda: setattr(attention, "v", torch.nn.Linear(64, 64))):
        net.requires_grad_(False)
        change()
        net.join_projections()
        assert attention.joined is None
