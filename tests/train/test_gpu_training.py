"""On one CUDA device: bf16 with fp32 master weights, compiled and checkpointed blocks, asynchronous
saves, exact resume.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.parallel.mesh import ParallelDims, process_group
from rcm.train.checkpoint import Checkpointer
from rcm.train.metrics import JsonLines
from rcm.train.trainer import Trainer, TrainerConfig
from tests.support.dist import run_ranks
from tests.support.toy_method import make_loader, make_run
from tests.train.run_support import DESCRIPTION, everything, launch, lines, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_cuda(
    job: Path, *, max_iter: int, device: torch.device, precision: str, compile_blocks: bool, dims: ParallelDims | None = None
) -> Trainer:
    dims = dims or ParallelDims(device_type="cuda")
    method, state = make_run(dims=dims, precision=precision, checkpoint="block_wise", device=device, compile_blocks=compile_blocks)
    loader = make_loader(dims=dims)
    checkpointer = Checkpointer(job, dims=dims, description=DESCRIPTION, asynchronous=True)
    checkpointer.load(state, loader=loader)
    config = TrainerConfig(max_iter=max_iter, logging_iter=1)
    sinks = [JsonLines(job / "metrics.jsonl", resumed_at=state.iteration)] if dims.rank == 0 else []
    return Trainer(method, loader, state=state, dims=dims, config=config, device=device, checkpointer=checkpointer, sinks=sinks)


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_bf16_training_follows_fp32_and_resumes_exactly(tmp_path: Path, compile_blocks: bool) -> None:
    launch(tmp_path / "cpu", max_iter=6, precision="fp32").run()
    with process_group("cuda") as device:
        whole = on_cuda(tmp_path / "whole", max_iter=6, device=device, precision="bf16", compile_blocks=compile_blocks)
        whole.run()
        on_cuda(tmp_path / "parts", max_iter=3, device=device, precision="bf16", compile_blocks=compile_blocks).run()
        second = on_cuda(tmp_path / "parts", max_iter=6, device=device, precision="bf16", compile_blocks=compile_blocks)
        assert second.state.iteration == 3
        second.run()
        assert {p.dtype for p in whole.method.nets["student"].parameters()} == {torch.float32}
        assert same(everything(whole.state), everything(second.state))
    for mine, theirs in zip(lines(tmp_path / "whole"), lines(tmp_path / "cpu"), strict=True):
        for key in (k for k in theirs if k.startswith("loss/")):
            assert mine[key] == pytest.approx(theirs[key], rel=0.05), key


def on_two_gpus(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Float64 training over NCCL: one sequence on two GPUs, and two data streams with an
    asynchronous save and a resume between.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    found = []
    for name, dims, stops in (
        ("cp", ParallelDims(1, 1, 2, "cuda"), (6,)),
        ("whole", ParallelDims(1, 2, 1, "cuda"), (6,)),
        ("parts", ParallelDims(1, 2, 1, "cuda"), (3, 6)),
    ):
        for max_iter in stops:
            trainer = on_cuda(folder / name, max_iter=max_iter, device=device, precision="fp64", compile_blocks=False, dims=dims)
            trainer.run()
        found.append({k: v.cpu() for k, v in everything(trainer.state).items()})
    return found


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_like_one_cpu_and_resume_exactly(tmp_path: Path) -> None:
    single = launch(tmp_path / "cpu", max_iter=6)
    single.run()
    expected = everything(single.state)
    for shared, whole, resumed in run_ranks(2, on_two_gpus, tmp_path, tmp_path=tmp_path, device_type="cuda"):
        assert same(whole, resumed)
        assert all(torch.allclose(shared[k].double(), expected[k].double(), rtol=1e-7, atol=1e-9) for k in expected)
