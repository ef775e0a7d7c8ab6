"""A folder of checkpoints as a user has it, in the layouts of the public files, every model
tiny.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rcm.encoders import wan_vae
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_net import WanVAE, WanVAEConfig
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT
from tests.support.tiny_nets import tiny_net
from tests.support.tiny_umt5 import save_umt5

PROMPT = "a red square moves left"
BASE_DIM = 4
SIZES = {"dim": 256, "num_heads": 2, "ffn_dim": 64, "num_layers": 1, "freq_dim": 16, "text_dim": 24, "text_len": 512, "out_dim": 16}
"""Head size 128 as in every Wan network, so that the file alone says how many heads there are."""


@dataclass(frozen=True)
class WanFiles:
    """Paths of a complete folder."""

    folder: Path
    dit: Path
    high: Path
    low: Path
    vae: Path
    text: Path

    @property
    def shared_flags(self) -> list[str]:
        """Flags of every command for these files, at a size that a CPU manages."""
        where = ["--vae_path", str(self.vae), "--text_encoder_path", str(self.text), "--device", "cpu", "--model_size", "auto"]
        return [*where, "--size", "32x48", "--num_frames", "5", "--precision", "fp32", "--vae_precision", "fp32"]


def dit(*, in_dim: int = 16, seed: int = 0) -> WanDiT:
    """A network that the tiny files hold."""
    return tiny_net(seed=seed, dtype=torch.float32, in_dim=in_dim, **SIZES)


def original_layout(net: WanDiT) -> dict[str, Tensor]:
    """Its weights as Wan publishes them: the patch embedding as a convolution."""
    state = dict(net.state_dict())
    weight = state["patch_embedding.weight"]
    state["patch_embedding.weight"] = weight.reshape(weight.shape[0], net.config.in_dim, 1, 2, 2)
    return state


def config() -> WanConfig:
    """Sizes of the text-to-video network."""
    return dit().config


def tiny_codec() -> WanVAECodec:
    """The codec of the folder."""
    return WanVAECodec.random(base_dim=BASE_DIM, dtype=torch.float32, seed=5)


def write_wan_files(folder: Path) -> WanFiles:
    """Write all files: the text-to-video network with a rCM prefix, the experts without, VAE and
    umT5 under their published names.
    """
    files = WanFiles(
        folder,
        folder / "rCM_Wan2.1_T2V_tiny.pt",
        folder / "Wan2.2-I2V-high.pth",
        folder / "Wan2.2-I2V-low.pth",
        folder / "Wan2.1_VAE.pth",
        save_umt5(folder),
    )
    torch.save({f"net.{name}": tensor for name, tensor in original_layout(dit()).items()}, files.dit)
    torch.save(original_layout(dit(in_dim=36, seed=1)), files.high)
    torch.save(original_layout(dit(in_dim=36, seed=2)), files.low)
    torch.save(dict(tiny_codec().vae.state_dict()), files.vae)
    return files


def expect_a_tiny_vae(monkeypatch) -> None:
    """The published VAE has one size, which the codec builds before it reads; let it build the tiny
    one.
    """

    class TinyVAE(WanVAE):
        def __init__(self, sizes: WanVAEConfig = WanVAEConfig(base_dim=BASE_DIM)) -> None:
            super().__init__(sizes)

    monkeypatch.setattr(wan_vae, "WanVAE", TinyVAE)
