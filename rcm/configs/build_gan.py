"""The discriminator of a self-forced run: its head, built as the networks are, and the objective
that it has with the fake score.
"""

from __future__ import annotations

from rcm.configs.build_nets import NetBuilder
from rcm.configs.schema_causal import CausalConfig
from rcm.losses.term import NonFinitePolicy
from rcm.methods.adversary import R1, Adversary
from rcm.nets.denoiser import Denoiser
from rcm.nets.gan_head import GanHead
from rcm.parallel.agree import on_first
from rcm.parallel.apply import parallelize_head
from rcm.parallel.init import check_equal, drawn_weights, load_full, materialise, on_meta


def build_adversary(
    config: CausalConfig, nets: NetBuilder, fake_score: Denoiser, *, nonfinite: NonFinitePolicy
) -> Adversary | None:
    """The discriminator that `config.gan` asks for; None for none. Collective."""
    gan = config.gan
    if not gan.loss_scale:
        return None
    sizes = fake_score.net.config
    blocks = gan.read_blocks(sizes.num_layers)

    def build() -> GanHead:
        taps = {"taps": len(blocks), "hidden": gan.hidden}
        return GanHead(sizes.dim, **taps, eps=sizes.eps, fused=config.fused_layers)

    head = parallelize_head(on_meta(build), dims=nets.dims, precision=nets.precision)
    materialise(head, device=nets.device)
    drawn = on_first(lambda: drawn_weights(build, seed=nets.seed))
    load_full(head, drawn, source="initial head of the discriminator")
    check_equal(head, dims=nets.dims)
    return Adversary(
        fake_score,
        head,
        blocks,
        loss_scale=gan.loss_scale,
        loss_scale_critic=gan.loss_scale_critic,
        form=gan.loss,
        r1=R1(gan.r1, gan.r1_gamma, gan.r1_sigma),
        nonfinite=nonfinite,
    )
