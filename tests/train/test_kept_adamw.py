"""Moments kept in other forms and in host memory: bit for bit where nothing is rounded, unbiased
where it is, sharded, saved and read back exactly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rcm.core.errors import ConfigError
from rcm.train.ema import EMAConfig, PowerEMA
from rcm.train.kept_adamw import KeptAdamW, buckets_of
from rcm.train.moments import Full, HalfWidth, forms, stochastic_bfloat16
from rcm.train.optim import AdamWConfig, ShardAdamW
from tests.support.dist import run_ranks

CONFIG = AdamWConfig(lr=1e-2)
OPTIONS = {"lr": CONFIG.lr, "weight_decay": CONFIG.weight_decay, "betas": CONFIG.betas, "eps": CONFIG.eps}


def layer(*, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(64, 5)


def train(optimizer: torch.optim.Optimizer, net: torch.nn.Module, *, updates: int, first: int = 0) -> None:
    for update in range(first, first + updates):
        generator = torch.Generator().manual_seed(update)
        for p in net.parameters():
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        for group in optimizer.param_groups:
            group["update"] = update
        optimizer.step()


def values(net: torch.nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("bucket", [1, 10**6])
def test_full_forms_are_the_plain_optimiser_bit_for_bit(host: bool, bucket: int) -> None:
    mine, oracle = layer(), layer()
    train(ShardAdamW(oracle.parameters(), fused=True, **OPTIONS), oracle, updates=4)
    optimizer = KeptAdamW(mine.parameters(), forms=(Full(), Full()), host=host, bucket=bucket, **OPTIONS)
    train(optimizer, mine, updates=4)
    assert equal(values(mine), values(oracle))


def test_buckets_hold_all_in_order_and_no_more_than_asked() -> None:
    sizes = [3, 4, 10, 1, 1, 5]
    tensors = [torch.empty(n) for n in sizes]
    assert [[len(t) for t in bucket] for bucket in buckets_of(tensors, 7)] == [[3, 4], [10], [1, 1, 5]]


def test_rounding_at_random_keeps_the_mean_and_takes_neighbours_alone() -> None:
    x = torch.tensor([1.0 + 2**-9, -3.0e-20, 2.5, float("inf"), float("nan"), 0.0, 3.4e38])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([stochastic_bfloat16(x, generator).double() for _ in range(4000)])
    assert set(drawn[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    # a quarter of a step up: 1/4 of the draws, give or take four deviations
    assert ((drawn[:, 0] != 1.0).double().mean() - 0.25).abs() < 4 * (0.1875 / 4000) ** 0.5
    assert (drawn[:, 1].mean() / -3.0e-20 - 1).abs() < 1e-3
    assert (drawn[:, 2] == 2.5).all() and drawn[:, 3].isposinf().all() and drawn[:, 4].isnan().all()
    assert (drawn[:, 5] == 0).all()


def test_small_increments_are_not_lost_in_half_width() -> None:
    """A second moment of beta 0.999 that rises by far less than half a step of bfloat16."""
    form, like, generator = HalfWidth(), torch.ones(4096), torch.Generator().manual_seed(0)
    kept = form.blank(like)
    form.close(kept, like, generator)
    for _ in range(200):
        opened = form.opened(kept, like)
        form.close(kept, opened.lerp(torch.full_like(opened, 2.0), 1e-3), generator)
    assert (form.opened(kept, like).mean() - (2 - 0.999**200)).abs() < 2e-3


def test_replicas_and_resumed_runs_draw_the_same() -> None:
    whole, parts = layer(), layer()
    first = AdamWConfig(states="bfloat16").build(whole.parameters())
    train(first, whole, updates=6)
    half = AdamWConfig(states="bfloat16").build(parts.parameters())
    train(half, parts, updates=3)
    again = AdamWConfig(states="bfloat16").build(parts.parameters(), host=True)
    for p in parts.parameters():
        blank = again.blank_state(p)
        again.state[p] = {key: blank[key].copy_(value) for key, value in half.state[p].items()}
    train(again, parts, updates=3, first=3)
    assert equal(values(whole), values(parts))
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in again.state.values())


def sharded() -> dict[str, bool]:
    """Two ranks with five rows between them, states on the host, against the whole layer."""
    net, whole = layer(), layer()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    average, expected = (PowerEMA(n, EMAConfig(), host=n is net) for n in (net, whole))
    mine = CONFIG.build(net.parameters(), host=True)
    oracle = ShardAdamW(whole.parameters(), fused=True, **OPTIONS)
    for update in range(3):
        train(mine, net, updates=1, first=update)
        train(oracle, whole, updates=1, first=update)
        average.update(net, index=update)
        expected.update(whole, index=update)
    kept = [mine.state[p]["exp_avg"].full_tensor() for p in net.parameters()]
    shadows = [average.shadow[name].full_tensor() for name in expected.shadow]
    coded = forms("bfloat16")[0].blank(next(net.parameters()).to_local())
    return {
        "weights": equal(values(net), values(whole)),
        "moments": equal(kept, [oracle.state[p]["exp_avg"] for p in whole.parameters()]),
        "average": equal(shadows, list(expected.shadow.values())),
        "rows": coded[""].shape[0] == (3 if torch.distributed.get_rank() == 0 else 2),
    }


@pytest.mark.dist
def test_shards_on_the_host_are_those_of_the_whole(tmp_path: Path) -> None:
    for found in run_ranks(2, sharded, tmp_path=tmp_path):
        assert all(found.values()), found


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.optim", "torchao.optim.subclass_8bit", "torchao.optim.subclass_fp8"):
        monkeypatch.setitem(sys.modules, name, None)
    for states in ("int8", "float8"):
        with pytest.raises(ConfigError, match=rf"states={states} needs .*torchao.*pip install"):
            AdamWConfig(states=states).build(layer().parameters())
    with pytest.raises(
        ConfigError, match="^model.config.gan.optimizer.states=int8 needs .*choose model.config.gan.optimizer.states=bfloat16$"
    ):
        forms("int8", knob="model.config.gan.optimizer.states")


@pytest.mark.parametrize("states", ["int8", "float8"])
def test_eight_bit_states_are_codes_per_block_of_a_row(states: str) -> None:
    pytest.importorskip("torchao.optim")
    first, second = forms(states)
    value = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    for form, x in ((first, value), (second, value.square())):
        kept = form.blank(x)
        assert kept[""].itemsize == 1 and kept["_scale"].shape == (6, 2)
        assert not form.opened(kept, x).any()
        form.close(kept, x, torch.Generator())
        off = (form.opened(kept, x) - x).view(6, 2, 256)
        assert (off.abs().amax(-1) <= 0.07 * x.view(6, 2, 256).abs().amax(-1)).all()
        rows = form.blank(x[:4])
        form.close(rows, x[:4], torch.Generator())  # a shard of rows holds the codes of the whole
        assert torch.equal(rows[""].view(torch.uint8), kept[""][:4].view(torch.uint8))
        assert torch.equal(rows["_scale"], kept["_scale"][:4])
    assert list(first.blank(torch.zeros(512))) == [""]  # one axis: full precision
    assert list(first.blank(torch.zeros(8, 80))) == [""]
