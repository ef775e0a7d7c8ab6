"""Every container that a loader meets ends in the same tensors, and whatever does not fit is
named.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.wan import convert
from rcm.nets.wan.config import preset
from rcm.nets.wan.model import WanDiT
from tests.support.tiny_nets import tiny_config, tiny_net


def equal(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def state() -> dict:
    return dict(tiny_net().state_dict())


def test_containers_and_prefixes(state):
    five_d = convert.from_wan(state, form="wan")
    assert five_d["patch_embedding.weight"].shape == (64, 4, 1, 2, 2)
    wrapped = {
        key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.").replace("head.head", "head._orig_mod.head"): v
        for key, v in five_d.items()
    }
    other = {key: value + 1 for key, value in state.items()}
    for file in (
        state,
        five_d,
        wrapped,
        convert.from_wan(state, form="rcm"),
        convert.from_wan(state, form="diffusers"),
        prefixed(state, "net_ema."),
        prefixed(five_d, "model.diffusion_model."),
        {"generator": prefixed(five_d, "model."), "critic": prefixed(other, "model."), "step": 7},
        {"generator": prefixed(other, "model."), "generator_ema": prefixed(five_d, "model._fsdp_wrapped_module.")},
        {"state_dict": prefixed(state, "module.")},
        {**prefixed(state, "net_ema."), **prefixed(other, "net."), **prefixed(other, "net_fake_score.")},
        {**prefixed(state, "net."), "net.head._extra_state": b"x"},
    ):
        assert equal(convert.to_wan(file), state)


@pytest.mark.parametrize("form", sorted(convert.FORMS))
def test_every_form_is_a_bijection(state, form):
    """One key each, and back to the same bits."""
    there = convert.from_wan(state, form=form)
    assert len(there) == len(state) and all(key.startswith(convert.FORMS[form].prefix) for key in there)
    assert equal(convert.to_wan(there), state)
    assert equal(
        convert.to_wan({"generator_ema": there, "critic": convert.from_wan({k: v + 1 for k, v in state.items()}, form=form)}), state
    )


def test_networks_are_found_by_their_prefix(state):
    keys = [lead + key for lead in ("net.", "net_ema.", "net_fake_score.", "teacher.") for key in state]
    assert convert.network_prefixes(keys) == {"net.": "live", "net_ema.": "ema", "net_fake_score.": "fake_score", "teacher.": "teacher"}
    assert convert.network_prefixes(convert.from_wan(state, form="diffusers")) == {"": "live"}
    assert convert.network_prefixes(["critic.model._fsdp_wrapped_module.blocks.0._orig_mod.modulation"]) == {"critic.model.": "fake_score"}
    assert convert.network_prefixes(["decoder.conv1.weight", "optimizer.state.patch_embedding.weight.exp_avg"]) == {}


def test_absent_copies_are_named(state):
    with pytest.raises(CheckpointError, match=r"holds no net.\* \(generator\) \(it has net_ema.\*\)"):
        convert.to_wan(prefixed(state, "net_ema."), weights="live")
    with pytest.raises(CheckpointError, match=r"\(it has teacher.\*\); save it without that prefix"):
        convert.to_wan(prefixed(state, "teacher."))
    with pytest.raises(CheckpointError, match=r"no net_fake_score.\* weights .*it has one network without prefix.*choose other weights"):
        convert.to_wan(state, weights="fake_score")
    with pytest.raises(CheckpointError, match="several networks could be the live weights"):
        convert.to_wan({"model": state, "generator": state})
    with pytest.raises(ConfigError, match="unknown weights 'best'"):
        convert.to_wan(state, weights="best")


def test_choice_between_copies(state):
    other = {key: value + 1 for key, value in state.items()}
    flat = {**prefixed(state, "net_ema."), **prefixed(other, "net."), **prefixed(state, "net_fake_score.")}
    assert equal(convert.to_wan(flat, weights="live"), other)
    assert equal(convert.to_wan(flat, prefix="net_fake_score."), state)
    nested = {"generator": other, "generator_ema": state}
    assert equal(convert.to_wan(nested, weights="live"), other)
    with pytest.raises(CheckpointError, match="no key starts with 'critic.'.*net_ema."):
        convert.to_wan(flat, prefix="critic.")
    with pytest.raises(CheckpointError, match="'head.head.bias' occurs twice"):
        convert.to_wan({**state, "head._orig_mod.head.bias": state["head.head.bias"]})


def test_patch_weight_is_flattened_channel_first(state):
    weight = torch.arange(64 * 16, dtype=torch.float64).reshape(64, 4, 1, 2, 2)
    got = convert.to_wan({**state, "patch_embedding.weight": weight})["patch_embedding.weight"]
    assert got[3, 2 * 4 + 1 * 2 + 0] == weight[3, 2, 0, 1, 0]


def test_norms_swap_in_diffusers_names(state):
    """diffusers numbers the norms in order of use: its norm2 is our norm3."""
    theirs = convert.from_wan(state, form="diffusers")
    assert torch.equal(theirs["blocks.1.norm2.weight"], state["blocks.1.norm3.weight"]) and "blocks.1.norm3.weight" not in theirs
    assert torch.equal(theirs["scale_shift_table"], state["head.modulation"])
    assert torch.equal(theirs["blocks.1.attn2.to_out.0.bias"], state["blocks.1.cross_attn.o.bias"])
    with pytest.raises(CheckpointError, match="'condition_embedder.audio.weight' has no Wan counterpart"):
        convert.to_wan({**theirs, "condition_embedder.audio.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["1.3B", "14B", "i2v-14B", "A14B"])
def test_configuration_from_shapes(name):
    with torch.device("meta"):
        net = WanDiT(preset(name))
    assert convert.detect_config(convert.to_wan(convert.from_wan(net.state_dict(), form="diffusers"))) == preset(name)


def test_configuration_of_something_else(state):
    config = tiny_config()
    found = convert.detect_config(state, head_dim=16)
    assert (found.dim, found.num_heads, found.ffn_dim, found.freq_dim, found.text_dim) == (64, 4, 96, config.freq_dim, config.text_dim)
    with pytest.raises(CheckpointError, match="not a Wan network: it lacks 'patch_embedding.weight'"):
        convert.detect_config({"conv.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not a Wan network: it lacks 'blocks.0.ffn.0.weight'"):
        convert.detect_config({"patch_embedding.weight": torch.zeros(128, 16)})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading(state, device):
    with torch.device(device):
        net = WanDiT(tiny_config())
    net = net.double()
    convert.load(net, convert.from_wan(state, form="diffusers"))
    assert equal(dict(net.state_dict()), state)


def test_loading_refuses_all_or_nothing(state):
    net = WanDiT(tiny_config()).double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    missing = {key: value for key, value in state.items() if key != "blocks.1.norm3.bias"}
    with pytest.raises(CheckpointError, match=r"missing 1 key\(s\): blocks.1.norm3.bias; choose the net preset"):
        convert.load(net, missing)
    with pytest.raises(CheckpointError, match=r"does not fit the network of \d+ tensors: 1 unexpected key\(s\): blocks.2.modulation"):
        convert.load(net, {**state, "blocks.2.modulation": torch.zeros(1, 6, 64)})
    with pytest.raises(CheckpointError, match=r"another shape: head.head.bias has shape \(3,\), expected \(16,\)"):
        convert.load(net, {**state, "head.head.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="unexpected.*: .* and .* more"):
        convert.load(net, tiny_net(num_layers=3).state_dict())
    with pytest.raises(CheckpointError, match="not tensors: step"):
        convert.load(net, {**state, "step": 3})
    assert equal(dict(net.state_dict()), before)
