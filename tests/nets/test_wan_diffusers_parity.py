"""The network against diffusers' WanTransformer3DModel with the same random weights, converted both
ways (float32).
"""

from __future__ import annotations

import pytest
import torch

from rcm.nets.condition import Condition
from rcm.nets.layout import TokenLayout
from rcm.nets.wan import convert
from rcm.storage.state_dicts import shapes_of
from tests.support.tiny_nets import tiny_net

diffusers = pytest.importorskip("diffusers")

CASES = {
    "t2v": {"num_heads": 2, "dim": 48, "in_dim": 16, "out_dim": 16},
    "head-128": {"num_heads": 1, "dim": 128, "in_dim": 4},
    "i2v-2.1": {"image_branch": True, "in_dim": 36, "out_dim": 16},
    "flf2v-2.1": {"image_branch": True, "in_dim": 36, "out_dim": 16, "image_positions": 514},
    "A14B": {"in_dim": 36, "out_dim": 16},
}


def peer(config) -> torch.nn.Module:
    extra = {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim} if config.image_branch else {}
    if config.image_positions:
        extra["pos_embed_seq_len"] = config.image_positions
    return diffusers.WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        **extra,
    ).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_agree(case):
    # the peer takes all but the last 512 tokens for an image
    net = tiny_net(dtype=torch.float32, freq_dim=64, text_len=512, **CASES[case])
    config = net.config
    theirs = peer(config)
    converted = convert.from_wan(net.state_dict(), form="diffusers")
    assert shapes_of(converted) == shapes_of(theirs.state_dict())
    theirs.load_state_dict(converted)

    extra = config.in_dim - config.out_dim
    x, text = torch.randn(2, config.out_dim, 3, 6, 8), torch.randn(2, 512, config.text_dim)
    concat = torch.randn(2, extra, 3, 6, 8) if extra else None
    image = torch.randn(2, config.image_positions or 257, config.image_dim) if config.image_branch else None
    timestep = torch.tensor([937.5, 41.0])
    # the peer takes the two images as a batch
    given = image.unflatten(1, (2, 257)).flatten(0, 1) if config.image_positions else image
    image_argument = {"encoder_hidden_states_image": given} if image is not None else {}
    packed = x if concat is None else torch.cat([x, concat], dim=1)
    expected = theirs(packed, timestep, text, **image_argument).sample
    got = net(x, timestep[:, None], Condition(text, concat, image), TokenLayout.bidirectional(3, grid=(3, 4)))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_diffusers_names(case):
    state = tiny_net(**CASES[case]).state_dict()
    back = convert.to_wan(convert.from_wan(state, form="diffusers"))
    assert shapes_of(back) == shapes_of(state)
    assert all(torch.equal(state[key], back[key]) for key in state)
