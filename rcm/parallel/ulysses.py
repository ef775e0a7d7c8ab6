"""Context parallelism by exchanging tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509), put
around a network's seams from outside.

Legend: B batch, F frames, S tokens per frame, P context-parallel size, N heads, D head size, E
width.

Tokens travel as [B, F, S/P, E]: every rank holds a slice of every frame, so per-frame modulation,
RMS norms, MLP and cross-attention stay local. Around self-attention an all-to-all trades that slice
for a slice of the heads: [B, F*S/P, N, D] becomes [B, F*S, N/P, D] with frames and tokens in their
usual order, hence rope, masks and the KV cache see the whole sequence and N/P heads. Each exchange
is linear and defines forward, backward and jvp: a bare collective on a dual tensor would drop the
tangent without a word.

Gradients: outside the seams (loss, latents) tensors and gradients are equal on all ranks of the
group. Inside, a rank's gradient is P times its share, so the mean that FSDP2 takes over all data
and cp ranks equals the gradient of the unsharded network. `Leave` multiplies by P, `Enter` sums and
divides by P.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rcm.core.errors import ConfigError
from rcm.parallel.blocks import blocks_of


def _exchange(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    """pieces[j] goes to rank j; the result's [j] came from rank j."""
    pieces = pieces.contiguous()
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return received


def _to_heads(x: Tensor, num_frames: int, group: dist.ProcessGroup) -> Tensor:
    """[B, F*s, N, D] of this rank's tokens -> [B, F*S, N/P, D] of this rank's heads."""
    size = group.size()
    batch, _, heads, width = x.shape
    by_head = x.reshape(batch, num_frames, -1, size, heads // size, width)
    by_token = _exchange(by_head.permute(3, 0, 1, 2, 4, 5), group)
    return by_token.permute(1, 2, 0, 3, 4, 5).reshape(batch, -1, heads // size, width)


def _to_tokens(x: Tensor, num_frames: int, group: dist.ProcessGroup) -> Tensor:
    """[B, F*S, N/P, D] of this rank's heads -> [B, F*s, N, D] of this rank's tokens: inverse and
    adjoint of `_to_heads`.
    """
    size = group.size()
    batch, _, heads, width = x.shape
    by_token = x.reshape(batch, num_frames, size, -1, heads, width)
    by_head = _exchange(by_token.permute(2, 0, 1, 3, 4, 5), group)
    return by_head.permute(1, 2, 3, 0, 4, 5).reshape(batch, -1, size * heads, width)


def _local(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's slice of every frame: [B, F, S, E] -> [B, F, S/P, E]."""
    return x.chunk(group.size(), dim=2)[group.rank()].contiguous()


def _whole(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All slices of every frame: [B, F, S/P, E] -> [B, F, S, E]."""
    slices = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(slices, x.contiguous(), group=group)
    return torch.cat(slices, dim=2)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_frames: int, group: dist.ProcessGroup) -> Tensor:
        ctx.num_frames, ctx.group = num_frames, group
        return _to_heads(x, num_frames, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(grad, ctx.num_frames, ctx.group), None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, *_: None) -> Tensor:
        return _to_heads(x_dot, ctx.num_frames, ctx.group)


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_frames: int, group: dist.ProcessGroup) -> Tensor:
        ctx.num_frames, ctx.group = num_frames, group
        return _to_tokens(x, num_frames, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(grad, ctx.num_frames, ctx.group), None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, *_: None) -> Tensor:
        return _to_tokens(x_dot, ctx.num_frames, ctx.group)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _local(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _whole(grad, ctx.group) / ctx.group.size(), None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, _: None) -> Tensor:
        return _local(x_dot, ctx.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _whole(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _local(grad, ctx.group) * ctx.group.size(), None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, _: None) -> Tensor:
        return _whole(x_dot, ctx.group)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x / group.size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # times P, as behind the seam, of each rank's share 1 / P


class Average(nn.Module):
    """Means over a rank's tokens -> means over the tokens of all ranks of the group, equal on all
    of them: a seam like `Leave`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, means: Tensor) -> Tensor:
        """`means` of any shape; every rank has as many tokens."""
        return _Average.apply(means, self.group)


class Enter(nn.Module):
    """Keep this rank's slice of every frame: [B, F, S, E] -> [B, F, S/P, E]; ConfigError if P does
    not divide S.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, tokens: Tensor) -> Tensor:
        """Slice; the backward pass gathers, so gradients of what lies before the seam are whole on
        every rank.
        """
        if tokens.shape[2] % self.group.size():
            raise ConfigError(
                f"{tokens.shape[2]} tokens per frame do not divide over {self.group.size()}"
                " context-parallel ranks; change model_parallel.context_parallel_size or the"
                " resolution"
            )
        return _Scatter.apply(tokens, self.group)


class Leave(nn.Module):
    """Put the slices of all ranks together: [B, F, S/P, E] -> [B, F, S, E], equal on all ranks of
    the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, tokens: Tensor) -> Tensor:
        """Gather; the backward pass keeps the local slice, times P."""
        return _Gather.apply(tokens, self.group)


class HeadParallelCore(nn.Module):
    """The core of a self-attention between two exchanges; the wrapped core sees all tokens and N/P
    heads.
    """

    def __init__(self, core: nn.Module, *, group: dist.ProcessGroup) -> None:
        super().__init__()
        if any(True for _ in core.parameters()) or core.state_dict():
            raise ConfigError(
                f"{type(core).__name__} holds weights: wrapping it would rename checkpoint keys;"
                " keep weights outside the attention core"
            )
        self.core, self.group = core, group

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Any,
        rope: Any,
        layer_view: Any,
        attend: bool = True,
    ) -> Tensor | None:
        """q, k, v [B, F*S/P, N, D] -> attention output of the same shape. One exchange for q, k and
        v together, one for the output. `attend=False`: the core is shown them and returns nothing.
        """
        size, num_frames = self.group.size(), layout.num_frames
        if q.shape[2] % size:
            raise ConfigError(
                f"{q.shape[2]} attention heads do not divide over {size} context-parallel ranks; "
                "set model_parallel.context_parallel_size to a divisor"
            )
        qkv = _TokensToHeads.apply(torch.cat((q, k, v)), num_frames, self.group)
        if not attend:
            return self.core(*qkv.chunk(3), layout, rope, layer_view, attend=False)
        out = self.core(*qkv.chunk(3), layout, rope, layer_view)
        return _HeadsToTokens.apply(out, num_frames, self.group)


def shard_sequence(net: nn.Module, *, group: dist.ProcessGroup) -> None:
    """Replace the seams `net.enter`, `net.leave` and every `block.self_attn.core` in place, so that
    the ranks of `group` share each sequence.
    """
    net.enter, net.leave = Enter(group), Leave(group)
    for block in blocks_of(net):
        block.self_attn.core = HeadParallelCore(block.self_attn.core, group=group)
