"""Published layouts, read by those who defined them: diffusers' transformer and PEFT compute what
the adapted network computes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.nets.layout import TokenLayout
from rcm.nets.lora import AdaptedNet, attach
from rcm.nets.wan.adapters import LAYERS
from rcm.nets.wan.convert import from_wan
from rcm.nets.wan.lora import by_layer, peft_settings, published
from rcm.pipelines.weight_writer import write_safetensors
from tests.support.tiny_nets import GRID, condition, frame_times, latents, tiny_net

RANK, ALPHA = 3, 4.5
FLOAT32 = 5e-6
"""diffusers' rotary tables are float32."""


@pytest.fixture(scope="module")
def role() -> AdaptedNet:
    net = tiny_net()
    attach(net, LAYERS, roles=("student",), rank=RANK, alpha=ALPHA)
    student, generator = AdaptedNet(net.double(), "student"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return student


def factors(role: AdaptedNet) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies: PEFT writes into the tensors it is given."""
    return by_layer({name: value.clone() for name, value in role.state_dict().items()})


def velocity(net: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        layout = TokenLayout.bidirectional(3, grid=GRID)
        return net(latents(3, batch=1), frame_times(1, batch=1), condition(tiny_net().config, batch=1), layout)


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_diffusers_reads_both_layouts(role: AdaptedNet, layout: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers as from_original

    c = role.config
    peer = diffusers.WanTransformer3DModel(
        patch_size=c.patch, num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim, out_channels=c.out_dim,
        text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers, eps=c.eps, rope_max_seq_len=64,
    ).double()  # fmt: skip
    peer.load_state_dict(from_wan(AdaptedNet(role.net, None).state_dict(), form="diffusers"))
    entries = published(factors(role), layout=layout, alpha=ALPHA)
    settings = peft_settings(LAYERS, layout="diffusers", rank=RANK, alpha=ALPHA)
    if layout == "diffusers":
        peer.load_lora_adapter(entries, prefix="transformer", metadata={f"transformer.{key}": value for key, value in settings.items()})
    else:
        peer.load_lora_adapter(from_original(entries), prefix="transformer")
    text = condition(c, batch=1).text
    with torch.no_grad():
        text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
        found = peer(latents(3, batch=1), frame_times(1, batch=1)[:, 0], text, return_dict=False)[0]
    truth = velocity(role)
    assert (found - truth).abs().max() < FLOAT32 * truth.abs().max()
    assert (found - velocity(AdaptedNet(role.net, None))).abs().max() > 0.1


def test_peft_reads_its_folder(role: AdaptedNet, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    entries = published(factors(role), layout="peft", alpha=ALPHA)
    headers = {key: value.to("meta") for key, value in entries.items()}
    write_safetensors(tmp_path / "adapter_model.safetensors", headers, entries.__getitem__, metadata={"format": "pt"})
    settings = peft_settings(LAYERS, layout="peft", rank=RANK, alpha=ALPHA)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = velocity(peft.PeftModel.from_pretrained(tiny_net(), str(tmp_path)).base_model.model)
    truth = velocity(role)
    assert (found - truth).abs().max() < 1e-12 * truth.abs().max()
