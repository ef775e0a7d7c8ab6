"""Networks of any size on the meta device, with what the kernels allocate on a GPU and none of what
they compute: for counting memory.

Kernel launches do nothing, the outputs around them are allocated as always; attention keeps for its
backward pass what the real one keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcm.configs.bases import alpha_of
from rcm.configs.build_method import build_method
from rcm.configs.build_nets import NetBuilder
from rcm.configs.compose import Run
from rcm.configs.network import wan_config
from rcm.core.dual import in_dual_level, pack, unpack
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.kernels.replay import kept
from rcm.methods.base import Method, Phase
from rcm.nets.attention import AttentionCore
from rcm.nets.condition import Condition
from rcm.nets.lora import attach
from rcm.nets.wan.adapters import adapted_layers
from rcm.nets.wan.model import WanDiT
from rcm.parallel.checkpointing import checkpoint_blocks
from rcm.parallel.init import on_meta
from rcm.parallel.mesh import ParallelDims
from rcm.train.memory_trace import MemoryTrace
from tests.support.watched import SilentKernel


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = kept(lambda: (q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        # sums over parts of the mask
        wide = [x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
        return tuple(x.to(grad.dtype) for x in wide)


def _attend(self: AttentionCore, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, constant_keys: int = 0) -> Tensor:
    if in_dual_level():
        (q, q_dot), (k, k_dot), (v, v_dot) = unpack(q), unpack(k), unpack(v)
        if not (q_dot is None and k_dot is None and v_dot is None):
            return pack(q.new_empty(q.shape), q.new_empty(q.shape))
    if not torch.is_grad_enabled():
        return q.new_empty(q.shape)
    if mask is not None and not mask.is_full:
        return _Attention.apply(q, k, v)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True)[0].transpose(1, 2)


def silence_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fused layers and attention run on meta tensors."""
    from rcm.kernels.fused import choice, norm_kernels, pointwise_kernels

    def silence(module: ModuleType) -> None:
        for name, value in vars(module).items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                monkeypatch.setattr(module, name, SilentKernel())

    silence(norm_kernels)
    silence(pointwise_kernels)
    monkeypatch.setattr(choice, "use_fused", lambda setting, x, *, width: setting != "off")
    monkeypatch.setattr(AttentionCore, "forward", _attend)


class MetaNets(NetBuilder):
    """Builds networks in bfloat16 without memory and without FSDP2."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.config.model.config, dims=ParallelDims(), device=torch.device("meta"), seed=0)
        self.built: list[nn.Module] = []

    def _build(self, knob: str, *, frozen: bool, roles: tuple[str, ...] = ()) -> nn.Module:
        net_config = getattr(self.config, knob)

        def build() -> WanDiT:
            net, lora = WanDiT(wan_config(net_config)).requires_grad_(not frozen), self.config.lora
            if roles:
                attach(net, adapted_layers(lora.targets), roles=roles, rank=lora.rank, alpha=alpha_of(lora))
            return net

        net = on_meta(build).to(torch.bfloat16)
        if not frozen:
            sac = net_config.sac_config
            checkpoint_blocks(net, mode=sac.mode, every=sac.every_n_blocks, keep_last=sac.keep_last_blocks)
        self.built.append(net)
        return net

    def head(self, build: Callable[[], nn.Module]) -> nn.Module:
        self.built.append(on_meta(build).to(torch.bfloat16))
        return self.built[-1]


def traced_peak(run: Run, role: str, *, index: int) -> int:
    """Most bytes alive beside weights and batch in one iteration of `role`, gradients in bfloat16;
    nothing is computed.
    """
    nets, model = MetaNets(run), run.config.model.config
    sizes = wan_config(model.net)
    text = torch.empty(1, sizes.text_len, sizes.text_dim, device="meta")
    method: Method = build_method(run.config, nets, negative=lambda: Condition(text))
    latents = torch.empty(1, model.state_ch, model.state_t, *model.latent_size(), device="meta")
    states = len(getattr(model, "kd_timesteps", ())) + 1
    trajectory = latents.unsqueeze(1).expand(-1, states, -1, -1, -1, -1)
    batch = LatentBatch(latents, text, [""], [""], trajectory if getattr(model, "training_type", "").endswith("_kd") else None)
    trace = MemoryTrace([*(p for net in nets.built for p in net.parameters()), latents, text])
    base = trace.current
    with trace.watching():
        for thunk in method.terms(Phase(role, index, 10_000), batch, StepRng(0, 0, 0, 0, "cpu")):
            term = thunk()
            term.value.backward()
            del term
    return trace.peak - base
