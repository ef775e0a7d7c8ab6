"""A folder written in the diffusers form is opened by diffusers itself, and one that diffusers
saved is opened here.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from rcm.core.dtypes import Precision
from rcm.nets.wan.convert import from_wan
from rcm.pipelines import load_wan, open_weights, save_network
from rcm.pipelines.wan_files import config_of, network_weights
from rcm.train.describe import Description
from tests.support.tiny_nets import tiny_config, tiny_net

diffusers = pytest.importorskip("diffusers")

CASES = {"t2v": {"image_dim": 1280}, "i2v-2.1": {"image_branch": True, "in_dim": 8}, "A14B": {"in_dim": 8, "image_dim": 1280}}


@pytest.mark.parametrize("case", CASES)
def test_folders_go_both_ways(tmp_path, case):
    config, net = tiny_config(text_len=512, **CASES[case]), tiny_net(dtype=torch.float32, text_len=512, **CASES[case])
    torch.save(from_wan(net.state_dict(), form="wan"), tmp_path / "a.pt")
    network = network_weights(open_weights(tmp_path / "a.pt"))
    assert config_of(network, expect=config) == config
    about = Description(stage="imported", network=asdict(config))
    folder = save_network(tmp_path / "ours", network, form="diffusers", config=config, description=about, max_shard_bytes=100_000)
    # what from_pretrained does, which refuses to run without accelerate
    theirs = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config(folder))
    shards = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    theirs.load_state_dict({key: load_file(folder / name)[key] for key, name in shards.items()}, strict=True)
    assert theirs.config.added_kv_proj_dim == (config.dim if config.image_branch else None)
    theirs.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="100KB")
    back = load_wan(tmp_path / "theirs", precision=Precision.preset("fp32")).net
    assert back.config == config
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())
