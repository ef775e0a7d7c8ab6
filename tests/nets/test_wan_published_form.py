"""Full-size networks against the published key lists on the meta device; settings files; files that
are something else.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from rcm.core.errors import CheckpointError
from rcm.nets.wan import convert
from rcm.nets.wan.config import PRESETS, WanConfig
from rcm.nets.wan.foreign import CLIP, TEXT, VAE, foreign
from rcm.nets.wan.model import WanDiT
from rcm.nets.wan.published_config import heads_in, published_settings, with_settings
from rcm.storage.state_dicts import shapes_of
from tests.support.tiny_nets import tiny_config
from tests.support.wan_keys import PUBLISHED, published_tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_shapes_and_counts(name):
    """Every tensor of docs/reference/wan.md#tensors, nothing else, in both directions."""
    shapes, tensors, parameters = PUBLISHED[name]
    assert len(shapes) == tensors and sum(map(math.prod, shapes.values())) == parameters
    with torch.device("meta"):
        net = WanDiT(PRESETS[name], attention="sdpa")
        files = {key: torch.empty(shape) for key, shape in shapes.items()}
    written = convert.from_wan(net.state_dict(), form="wan")
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == shapes
    assert shapes_of(convert.to_wan(files)) == shapes_of(net.state_dict())
    assert convert.detect_config(convert.to_wan(files)) == PRESETS[name]


@pytest.mark.parametrize("form", ["wan", "diffusers"])
def test_settings_round_trip(form):
    config = replace(tiny_config(), eps=1e-5)
    settings = published_settings(config, form=form)
    assert heads_in(settings) == config.num_heads
    found = replace(config, eps=1e-6, text_len=512)
    settled = with_settings(found, settings)
    assert settled.eps == 1e-5 and settled.text_len == (config.text_len if form == "wan" else 512)
    assert published_settings(config, form="rcm") is None and with_settings(found, None) is found and heads_in(None) is None
    with pytest.raises(CheckpointError, match=r"config.json contradicts the tensors.*num_layers 2, the tensors have 3"):
        with_settings(replace(found, num_layers=3), settings)
    with pytest.raises(CheckpointError, match=r"dim 64, the tensors have 128"):
        with_settings(replace(found, dim=128), settings)


def test_settings_are_the_published_ones():
    """Names and values that other loaders read. docs/reference/wan.md#sizes."""
    wan = published_settings(PRESETS["A14B"], form="wan")
    assert wan["model_type"] == "i2v" and (wan["dim"], wan["in_dim"], wan["num_heads"], wan["eps"]) == (5120, 36, 40, 1e-6)
    theirs = published_settings(PRESETS["i2v-14B"], form="diffusers")
    assert (theirs["num_attention_heads"], theirs["attention_head_dim"], theirs["added_kv_proj_dim"]) == (40, 128, 5120)
    assert published_settings(PRESETS["1.3B"], form="wan")["model_type"] == "t2v"
    assert published_settings(PRESETS["A14B"], form="diffusers")["image_dim"] is None


def heads(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}


TINY = published_tensors(dim=64, ffn=64, layers=1, channels=16)
STRANGERS = {
    "TurboDiffusion int8": (heads(TINY | {"blocks.0.ffn.0.int8_weight": (64, 64)}), "quantised .as TurboDiffusion"),
    "TurboDiffusion sparse": (heads(TINY | {"blocks.0.self_attn.local_attn.proj_l.weight": (64, 64)}), "sparse-linear attention"),
    "fp8": (heads(TINY, torch.float8_e4m3fn), "fp8 repack .float8_e4m3fn"),
    "fp8 with scales": (heads({"model.diffusion_model.scaled_fp8": (2,), **TINY}), "fp8 repack with scales"),
    "TI2V-5B": (
        heads({f"generator.model.{k}": s for k, s in published_tensors(dim=3072, ffn=64, layers=1, channels=48, out=48).items()}),
        "TI2V-5B family .*LongLive-2.0",
    ),
    "TI2V-5B, flattened": (heads({"net.patch_embedding.weight": (3072, 192)}), "TI2V-5B"),
    "VACE": (heads(TINY | {"vace_blocks.0.modulation": (1, 6, 64)}), "VACE"),
    "a LoRA": (heads({"base_model.model.blocks.0.ffn.0.lora_A.weight": (4, 64)}), "low-rank update"),
    "the VAE": (heads({"decoder.conv1.weight": (384, 16, 3, 3, 3), "conv1.weight": (32, 32, 1, 1, 1)}), VAE[:12]),
    "the text encoder": (heads({"token_embedding.weight": (256384, 4096)}), TEXT[:12]),
    "CLIP": (heads({"visual.transformer.0.norm1.weight": (1280,)}), CLIP[:12]),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_no_network_of_this_package_is_said(name):
    headers, words = STRANGERS[name]
    assert re.search(words, foreign(headers) or "")


@pytest.mark.parametrize("lead", ["", "net.", "generator_ema.model.", "model.diffusion_model."])
def test_networks_are_not_refused(lead):
    for shapes, _, _ in PUBLISHED.values():
        assert foreign(heads({lead + key: shape for key, shape in shapes.items()})) is None


def test_heads_of_unusual_networks_must_be_said():
    with torch.device("meta"):
        state = WanDiT(WanConfig(dim=96, ffn_dim=32, num_heads=3, num_layers=1), attention="sdpa").state_dict()
    with pytest.raises(CheckpointError, match="width 96 is no multiple of the head size 128"):
        convert.detect_config(state)
    assert convert.detect_config(state, head_dim=32).num_heads == 3
