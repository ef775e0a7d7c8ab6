"""The discriminator of a self-forced run: its head and its objective."""

from __future__ import annotations

from rcm.configs.build_nets import NetBuilder
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig
from rcm.losses.term import NonFinitePolicy
from rcm.methods.adversary import R1, Adversary
from rcm.nets.denoiser import Denoiser
from rcm.nets.gan_head import GanHead
from rcm.nets.wan.config import WanConfig
from rcm.parallel.init import on_meta


def build_adversary(
    config: CausalConfig, nets: NetBuilder, fake_score: Denoiser, *, nonfinite: NonFinitePolicy
) -> Adversary | None:
    """The discriminator that `config.gan` asks for; None for none. Collective."""
    gan = config.gan
    if not gan.loss_scale:
        return None
    sizes = fake_score.net.config

    head = nets.head(lambda: _head(config, sizes))
    return Adversary(
        fake_score,
        head,
        gan.read_blocks(sizes.num_layers),
        loss_scale=gan.loss_scale,
        loss_scale_critic=gan.loss_scale_critic,
        form=gan.loss,
        r1=R1(gan.r1, gan.r1_gamma, gan.r1_sigma),
        nonfinite=nonfinite,
    )


def head_elements(config: CommonModelConfig, sizes: WanConfig) -> int:
    """Numbers in the head of a run's discriminator on a fake score of these sizes; 0 for none."""
    if not isinstance(config, CausalConfig) or not config.gan.loss_scale:
        return 0
    return sum(p.numel() for p in on_meta(lambda: _head(config, sizes)).parameters())


def _head(config: CausalConfig, sizes: WanConfig) -> GanHead:
    gan = config.gan
    taps = {"taps": len(gan.read_blocks(sizes.num_layers)), "hidden": gan.hidden}
    return GanHead(sizes.dim, **taps, eps=sizes.eps, fused=config.fused_layers)
