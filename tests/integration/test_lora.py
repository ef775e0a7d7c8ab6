"""Training adapters by the command: one base for all roles, checkpoints of adapters alone, exact
resume, refusals; on two ranks as on one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.configs import registry_distill
from rcm.configs.build_method import build_method
from rcm.configs.build_nets import NetBuilder
from rcm.configs.compose import compose_run
from rcm.nets.lora import AdaptedNet
from rcm.nets.wan.adapters import LAYERS
from rcm.nets.wan.lora import by_layer
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.wan_files import network_weights
from rcm.pipelines.weight_files import open_weights
from tests.integration.entry import everything, launch, lines, same, stored, weights, write_network
from tests.integration.test_ranks import exact_on_two_ranks
from tests.integration.test_resume import self_forced

M = "model.config."
LORA = M + "lora.rank=2"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return write_network(tmp_path / "start.safetensors", seed=3)


def size(job: Path) -> int:
    return sum(path.stat().st_size for path in (job / "checkpoints").rglob("*.distcp"))


def test_three_and_three_iterations_are_six(tmp_path: Path, start: Path) -> None:
    """Student, fake score and teacher start from one file."""
    more = [LORA, M + "bidirectional_guidance=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(*self_forced(whole, start, *more)) == 0
    assert launch(*self_forced(parts, start, *more, iterations=3)) == 0
    assert launch(*self_forced(parts, start, *more)) == 0
    assert lines(parts) == lines(whole) and same(everything(parts), everything(whole))


def test_roles_that_start_alike_are_one_network(tmp_path: Path, start: Path) -> None:
    """Student, teacher, fake score: by the weights that they start from."""
    other = write_network(tmp_path / "other.safetensors", seed=4)
    registry_distill.register()
    for paths, networks in (((start, start, ""), 1), ((other, start, ""), 2), ((other, start, other), 2), ((start, start, other), 2)):
        keys = dict(zip(("student_ckpt", "bidirectional_teacher_ckpt", "fake_score_ckpt"), paths, strict=True))
        words = [*self_forced(tmp_path / "job", start, LORA, M + "bidirectional_guidance=1"), *(f"{M}{k}={v}" for k, v in keys.items())]
        config = compose_run(words, environ={}).config
        nets = NetBuilder(config.model.config, dims=ParallelDims(), device=torch.device("cpu"), seed=0)
        method = build_method(config, nets, negative=lambda: None)
        held = [denoiser.net for denoiser in (method.student, method.teacher, method.fake_score)]
        bases = [net.net if isinstance(net, AdaptedNet) else net for net in held]
        assert len(set(map(id, bases))) == networks, paths
        storages = {p.untyped_storage().data_ptr() for net in bases for name, p in net.named_parameters() if ".adapters." not in name}
        assert len(storages) == networks * len(stored(start))
        trained = [p for net in method.trainable.values() for p in net.parameters()]
        assert len(trained) == 2 * 2 * len(LAYERS) and all(p.requires_grad for p in trained)
        assert not any(p.requires_grad for p in held[1].parameters())


def test_checkpoints_hold_adapters_alone(tmp_path: Path, start: Path, capfd: pytest.CaptureFixture) -> None:
    job, full = tmp_path / "job", tmp_path / "full"
    assert launch(*self_forced(job, start, LORA)) == 0
    assert launch(*self_forced(full, start)) == 0
    assert "adapters of student and fake_score on one base" in capfd.readouterr().err
    for role in ("reg", "ema", "fake_score"):
        factors = by_layer(weights(job, role))
        assert set(factors) == {f"blocks.0.{layer}" for layer in LAYERS} and len(weights(job, role)) == 2 * len(LAYERS)
        assert all(up.abs().max() > 0 for _, up in factors.values()), f"{role} was not trained"
    held = everything(job)
    adapted = sum(p.numel() for p in weights(job).values())
    base = sum(p.numel() for p in stored(start).values())
    # per student number: weight, average, two moments and a count of steps; per number of the fake
    # score one less
    assert sum(v.numel() for k, v in held.items() if "exp_avg" in k or "net" in k.partition("/")[2].partition(".")[0]) < 8 * adapted
    assert adapted < base / 5 and size(job) < size(full) / 2


def test_the_base_stays_as_it_was(tmp_path: Path, start: Path) -> None:
    assert launch(*self_forced(tmp_path / "job", start, LORA, M + "lora.targets=[self_attn.q,ffn.2]")) == 0
    network, base = network_weights(open_weights(tmp_path / "job")), stored(start)
    changed = {name for name in network if not torch.equal(network[name], base[name])}
    assert changed == {"blocks.0.self_attn.q.weight", "blocks.0.ffn.2.weight"}


def test_adapters_are_wide_on_a_narrow_base(tmp_path: Path, start: Path) -> None:
    """bfloat16 with FSDP2 on one rank: factors and their averages are float32, and small steps are
    not lost.
    """
    job = tmp_path / "job"
    assert launch(*self_forced(job, start, LORA, "precision=bf16", "optimizer.lr=1e-6", iterations=4)) == 0
    for role in ("reg", "ema", "fake_score"):
        factors = weights(job, role)
        assert {value.dtype for value in factors.values()} == {torch.float32}
    moved = weights(job)["blocks.0.ffn.0.lora_B.weight"]
    assert 0 < moved.abs().max() < 1e-5
    assert open_weights(job).headers and network_weights(open_weights(job)).told["dtype"] == "bfloat16"


def test_a_run_starts_from_adapters(tmp_path: Path, start: Path) -> None:
    """Stage after stage: the base of the second run is the first one's network, as it was then: the
    first run may go on.
    """
    assert launch(*self_forced(tmp_path / "first", start, LORA)) == 0
    second = self_forced(tmp_path / "second", start, LORA, M + f"student_ckpt={tmp_path / 'first'}", iterations=1)
    assert launch(*second, "optimizer.lr=1e-12", "scheduler.warm_up_steps=0") == 0
    first, found = (network_weights(open_weights(tmp_path / name), weights="ema") for name in ("first", "second"))
    assert all(torch.allclose(found[name], first[name], rtol=0, atol=1e-6) for name in first)
    before, base = dict(found), Path(found.told["path"])
    assert launch(*self_forced(tmp_path / "first", start, LORA, "checkpoint.keep_last=0", iterations=8)) == 0
    after = network_weights(open_weights(tmp_path / "second"), weights="ema")
    assert same(dict(after), before)
    assert launch(*self_forced(tmp_path / "second", start, LORA, M + f"student_ckpt={base}", iterations=2)) == 0


REFUSED = {
    "rank": ([M + "lora.rank=3"], "holds other low-rank adapters (rank: 2 there, 3 here, alpha: 2.0 there, 3.0 here); set model"),
    "layers": ([LORA, M + "lora.targets=[q]"], "holds other low-rank adapters (layers: ["),
    "all weights": ([], "holds low-rank adapters of rank 2, this run trains all weights; set model.config.lora.rank=2, or start from it"),
    "another precision": ([LORA, "precision=bf16"], "(bfloat16, digest", "; set model.config.precision=float32, or start from it"),
    "another base": ([LORA, M + "student_ckpt=OTHER"], "holds adapters of the student on the weights of"),
}


@pytest.mark.slow
def test_what_does_not_continue_is_refused(tmp_path: Path, start: Path, capfd: pytest.CaptureFixture) -> None:
    job, other = tmp_path / "job", write_network(tmp_path / "other.safetensors", seed=4)
    assert launch(*self_forced(job, start, LORA, iterations=2)) == 0
    before = everything(job)
    for case, (words, *told) in REFUSED.items():
        capfd.readouterr()
        more = [word.replace("OTHER", str(other)) for word in words]
        assert launch(*self_forced(job, start, *more)) != 0, case
        error = capfd.readouterr().err
        assert all(part in error for part in told) and "Traceback" not in error, case
        if case == "another base":
            assert str(start) in error and str(other) in error
    assert same(everything(job), before)
    full = tmp_path / "full"
    assert launch(*self_forced(full, start, iterations=1)) == 0
    assert launch(*self_forced(full, start, LORA)) != 0
    assert "holds all weights, this run trains adapters of rank 2; set model.config.lora.rank=0" in capfd.readouterr().err
    moved = start.rename(tmp_path / "moved.safetensors")
    assert launch(*self_forced(job, moved, LORA, iterations=3)) == 0, "the same weights elsewhere are the same base"


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_equal_one_and_resume_exactly(tmp_path: Path, start: Path) -> None:
    """Tangents, rollouts and both roles through FSDP2 and Ulysses, in float64 with blocks
    recomputed.
    """
    modes = [f"{M}{role}.sac_config.mode=block_wise" for role in ("net", "net_fake_score")]
    exact_on_two_ranks(tmp_path, start, LORA, modes[0], critic=modes[1:])
    for kind in ("scm", "dmd"):
        one, two = weights(tmp_path / f"{kind}_one"), weights(tmp_path / f"{kind}_context")
        assert all(torch.allclose(two[name], one[name], rtol=1e-6, atol=1e-9) for name in one)
