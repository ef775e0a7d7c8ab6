"""Low-rank updates: names of every trainer end at the right weights, the sum is that of float64,
misfits are named.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import CheckpointError
from rcm.nets.wan.lora import check_targets, is_lora, lora_pairs, merge

Q, FFN = "blocks.1.self_attn.q.weight", "blocks.0.ffn.2.weight"


def factors(lead: str = "", *, q: str = "blocks.1.self_attn.q", ffn: str = "blocks.0.ffn.2", down: str = "lora_A", up: str = "lora_B"):
    """Rank-3 factors of a 6 x 5 and a 6 x 8 weight."""
    draw = torch.Generator().manual_seed(3)
    shapes = {f"{q}.{down}": (3, 5), f"{q}.{up}": (6, 3), f"{ffn}.{down}": (3, 8), f"{ffn}.{up}": (6, 3)}
    return {f"{lead}{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}


NAMINGS = {
    "PEFT": factors("base_model.model."),
    "PEFT with an adapter's name": {k.replace(".weight", ".default.weight"): v for k, v in factors("base_model.model.").items()},
    "LongLive": {**factors("generator_lora.base_model.model."), **factors("critic_lora.base_model.model.")},
    "under a wrapped model": factors("base_model.model.model._fsdp_wrapped_module."),
    "ComfyUI": factors("diffusion_model.", down="lora_down", up="lora_up"),
    "diffusers": factors("transformer.", q="blocks.1.attn1.to_q", ffn="blocks.0.ffn.net.2"),
}


@pytest.mark.parametrize("name", NAMINGS)
def test_every_naming_finds_the_weights(name):
    state = NAMINGS[name]
    pairs = lora_pairs(state)
    assert is_lora(state) and sorted(pairs) == [FFN, Q]
    assert state[pairs[Q].down].shape == (3, 5) and state[pairs[FFN].down].shape == (3, 8)
    if name == "LongLive":
        assert all(key.startswith("generator_lora.") for pair in pairs.values() for key in (pair.down, pair.up))
    check_targets(pairs, state, {Q: torch.empty(6, 5), FFN: torch.empty(6, 8)})


def test_alpha_entries_belong_to_their_pair():
    state = factors() | {"blocks.1.self_attn.q.alpha": torch.tensor(2.0)}
    pairs = lora_pairs(state)
    assert pairs[Q].alpha == "blocks.1.self_attn.q.alpha" and pairs[FFN].alpha is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_is_that_of_float64(dtype):
    """From bf16 weights the result must not be rounded before the sum: it comes in float32."""
    draw = torch.Generator().manual_seed(1)
    weight, down, up = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((48, 40), (16, 40), (48, 16)))
    expected = weight.double() + 0.375 * up.double() @ down.double()
    got = merge(weight, down=down, up=up, scale=0.375)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


def test_misfits_are_named():
    state = factors()
    pairs = lora_pairs(state)
    with pytest.raises(CheckpointError, match=f"1 of 2 targets are not in the network: {FFN}"):
        check_targets(pairs, state, {Q: torch.empty(6, 5)})
    with pytest.raises(CheckpointError, match=r"update of blocks.1.self_attn.q.weight has shape \(6, 5\), the weight \(6, 6\)"):
        check_targets(pairs, state, {Q: torch.empty(6, 6), FFN: torch.empty(6, 8)})
    with pytest.raises(CheckpointError, match="blocks.0.ffn.0.diff_b' is no factor"):
        lora_pairs(state | {"blocks.0.ffn.0.diff_b": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"{Q} has down only"):
        lora_pairs({key: value for key, value in state.items() if "self_attn.q.lora_B" not in key})
    with pytest.raises(CheckpointError, match=r"factors of .*do not fit: down \(4, 5\), up \(6, 3\)"):
        lora_pairs(state | {"blocks.1.self_attn.q.lora_A.weight": torch.zeros(4, 5)})
    with pytest.raises(CheckpointError, match="are both the down of"):
        lora_pairs(state | {"blocks.1.self_attn.q.lora_A.other.weight": torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match="has no Wan counterpart"):
        lora_pairs(factors(q="blocks.1.attn1.to_music"))
