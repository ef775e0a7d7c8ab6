"""The first call of somebody else's attention: a few random tokens, forward and backward, against
float32. What a package raises only when it is called (a missing symbol, a build for another card,
code that does not compile) is known before it is relied on, and so is what its backward pass
raises, which no forward call could take back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rcm.core.device_copy import out_of_memory
from rcm.core.errors import ConfigError, first_line
from rcm.kernels.replay import keeping
from rcm.nets.attention_dense import DenseAttention, Reference

TOKENS = 128
LARGEST_ERROR = 0.05
"""Of a result or gradient relative to float32; sound packages stay below 0.006 (docs/scale.md)."""


def trial(
    attend: DenseAttention,
    *,
    heads: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    gradient: bool,
) -> str | None:
    """What goes wrong when `attend(q, k, v)` is called without mask, scale 1/sqrt(D), for `TOKENS`
    tokens of `heads` of the `widths` (of q and k, of v); None if nothing does. `ConfigError`, and
    memory that runs out, are raised.

    No hook or mode of the caller (recomputation, autocast, inference) sees the call. The host waits
    for the device.
    """

    def drawn(width: int) -> Tensor:
        shape = (1, TOKENS, heads, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return x.to(device, dtype)

    def results(call: DenseAttention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(gradient) for x in inputs]
        out = call(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))] if gradient else [out]

    def run() -> str | None:
        inputs, grad = [drawn(width) for width in (widths[0], *widths)], drawn(widths[1])
        mine = results(attend, inputs, grad)
        exact = results(plain, [x.float() for x in inputs], grad)
        with torch.no_grad():
            # not strict: without gradient there is o alone
            pairs = zip(("o", "dq", "dk", "dv"), mine, exact, strict=False)
            found = {name: float((x.float() - y).norm() / y.norm()) for name, x, y in pairs}
        wrong = [f"{name} by {e:.2g}" for name, e in found.items() if not e <= LARGEST_ERROR]
        return f"wrong results: {', '.join(wrong)} of their size" if wrong else None

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Reference()(q, k, v, mask=None, scale=widths[0] ** -0.5)

    generator = torch.Generator().manual_seed(0)
    try:
        with _unseen(device), torch.set_grad_enabled(gradient):
            return run()
    except Exception as error:  # packages for another torch or card raise whatever they meet
        if isinstance(error, ConfigError) or out_of_memory(error):
            raise
        return first_line(error)


@contextmanager
def _unseen(device: torch.device) -> Iterator[None]:
    """Within, calls on `device` are as at the start of a program."""
    with (
        keeping(False),
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        _disable_current_modes(),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield
