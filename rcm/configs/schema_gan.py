"""The keys of `model.config.gan`, the adversarial term of self-forced DMD (Causal_rCM.md section
6), and what they must say together with other keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from rcm.configs.schema_common import M
from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.losses.gan import GanForm
from rcm.methods.adversary import R1Form
from rcm.nets.attention import attention_name
from rcm.train.optim import AdamWConfig, LambdaLinear

if TYPE_CHECKING:
    from rcm.configs.schema_causal import CausalConfig

G = f"{M}.gan"
TWICE = ("none", "block_wise")
"""Modes of recomputation whose gradients can be differentiated again."""


@dataclass(frozen=True)
class GanConfig(Record):
    """A discriminator on the fake score, beside DMD (Causal_rCM.md section 6)."""

    # factor of the generator's loss in student iterations, as DMD2's; 0 = no discriminator
    loss_scale: float = within(0.0, least=0)
    # factor of the discriminator's loss beside the fake score's regression
    loss_scale_critic: float = within(0.01, above=0)
    loss: GanForm = "softplus"  # of logits: softplus (non-saturating) or hinge
    # blocks of the fake score whose tokens the head reads; () = at a half, three quarters, the last
    blocks: tuple[int, ...] = ()
    hidden: int = within(256, least=1, most=2**14)  # width of the head behind each of them
    # R1 at real videos: approximate (a second look at a perturbed video) or exact (a gradient that
    # is differentiated again; small networks on one rank)
    r1: R1Form = "approximate"
    r1_gamma: float = within(20.0, above=0)  # the penalty is gamma / 2 |dD/dy|^2
    r1_sigma: float = within(0.1, above=0, most=10)  # perturbation of r1=approximate
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)  # of the head
    scheduler: LambdaLinear = field(default_factory=LambdaLinear)  # of the head

    def __post_init__(self) -> None:
        super().__post_init__()
        blank = {key.name: key.default for key in fields(self)}
        blank |= {"optimizer": AdamWConfig(), "scheduler": LambdaLinear()}
        changed = [name for name, value in blank.items() if getattr(self, name) != value]
        if changed and not self.loss_scale:
            raise ConfigError(
                f"{changed[0]} has no effect while {G}.loss_scale=0 turns the discriminator off;"
                f" set {G}.loss_scale too, such as 0.01"
            )
        for name, read in (
            ("r1_sigma", self.r1 == "approximate"),
            ("r1_gamma", self.r1 != "off"),
        ):
            if name in changed and not read:
                raise ConfigError(
                    f"{name}={getattr(self, name):g} has no effect while {G}.r1={self.r1}; choose"
                    f" another penalty, or set {G}.{name}={blank[name]:g}, which asks for nothing"
                )
        if any(block < 0 for block in self.blocks) or list(self.blocks) != sorted(set(self.blocks)):
            raise ConfigError(
                f"blocks={list(self.blocks)} must be different blocks in rising order, from 0"
            )
        if self.optimizer.type != "fusedadamw":
            raise ConfigError(
                f"optimizer.type={self.optimizer.type} must be fusedadamw, another value has no"
                " effect: the fused kernel is taken wherever torch has it"
            )

    def read_blocks(self, num_layers: int) -> tuple[int, ...]:
        """Blocks that are read of a fake score with so many; `ConfigError` for others."""
        if not self.blocks:
            return tuple(sorted({num_layers // 2, 3 * num_layers // 4, num_layers - 1}))
        if self.blocks[-1] >= num_layers:
            raise ConfigError(
                f"{G}.blocks={list(self.blocks)} must be below {num_layers}, the blocks of"
                f" {M}.net_fake_score"
            )
        return self.blocks

    def check(self, model: CausalConfig) -> None:
        """Raise `ConfigError` where the rest of the model has no place for a discriminator."""
        if not self.loss_scale:
            return
        if not model.has.self_forced:
            raise ConfigError(
                f"{G}.loss_scale={self.loss_scale:g} adds a discriminator to self-forced training;"
                f" training_type={model.training_type} is another, use it with sf_dmd"
            )
        if model.long_tuning.frames:
            raise ConfigError(
                f"{G}.loss_scale={self.loss_scale:g} compares judged windows with videos of the"
                f" data, but with {M}.long_tuning.frames={model.long_tuning.frames} a later"
                " window's first latent frame stands for more pixel frames than theirs, which a"
                " discriminator would tell by; turn one of them off"
            )
        if self.r1 == "exact":
            self._check_exact(model)

    def _check_exact(self, model: CausalConfig) -> None:
        """Everything on the way of a gradient that is differentiated again can be, twice."""
        attention = attention_name(model.attention_backend, flex_backend=model.flex_backend)
        mode = "none" if model.net_fake_score is None else model.net_fake_score.sac_config.mode
        obstacles = (
            (attention != "reference", "attention_backend", attention, "reference"),
            (model.compile, "compile", model.compile, False),
            (model.fused_layers != "off", "fused_layers", model.fused_layers, "off"),
            (model.precision == "bfloat16", "precision", model.precision, "float32"),
            (mode not in TWICE, "net_fake_score.sac_config.mode", mode, " or ".join(TWICE)),
        )
        for stands, key, found, wanted in obstacles:
            if stands:
                raise ConfigError(
                    f"{G}.r1=exact differentiates gradients of the fake score again, which"
                    f" {M}.{key}={found} cannot; set it to {wanted}, or {G}.r1=approximate"
                )
