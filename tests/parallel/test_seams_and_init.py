"""On few ranks: what the exchanges do to single tokens, how weights reach a sharded network from
memory, a DCP directory, or a seed, and whose a refusal is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import rcm.parallel.ulysses as ulysses
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.parallel.agree import agree
from rcm.parallel.apply import parallelize
from rcm.parallel.fsdp import local
from rcm.parallel.init import check_equal, drawn_weights, load_dcp, load_full, materialise, on_meta
from rcm.parallel.mesh import ParallelDims
from tests.support.dist import run_ranks
from tests.support.toy_method import make_net

FP32 = Precision.preset("fp32")


def exchanges() -> dict[str, Any]:
    """Every statement about the exchanges, on tokens whose value is their own address."""
    dims = ParallelDims(1, 1, 2)
    group, rank = dims.cp_group, dims.cp_rank
    batch, frames, tokens, heads, width = 2, 3, 4, 6, 5
    whole = torch.arange(batch * frames * tokens * heads * width, dtype=torch.float64).view(batch, frames, tokens, heads, width)
    here = whole[:, :, 2 * rank : 2 * rank + 2].reshape(batch, frames * 2, heads, width)
    by_head = ulysses._to_heads(here, frames, group)
    back = ulysses._to_tokens(by_head, frames, group)
    entered = ulysses.Enter(group)(whole.flatten(3).requires_grad_())
    result = {
        "heads": torch.equal(by_head, whole.reshape(batch, frames * tokens, heads, width)[:, :, 3 * rank : 3 * rank + 3]),
        "tokens": torch.equal(back, here),
        "enter": torch.equal(entered, whole.flatten(3)[:, :, 2 * rank : 2 * rank + 2]),
        "leave": torch.equal(ulysses.Leave(group)(entered), whole.flatten(3)),
    }
    outer = whole.flatten(3).clone().requires_grad_()
    weight = torch.arange(outer.numel(), dtype=torch.float64).view_as(outer)
    (ulysses.Leave(group)(ulysses.Enter(group)(outer) * 3) * weight).sum().backward()
    result["gradient outside the seams is whole and true on every rank"] = torch.equal(outer.grad, 3 * weight)
    for name, call in {
        "tokens": lambda: ulysses.Enter(group)(whole.flatten(3)[:, :, :3]),
        "heads": lambda: ulysses.HeadParallelCore(nn.Identity(), group=group)(*[here[:, :, :3]] * 3, _Frames(frames), None, None),
        "weights": lambda: ulysses.HeadParallelCore(nn.Linear(2, 2), group=group),
    }.items():
        try:
            call()
            result["error about " + name] = False
        except ConfigError as error:
            result["error about " + name] = name in str(error)
    return result


class _Frames:
    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames


@pytest.mark.dist
def test_exchanges_move_every_token_where_it_belongs(tmp_path: Path) -> None:
    for found in run_ranks(2, exchanges, tmp_path=tmp_path):
        assert found == dict.fromkeys(found, True)


def weights_arrive(folder: Path, dims: ParallelDims) -> dict[str, Any]:
    """Load in each way; return the whole weights and the errors."""

    def empty() -> nn.Module:
        return materialise(parallelize(on_meta(lambda: make_net(seed=1)), dims=dims, precision=FP32), device="cpu")

    def weights(net: nn.Module) -> dict[str, torch.Tensor]:
        return {k: v.full_tensor().clone() for k, v in net.state_dict().items()}

    truth = make_net(seed=9).state_dict()
    found: dict[str, Any] = {}
    net = empty()
    load_full(net, truth if dist.get_rank() == 0 else None)
    check_equal(net, dims=dims)
    found["full"] = weights(net)
    dcp.save({"net." + k: v for k, v in net.state_dict().items()} | {"net_ema.x": torch.zeros(1)}, checkpoint_id=str(folder))
    net = empty()
    load_dcp(net, folder)
    found["dcp"] = weights(net)
    net = empty()
    load_full(net, drawn_weights(lambda: make_net(seed=4), seed=11) if dist.get_rank() == 0 else None)
    found["init"] = weights(net)
    errors = {}
    short = {k: v for k, v in truth.items() if k != "head.head.weight"} | {"stray": torch.zeros(1)}
    bent = truth | {"head.head.bias": torch.zeros(3)}
    for name, call in {
        "missing": lambda: load_full(net, short if dist.get_rank() == 0 else None),
        "shape": lambda: load_full(net, bent if dist.get_rank() == 0 else None),
        "prefix": lambda: load_dcp(net, folder, prefix="net_ema."),
        "path": lambda: load_dcp(net, folder / "nowhere"),
    }.items():
        try:
            call()
            errors[name] = ""
        except CheckpointError as error:
            errors[name] = str(error)
    found["errors"] = errors
    found["unequal"] = ""
    if dims.dp_replicate > 1:
        with torch.no_grad():
            local(net.head.head.bias)[:1] += float(dist.get_rank())
        try:
            check_equal(net, dims=dims)
        except CheckpointError as error:
            found["unequal"] = str(error)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("dims", [ParallelDims(1, 2, 1), ParallelDims(2, 1, 1)], ids=["sharded", "replicated"])
def test_weights_reach_every_rank(dims: ParallelDims, tmp_path: Path) -> None:
    truth = make_net(seed=9).state_dict()
    fresh = make_net(seed=4)
    fresh.init_weights(torch.Generator().manual_seed(11))
    for found in run_ranks(2, weights_arrive, tmp_path / "dcp", dims, tmp_path=tmp_path):
        for name, expected in {"full": truth, "dcp": truth, "init": fresh.state_dict()}.items():
            assert sorted(found[name]) == sorted(expected)
            assert all(torch.equal(found[name][k], expected[k]) for k in expected), name
        errors = found["errors"]
        assert "head.head.weight" in errors["missing"] and "stray" in errors["missing"]
        assert "head.head.bias has shape (3,)" in errors["shape"]
        assert "net_ema.x" in errors["prefix"] and "missing" in errors["prefix"]
        assert "nowhere" in errors["path"] and ".metadata" in errors["path"]
        assert ("head.head.bias" in found["unequal"]) == (dims.dp_replicate > 1)


def refusals() -> list[tuple[str, int, bool]]:
    """Two of three ranks agree: on what one of them finds, and on what both do."""
    found, group, rank = [], dist.new_group([1, 2]), dist.get_rank()
    for finders in ((2,), (1, 2)) if rank else ():
        with pytest.raises(ConfigError) as error:
            agree(ConfigError("no room") if rank in finders else None, group=group)
        voices = error.value.heard_from
        found.append((str(error.value), voices.first, voices.unanimous))
    return found


@pytest.mark.dist
def test_a_refusal_within_a_group_names_the_rank_of_the_launch(tmp_path: Path) -> None:
    told = [("no room", 2, False), ("no room", 1, True)]
    assert run_ranks(3, refusals, tmp_path=tmp_path) == [[], told, told]
