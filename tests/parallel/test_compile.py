"""Compiled blocks: graphs for the code around the attention, shared by all blocks, gradients as
without, combined with recomputation.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.layout import TokenLayout
from rcm.parallel.apply import parallelize
from rcm.parallel.mesh import ParallelDims
from tests.parallel.test_checkpointing import forward
from tests.support.tiny_nets import GRID, condition, latents, pattern, tiny_net
from tests.support.toy_method import make_net


def parallel_net(mode: str, *, compiled: bool) -> torch.nn.Module:
    net = make_net(seed=0, dtype=torch.float64)
    return parallelize(net, dims=ParallelDims(), precision=Precision.preset("fp64"), checkpoint=mode, compile=compiled)


@pytest.mark.slow
def test_compiled_gradients_and_number_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    net, plain = parallel_net("block_wise", compiled=True), parallel_net("block_wise", compiled=False)
    seen = []
    for block in net.blocks:
        block.self_attn.core.attention.register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    for made in (net, plain):
        forward(made).square().mean().backward()
    assert counter.frame_count > 0, "nothing was compiled"
    assert counter.frame_count <= 4, f"{counter.frame_count} graphs: the blocks do not share them"
    assert seen and not any(seen), "the attention was traced"
    for (name, p), (_, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13, msg=name)


def test_single_operators_cannot_be_kept_inside_compiled_code() -> None:
    with pytest.raises(ConfigError, match=r"mm_only.*compile=true.*block_wise"):
        parallel_net("mm_only", compiled=True)


def test_every_kind_of_pass_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All networks and passes are variants of one function; behind torch's own limit (8) the rest
    runs uncompiled with a warning.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    layouts = (TokenLayout.bidirectional(4, grid=GRID), TokenLayout.teacher_forcing(4, grid=GRID, pattern=pattern("c1-1")))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        net = tiny_net(num_layers=1)
        parallelize(net, dims=ParallelDims(), precision=Precision.preset("fp64"), checkpoint="none", compile=True)
        for gradient in (False, True):
            for layout in layouts:
                with torch.set_grad_enabled(gradient):
                    net(latents(layout.num_frames), torch.full((2, 1), 300.0, dtype=torch.float64), condition(net.config), layout)
