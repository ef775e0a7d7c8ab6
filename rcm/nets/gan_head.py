"""What a discriminator adds to a network (DMD2, arXiv 2405.14867): a logit from block outputs."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from rcm.nets.layers import AffineLayerNorm, PromotedLinear, accumulate_dtype


class Taps(NamedTuple):
    """Blocks, rising, whose tokens a pass hands out; `alone`: nothing else, no later block runs."""

    blocks: tuple[int, ...]
    alone: bool = False


class Reader(nn.Module):
    """Tokens behind one block -> the mean of SiLU(A norm(h) + a) over all of them."""

    def __init__(self, dim: int, hidden: int, *, eps: float, fused: str) -> None:
        super().__init__()
        self.norm = AffineLayerNorm(dim, eps=eps)
        self.norm.fused = fused
        self.proj = nn.Linear(dim, hidden)
        self.act = nn.SiLU()

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [B, F, S, E] to [B, hidden], float32 or wider."""
        rows = self.act(self.proj(self.norm(tokens)))
        return rows.mean(dim=(1, 2), dtype=accumulate_dtype(rows.dtype))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None, device: torch.device) -> None:
        """Xavier-normal, without bias."""
        shape = self.proj.weight.shape
        draw = torch.randn(shape, generator=generator, device=device)
        self.proj.weight.copy_((2.0 / sum(shape)) ** 0.5 * draw)
        self.proj.bias.zero_()
        self.norm.weight.fill_(1.0)
        self.norm.bias.zero_()


class GanHead(nn.Module):
    """Logit [B, 1], positive for real: linear in what a reader finds behind each tapped block.

    `pool` (identity on [B, taps, hidden]) is where context parallelism attaches from outside: means
    over a rank's tokens become means over all. Construct, then load weights or call `init_weights`.
    """

    def __init__(
        self, dim: int, *, taps: int, hidden: int, eps: float = 1e-6, fused: str = "auto"
    ) -> None:
        super().__init__()
        self.fused = fused
        self.readers = nn.ModuleList(Reader(dim, hidden, eps=eps, fused=fused) for _ in range(taps))
        self.pool = nn.Identity()
        self.logit = PromotedLinear(taps * hidden, 1)

    def forward(self, tokens: tuple[Tensor, ...]) -> Tensor:
        """`tokens`: one [B, F, S, E] per tap, this rank's."""
        found = [reader(x) for reader, x in zip(self.readers, tokens, strict=True)]
        return self.logit(self.pool(torch.stack(found, dim=1)).flatten(1))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise in place: Xavier-normal readers, and a logit of zero, so that at first the
        discriminator says nothing. Draws are float32 on the generator's device.
        """
        device = torch.device("cpu") if generator is None else generator.device
        for reader in self.readers:
            cast(Reader, reader).init_weights(generator, device)
        self.logit.weight.zero_()
        self.logit.bias.zero_()
