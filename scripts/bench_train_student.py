"""The student whose training step `scripts.bench_train_step` measures, and the passes of that step.

The student is built as training builds it (float32 master weights, bfloat16 computation, FSDP2 in a
group of one) with random weights; the teacher is left out: its velocity is noise. Passes are those
of the method (`rcm.methods.tf_scm`).
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng, randn
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time_sampling import LogNormal
from rcm.losses.scm import normalise, rf_tangent, scm_regression
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.methods.tf_scm import TFContinuousConsistency
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, VelocityModel
from rcm.nets.layout import TokenLayout
from rcm.nets.lora import AdaptedNet, attach
from rcm.nets.wan.adapters import LAYERS
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.checkpointing import SACConfig
from rcm.parallel.init import materialise, on_meta
from rcm.parallel.mesh import ParallelDims
from scripts.bench_measure import fill

HEIGHT, WIDTH = 60, 104  # 480 x 832 pixels


def recomputed(word: str) -> SACConfig:
    """`sac_config` of a word MODE, MODE/N (every_n_blocks) or MODE+N (keep_last_blocks), such as
    block_wise_keep_attention+1. `ConfigError` for others.
    """
    for sign, key in (("/", "every_n_blocks"), ("+", "keep_last_blocks")):
        mode, found, count = word.partition(sign)
        if found:
            if not count.isdecimal():
                raise ConfigError(f"{word}: {sign} is followed by a number, got {count!r}")
            return SACConfig(mode, **{key: int(count)})
    return SACConfig(word)


class NoiseTeacher(VelocityModel):
    """Stands where the teacher would: a velocity that costs nothing."""

    def __init__(self, config: WanConfig) -> None:
        self.config = config

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """That of the network whose teacher it replaces."""
        return self.config.token_grid(height, width)

    def velocity(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: object = None
    ) -> Tensor:
        """Unit noise for the predicted frames of `layout`."""
        start, stop = layout.output
        generator = torch.Generator(x.device).manual_seed(7)
        return torch.randn(x[:, :, start:stop].shape, generator=generator, device=x.device)


def build(config: WanConfig, options: argparse.Namespace, *, frozen: bool) -> Denoiser:
    """The network as a run builds it: on meta, parallelised, given memory, filled with random
    weights.
    """
    policy = Precision.preset("bf16_fp32_time")
    gc.collect()  # an earlier network is a cycle of hooks
    rank = 0 if frozen else options.lora

    def laid_out() -> WanDiT:
        net = WanDiT(config, attention=options.attention, fused=options.fused).requires_grad_(
            not frozen
        )
        return adapted(net, rank)

    net = on_meta(laid_out)
    dims = ParallelDims(device_type="cuda")
    parallelize(
        net,
        dims=dims,
        precision=policy,
        checkpoint=recomputed(options.recompute),
        compile=options.compile and not frozen,
        frozen_weights=options.frozen_weights if frozen else "compute",
        linear_precision="compute" if frozen else options.linear_precision,
    )
    materialise(net, device="cuda")
    fill(net)
    return Denoiser(AdaptedNet(net, "student") if rank else net, policy)


def adapted(net: WanDiT, rank: int) -> WanDiT:
    """`net` with adapters of this rank on every layer that takes them, alpha twice the rank (0: as
    it is).
    """
    if rank:
        attach(net, LAYERS, roles=("student",), rank=rank, alpha=2.0 * rank)
    return net


@torch.no_grad()
def exact_student(config: WanConfig, *, rank: int) -> Denoiser:
    """The same weights, rounded as a bfloat16 network computes with them, in float64 and plain
    formulas.
    """
    net = adapted(WanDiT(config, attention="reference", fused="off"), rank).to(
        "cuda", torch.float64
    )
    net.set_jvp_implementation("reference")
    fill(net)
    for parameter in net.parameters():
        parameter.copy_(parameter.bfloat16())
    return Denoiser(AdaptedNet(net, "student") if rank else net, Precision.preset("fp64"))


class Step:
    """Inputs of one student step and its passes, called as the method calls them."""

    def __init__(self, student: Denoiser, pattern: BlockPattern, *, frames: int) -> None:
        self.student, self.forcing, config = student, TeacherForcing(pattern), student.net.config
        rng = StepRng(3, 0, 0)
        shape = (1, config.out_dim, frames, HEIGHT, WIDTH)
        self.x0, self.x_t, self.v_teacher = (
            randn(shape, generator=rng.generator(name), device="cuda")
            for name in ("x0", "x_t", "v")
        )
        self.text = randn(
            (1, config.text_len, config.text_dim), generator=rng.generator("text"), device="cuda"
        )
        self.cond, self.context = Condition(self.text), self.forcing.clean(self.x0)
        self.t = torch.full((1, 1), 0.6, dtype=torch.float64, device="cuda")
        self.structure = {"grid": student.token_grid(HEIGHT, WIDTH), "pattern": pattern}
        self.frames = frames

    @torch.no_grad()
    def context_pass(self) -> Any:
        """The clean half into a fresh cache, as `TeacherForcing.tangent` does it first."""
        cache = self.student.new_cache(num_frames=self.frames, grid=self.structure["grid"])
        layout = TokenLayout.context(self.frames, **self.structure)
        self.student.velocity(self.x0, self.context.times, self.cond, layout, cache=cache.append())
        return cache

    def noisy_pass(self, cache: Any) -> tuple[Tensor, Tensor]:
        """The noisy half with tangents over the cache, as `TeacherForcing.tangent` does it
        second.
        """
        layout = TokenLayout.noisy_over_context(self.frames, **self.structure)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.student.velocity(x, t, self.cond, layout, cache=cache.readonly())

        return jvp(velocity, (self.x_t, self.t), (self.v_teacher, torch.ones_like(self.t)))

    def tangent_pass(self) -> tuple[Tensor, Tensor]:
        """Both."""
        dots = {"x_dot": self.v_teacher, "t_dot": torch.ones_like(self.t)}
        return self.forcing.tangent(
            self.student, self.x_t, self.t, self.cond, context=self.context, **dots
        )

    def gradient_pass(self, v_dot: Tensor) -> None:
        """Packed forward, tangent of the loss, regression, backward."""
        v = self.forcing.velocity(self.student, self.x_t, self.t, self.cond, context=self.context)
        g_hat = normalise(rf_tangent(v.detach(), self.v_teacher, v_dot, self.t))
        scm_regression(v, g_hat).value.backward()

    @torch.no_grad()
    def packed_forward(self) -> Tensor:
        """The packed forward without gradient."""
        return self.forcing.velocity(
            self.student, self.x_t, self.t, self.cond, context=self.context
        )

    def whole(self) -> None:
        """The method's own step, its teacher replaced by noise."""
        teacher = NoiseTeacher(self.student.net.config)
        method = TFContinuousConsistency(
            self.student, teacher, forcing=self.forcing, law=LogNormal(-0.8, 1.6)
        )
        batch = LatentBatch(self.x0, self.text, [""], [""])
        for term in method.terms(method.phase(2000), batch, StepRng(3, 0, 0)):
            term().value.backward()

    def forget(self) -> None:
        """Drop the gradients."""
        self.student.net.zero_grad(set_to_none=True)
