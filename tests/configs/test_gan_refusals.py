"""What a discriminator cannot be combined with is refused by name, and what the sentence advises
composes.
"""

from __future__ import annotations

import pytest

from rcm.core.errors import ConfigError

M = "model.config."
G = M + "gan."
ROW, PLAIN = "experiment=toy_sf_dmd_gan_c3-3", "experiment=toy_sf_dmd_c3-3"
EXACT = [ROW, G + "r1=exact", M + "attention_backend=reference", M + "fused_layers=off"]

REFUSED = {
    # case: words, what is told, words that mend it
    "weight below nothing": ([ROW, G + "loss_scale=-1"], r"model.config.gan.loss_scale=-1.0 must be at least 0", [G + "loss_scale=1"]),
    "untrained head": (
        [ROW, G + "loss_scale_critic=0"],
        r"model.config.gan.loss_scale_critic=0.0 must be positive",
        [G + "loss_scale_critic=1"],
    ),
    "no width": ([ROW, G + "hidden=0"], r"model.config.gan.hidden=0 must be at least 1", [G + "hidden=8"]),
    "no penalty by weight": ([ROW, G + "r1_gamma=0"], r"model.config.gan.r1_gamma=0.0 must be positive", [G + "r1_gamma=1"]),
    "no perturbation": ([ROW, G + "r1_sigma=0"], r"model.config.gan.r1_sigma=0.0 must be positive", [G + "r1_sigma=0.5"]),
    "form": ([ROW, G + "loss=wgan"], r"gan.loss='wgan' must be one of 'softplus', 'hinge'", [G + "loss=hinge"]),
    "form of the penalty": (
        [ROW, G + "r1=finite"],
        r"gan.r1='finite' must be one of 'approximate', 'exact', 'off'",
        [G + "r1=approximate"],
    ),
    "blocks of no discriminator": (
        [PLAIN, G + "blocks=[1]"],
        r"model.config.gan.blocks has no effect while model.config.gan.loss_scale=0 turns .*off; set model.config.gan.loss_scale too",
        [G + "loss_scale=0.01"],
    ),
    "rate of no discriminator": (
        [PLAIN, G + "optimizer.lr=1"],
        r"gan.optimizer has no effect while .*loss_scale=0",
        [G + "loss_scale=0.01"],
    ),
    "weight of no penalty": ([ROW, G + "r1=off"], r"r1_gamma=0.1 has no effect while model.config.gan.r1=off", [G + "r1_gamma=20"]),
    "perturbation of a gradient": (
        [*EXACT, G + "r1_sigma=0.5"],
        r"r1_sigma=0.5 has no effect while model.config.gan.r1=exact",
        [G + "r1=approximate"],
    ),
    "blocks out of order": ([ROW, G + "blocks=[2,1]"], r"blocks=\[2, 1\] must be different blocks in rising order", [G + "blocks=[1,2]"]),
    "a block twice": ([ROW, G + "blocks=[1,1]"], r"blocks=\[1, 1\] must be different blocks", [G + "blocks=[1]"]),
    "a block from the end": ([ROW, G + "blocks=[-1]"], r"blocks=\[-1\] must be different blocks .*from 0", [G + "blocks=[3]"]),
    "a block too many": (
        [ROW, G + "blocks=[1,4]"],
        r"gan.blocks=\[1, 4\] must be below 4, the blocks of model.config.net_fake_score",
        [G + "blocks=[1,3]"],
    ),
    "another optimiser": ([ROW, G + "optimizer.type=adamw"], r"optimizer.type=adamw must be fusedadamw", [G + "optimizer.type=fusedadamw"]),
    "rate that turns weights around": (
        [ROW, G + "optimizer.lr=1", G + "optimizer.weight_decay=2"],
        r"gan.optimizer.weight_decay=2 times the largest rate 1 must be below 1",
        [G + "optimizer.weight_decay=0.5"],
    ),
    "another stage": (
        ["experiment=toy_tf_c3-3", G + "loss_scale=0.01"],
        r"gan.loss_scale=0.01 adds a discriminator to self-forced training; training_type=tf is another, use it with sf_dmd",
        [G + "loss_scale=0"],
    ),
    "bidirectional rCM": (["experiment=toy_rCM", G + "loss_scale=0.01"], r"'model.config.gan.loss_scale' does not exist in this run", None),
    "long tuning": (
        [ROW, M + "long_tuning={frames:21,window_blocks:2}"],
        r"gan.loss_scale=0.1 compares .*model.config.long_tuning.frames=21.*turn one of them off",
        [M + "long_tuning={frames:0,window_blocks:0}"],
    ),
    "no real videos": (
        ["experiment=causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3", G + "loss_scale=0.1", "data=prompts"],
        r"data=prompts has no latents, which model.config.gan.loss_scale=0.1 shows a discriminator",
        ["data=latents"],
    ),
    "exact R1 and weights on the host": (
        [*EXACT, "trainer.offload.parameters=True"],
        r"trainer.offload.parameters=True cannot take model.config.gan.r1=exact: FSDP2.* differentiated again; set model.config.gan.r1=app",
        [G + "r1=approximate"],
    ),
    "exact R1 and fused attention": (
        [ROW, G + "r1=exact"],
        r"gan.r1=exact differentiates .* again, which model.config.attention_backend=auto cannot; set it to reference",
        [M + "attention_backend=reference", M + "fused_layers=off"],
    ),
    "exact R1 and fused layers": (
        [*EXACT, M + "fused_layers=auto"],
        r"gan.r1=exact .*model.config.fused_layers=auto cannot; set it to off, or model.config.gan.r1=approximate",
        [M + "fused_layers=off"],
    ),
    "exact R1 and compiled code": (
        [*EXACT, M + "compile=True"],
        r"gan.r1=exact .*model.config.compile=True cannot; set it to False",
        [M + "compile=False"],
    ),
    "exact R1 and narrow weights": (
        [*EXACT, "precision=bf16"],
        r"gan.r1=exact .*model.config.precision=bfloat16 cannot; set it to float32",
        [M + "precision=float32"],
    ),
    "exact R1 and kept products": (
        [*EXACT, M + "net_fake_score.sac_config.mode=mm_only"],
        r"gan.r1=exact .*net_fake_score.sac_config.mode=mm_only cannot; set it to none or block_wise",
        [M + "net_fake_score.sac_config.mode=block_wise"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_knob_and_how_to_go_on(composed, case: str) -> None:
    words, told, mended = REFUSED[case]
    with pytest.raises(ConfigError, match=told) as caught:
        composed(*words)
    assert "\n" not in str(caught.value)
    if mended is not None:
        composed(*words, *mended)


def test_exact_r1_is_for_one_rank(composed) -> None:
    with pytest.raises(ConfigError, match=r"FSDP2 of 2 ranks cannot; set model.config.gan.r1=approximate, or start one rank"):
        composed(*EXACT, world_size=2)
    composed(*EXACT, G + "r1=approximate", world_size=2)


def test_blocks_that_are_read_without_a_word(composed) -> None:
    """At a half, three quarters, and the last: 15, 22, 29 of 30."""
    for name, layers, blocks in (("toy_sf_dmd_gan_c3-3", 4, (2, 3)), ("causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3", 30, (15, 22, 29))):
        gan = composed(f"experiment={name}", G + "loss_scale=0.01").config.model.config.gan
        assert gan.read_blocks(layers) == blocks
