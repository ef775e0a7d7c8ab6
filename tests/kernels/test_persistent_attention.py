"""Persistent attention: who computes what, what the kernel compiles to, refusals, and on a card its
errors against float64.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from rcm.kernels.persistent_attention import api
from rcm.kernels.persistent_attention.schedule import JOB, Tiles, make_plan
from tests.support.persistent_jobs import jobs

SMALL = [(300, 100, 2, 3), (300, 900, 2, 4), (130, 640, 1, 5), (128, 1, 4, 9), (1000, 300, 3, 1), (128, 200, 1, 7), (640, 999, 1, 5)]
"""Queries, keys, batch x heads, programs."""
STREAM = [(1560, 1560, 12), (1560, 32760, 12), (4680, 32760, 12), (4680, 18720, 40)]


@pytest.mark.parametrize(("q_len", "kv_len", "heads"), STREAM)
def test_no_processor_has_much_more_to_do_than_another(q_len, kv_len, heads):
    tiles = Tiles()
    plan = make_plan(q_len=q_len, kv_len=kv_len, pairs=heads, tiles=tiles, programs=132)
    assert plan.whole * 132 + plan.remaining == -(-q_len // tiles.rows) * heads
    work = [[high - low for _, _, low, high in jobs(plan, 132, program)] for program in range(132)]
    most, even = max(sum(each) for each in work), plan.blocks * plan.tiles_per_head * heads / 132
    assert most + JOB * max(map(len, work)) <= even + 1 + JOB * (plan.whole + 2)


def test_few_keys_are_not_cut_for_two_tiles_of_a_program():
    """A job costs what `JOB` key tiles do: where that is more than what equal shares save, every
    program has a piece of one query tile only.
    """
    sharers = {kv_len: make_plan(q_len=1560, kv_len=kv_len, pairs=12, tiles=Tiles(), programs=132).sharers for kv_len in (1560, 32760)}
    assert sharers == {1560: 120, 32760: 132}
    plan = make_plan(q_len=1560, kv_len=1560, pairs=12, tiles=Tiles(), programs=132)
    assert max(len(list(jobs(plan, 132, program))) for program in range(132)) == plan.whole + 1


def test_every_key_tile_of_every_query_tile_has_one_program():
    for q_len, kv_len, pairs, programs in SMALL:
        plan = make_plan(q_len=q_len, kv_len=kv_len, pairs=pairs, tiles=Tiles(), programs=programs)
        every = [(tile, block) for p in range(programs) for _, tile, low, high in jobs(plan, programs, p) for block in range(low, high)]
        assert sorted(every) == [(tile, block) for tile in range(plan.tiles_per_head * pairs) for block in range(plan.blocks)]


def test_the_kernel_finds_the_same_jobs():
    """Its own arithmetic, on integers in tensors."""
    pytest.importorskip("triton")
    from rcm.kernels.persistent_attention import hopper

    language = SimpleNamespace(minimum=torch.minimum, where=torch.where, int32=torch.int32)
    with patch.object(hopper, "gl", language):
        for q_len, kv_len, pairs, programs in (*SMALL, *((*shape, 132) for shape in STREAM)):
            plan = make_plan(q_len=q_len, kv_len=kv_len, pairs=pairs, tiles=Tiles(), programs=programs)
            bounds = tuple(map(torch.tensor, (plan.whole, plan.remaining, plan.blocks, plan.sharers)))
            for program in range(programs):
                numbers = [torch.tensor(n) for n in (program, programs)]
                found = [(i, *map(int, hopper._job.fn(torch.tensor(i), *numbers, bounds))) for i in range(plan.whole + 2)]
                assert [job for job in found if job[3] > job[2]] == list(jobs(plan, programs, program))


def test_obstacles_are_named():
    q = k = v = torch.empty(1, 8, 2, 128, dtype=torch.bfloat16)
    assert "compute capability 9.0" in api.obstacle(q, k, v)

    class OnCard:
        """As much of a tensor as `obstacle` looks at, on a card."""

        def __init__(self, x: Tensor) -> None:
            self.x, self.device = x, torch.device("cuda", 0)

        def __getattr__(self, name: str) -> object:
            return getattr(self.x, name)

    def told(*tensors: Tensor) -> str | None:
        with patch("torch.cuda.get_device_capability", lambda *_: (9, 0)):
            return api.obstacle(*map(OnCard, tensors))

    assert told(q, k, v) is None
    assert told(q, k[:, :3], v[:, :3]) is None, "the first tokens of a cache"
    assert "bfloat16 or float16, got torch.float32" in told(q.float(), k, v)
    assert "got torch.bfloat16, torch.bfloat16 and torch.float16" in told(q, k, v.half())
    assert "heads of 128 channels, got 64 and 128" in told(q[..., :64], k[..., :64], v)
    assert "as many heads" in told(q, k[:, :, :1], v) and "none of them empty" in told(q, k[:, :0], v[:, :0])
    odd = torch.empty(1, 8, 2, 132, dtype=torch.bfloat16)
    assert "bulk copies" in told(q, odd[..., 1:129], v) and "bulk copies" in told(q, k, odd[..., :128])
    assert "bulk copies" in told(q, k.transpose(1, 3).contiguous().transpose(1, 3), v)
    assert "bulk copies" in told(q.expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v.repeat(2, 1, 1, 1))


@pytest.mark.slow
def test_the_kernel_compiles_for_its_card(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from triton.compiler import CompiledKernel

    from rcm.kernels import precompile
    from rcm.kernels.persistent_attention import launch
    from rcm.kernels.persistent_attention.compile_list import attention_plan
    from tests.support.pretend_gpu import pretended

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[CompiledKernel] = []

    with pretended(), patch.object(launch, "processors", lambda _: 132), patch.object(CompiledKernel, "run", property(found.append)):
        precompile.precompile(attention_plan, device="cuda", threads=2)
    assert {kernel.name for kernel in found} == {"hopper_forward", "merge_parts"}
    kernel = next(kernel for kernel in found if kernel.name == "hopper_forward")
    assert kernel.metadata.shared <= 227 * 1024
    ptx, tiles = kernel.asm["ptx"], Tiles()
    products = len(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16", ptx))
    # per consumer: S and P V of the loop, the first S and the last P V, 16 channels or keys at a
    # time
    assert products == tiles.consumers * 2 * (128 // 16 + tiles.block_n // 16) == ptx.count("wgmma.mma_async")
    assert len(re.findall(r"st\.shared|stmatrix", ptx)) <= 2 * tiles.consumers, "weights stay in registers"


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * 128**-0.5).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("q_len", "count", "batch", "strength"),
    [(1, 1, 2, 1.0), (130, 129, 2, 1.0), (64, 16, 1, 1.0), (1560, 4680, 1, 6.0), (4680, 9000, 1, 1.0)],
)
def test_the_kernel_on_a_card(q_len, count, batch, strength, dtype):
    """Captured, on the first tokens of a cache whose other slots hold no numbers."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != api.CAPABILITY:
        pytest.skip("needs a card of compute capability 9.0")
    draw = torch.Generator("cuda").manual_seed(count)
    q, k, v = (torch.randn(batch, n, 3, 128, generator=draw, device="cuda").to(dtype) for n in (q_len, count + 200, count + 200))
    k *= strength
    k[:, count:], v[:, count:] = float("nan"), float("nan")
    k, v = k[:, :count], v[:, :count]
    assert api.obstacle(q, k, v) is None
    api.attend(q, k, v, scale=128**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = api.attend(q, k, v, scale=128**-0.5)
    graph.replay()
    library = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    truth = exact(q, k, v)
    error, budget = ((x.double() - truth).norm() / truth.norm() for x in (found, library))
    assert error <= 1.3 * budget + 5e-4
