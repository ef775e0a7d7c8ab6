"""Memory on the host while a real self-forced run trains: the numbers of a run without it, bit for
bit, what is where when, resume, and what is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from rcm.configs import registry_distill
from rcm.configs.build import UNCHECKED, build_trainer, job_folder
from rcm.configs.compose import compose_run
from rcm.core.errors import CheckpointError, ConfigError
from rcm.parallel.fsdp import local, stored_tensors
from rcm.parallel.mesh import ParallelDims, process_group
from rcm.pipelines.finite import bad_weight
from rcm.train.offload import IdleRoles
from rcm.train.trainer import Trainer
from tests.support.dist import run_ranks
from tests.support.toy_method import CHANNELS, FRAMES, HEIGHT, WIDTH, make_net
from tests.train.run_support import everything, lines, same

HOST = ["trainer.offload.parameters=True", "trainer.offload.idle_roles=True"]
ALL = ["trainer.offload.states=True", "trainer.offload.idle_roles=True"]
GAN = [
    "model.config.gan={loss_scale:0.1,hidden:8}",
    "model.config.net_fake_score.num_layers=2",
    "model.config.net_fake_score.sac_config.mode=block_wise",
]
"""A discriminator: its gradient passes through a fake score that is recomputed, and then leaves."""
NETS = ("net", "net_fake_score", "net_bidirectional_teacher")
SIZES = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 1}


def words(experiment: str, folder: Path, *more: str) -> list[str]:
    """A run of a second: tiny networks, made-up data, two steps each of student and critic."""
    sizes = [f"model.config.{net}.{name}={value}" for net in NETS for name, value in SIZES.items()]
    return [
        f"experiment={experiment}", f"job.output_root={folder}", "trainer.max_iter=4", "trainer.logging_iter=1",
        "checkpoint.save_iter=2", "checkpoint.keep_last=0", "model.config.allow_random_init=True", "dataloader_train.kind=fake",
        "dataloader_train.num_workers=0", "dataloader_train.batch_size=2", "model.config.student_update_freq=2",
        "model.config.latent_hw=[4,8]", "model.config.state_t=4", "trainer.sampling.every_n=0",
        "trainer.sampling.ema_every_n=0", *sizes, *more,
    ]  # fmt: skip


def trainer_of(experiment: str, folder: Path, *more: str, dims: tuple[int, int, int] = (1, 1, 1), device: str = "cpu") -> Trainer:
    registry_distill.register()
    shard, cp = dims[1] * dims[2], dims[2]
    layout = [f"model.config.fsdp_shard_size={shard}", f"model_parallel.context_parallel_size={cp}"]
    run = compose_run([*words(experiment, folder, *more), *layout], environ={}, world_size=dims[0] * shard)
    if torch.distributed.get_rank() == 0:
        job_folder(run).mkdir(parents=True, exist_ok=True)
        (job_folder(run) / UNCHECKED).write_text(run.to_yaml())
    return build_trainer(run, dims=ParallelDims(*dims, device), device=torch.device(device))


def trained(
    experiment: str, folder: Path, *more: str, saves: bool = False, dims: tuple[int, int, int] = (1, 1, 1), device: str = "cpu"
) -> dict[str, Any]:
    """Weights, states and log lines at the end."""
    trainer = trainer_of(experiment, folder, *more, dims=dims, device=device)
    if not saves:
        trainer.checkpointer = None
    trainer.run()
    (job,) = {path.parent for path in folder.rglob("metrics.jsonl")}
    return {"state": everything(trainer.state), "lines": lines(job), "job": job}


@pytest.mark.parametrize(
    ("experiment", "levers", "sync"),
    [
        ("toy_sf_dmd_2step_c1-1", ALL, "last"),
        ("toy_sf_dmd_2step_c1-1_replayed", HOST, "each"),
        ("gan", ALL, "last"),
        pytest.param("gan", HOST, "each", marks=pytest.mark.slow),
        pytest.param("toy_sf_dmd_2step_c1-1_replayed", ALL, "last", marks=pytest.mark.slow),
        pytest.param("toy_sf_dmd_2step_c1-1", HOST, "last", marks=pytest.mark.slow),
        pytest.param("toy_tf_scm_sf_dmd_c1-1", ALL, "last", marks=pytest.mark.slow),
    ],
)
def test_waiting_in_host_memory_changes_no_bit(tmp_path: Path, experiment: str, levers: list[str], sync: str) -> None:
    more = [f"model.config.net_causal_teacher.{k}={v}" for k, v in SIZES.items()] if "scm" in experiment else []
    more.append(f"trainer.gradient_sync={sync}")
    gan = experiment == "gan"
    if gan:
        experiment, more = "toy_sf_dmd_2step_c1-1", [*more, *GAN]
    with process_group("cpu"):
        plain = trained(experiment, tmp_path / "plain", *more)
        found = trained(experiment, tmp_path / "host", *more, *levers)
    if gan and levers is HOST:  # FSDP2 adds the gradients of several passes in another order
        for key, value in plain["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-9, atol=1e-12)
        return
    assert same(plain["state"], found["state"])
    assert plain["lines"] == found["lines"]


@pytest.mark.parametrize(
    ("experiment", "levers"), [("toy_sf_dmd_2step_c1-1_replayed", []), ("toy_sf_dmd_2step_c1-1", HOST)], ids=["replayed", "host"]
)
def test_a_student_that_stays_gathered_changes_no_bit(
    tmp_path: Path, experiment: str, levers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the passes of a rollout and of replayed chunks one gathers weights."""
    gathers, unshard = [], FSDPParamGroup.unshard
    monkeypatch.setattr(
        FSDPParamGroup, "unshard", lambda group, *args: (group.is_unsharded or gathers.append(group), unshard(group, *args))[1]
    )
    more, found, count = ["model.config.precision=bfloat16", "trainer.gradient_sync=each", *levers], {}, {}
    with process_group("cpu"):
        for gib in ("0", "4.0"):
            gathers.clear()
            found[gib] = trained(experiment, tmp_path / gib, *more, f"trainer.keep_gathered_gib={gib}")
            count[gib] = len(gathers)
    assert same(found["0"]["state"], found["4.0"]["state"])
    assert found["0"]["lines"] == found["4.0"]["lines"]
    assert count["4.0"] < 0.5 * count["0"], count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("experiment", "more"),
    [
        ("toy_sf_dmd_2step_c1-1", []),
        ("toy_sf_dmd_2step_c1-1_replayed", []),
        ("toy_sf_dmd_2step_c1-1", GAN),
    ],
    ids=["plain", "replayed", "discriminator"],
)
def test_on_a_card_waiting_changes_no_bit_and_less_is_there(tmp_path: Path, experiment: str, more: list[str]) -> None:
    """Streams and events in their places; weights that live on the host round otherwise. A
    discriminator's head stays on the card while the network it reads lives on the host.
    """
    more = [*more, "trainer.gradient_sync=each", "model.config.precision=bfloat16", "model.config.frozen_weights=fp8_storage"]
    found = {}
    with process_group("cuda"):
        for name, levers in {"warm": [], "plain": [], "waits": ALL, "lives": HOST}.items():
            torch.cuda.reset_peak_memory_stats()
            found[name] = trained(experiment, tmp_path / name, *more, *levers, device="cuda") | {"peak": torch.cuda.max_memory_allocated()}
    assert same(found["plain"]["state"], found["waits"]["state"])
    assert found["waits"]["peak"] < found["plain"]["peak"] and found["lives"]["peak"] < found["plain"]["peak"]
    for key, value in found["plain"]["state"].items():
        torch.testing.assert_close(found["lives"]["state"][key], value, rtol=0.05, atol=1e-3)


HALF = ["optimizer.states=bfloat16", "model.config.optimizer_fake_score.states=bfloat16"]


@pytest.mark.parametrize("states", ["bfloat16", *(pytest.param(s, marks=pytest.mark.slow) for s in ("float32", "int8", "float8"))])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, states: str) -> None:
    if states in ("int8", "float8"):
        pytest.importorskip("torchao.optim")
    """Written in the background, while the next update changes what is on the host; products in
    FP8.
    """
    more = [*ALL, *(f"model.config.{net}.linear_precision=fp8" for net in NETS[:2])]
    more += [f"optimizer.states={states}", f"model.config.optimizer_fake_score.states={states}"]
    more.append("checkpoint.dcp_async_mode_enabled=True")
    with process_group("cpu"):
        whole = trained("toy_sf_dmd_2step_c1-1", tmp_path, *more, saves=True)
        (whole["job"] / "checkpoints" / "latest_checkpoint.txt").write_text("iter_000000002\n")
        found = trained("toy_sf_dmd_2step_c1-1", tmp_path, *more)
        assert same(whole["state"], found["state"])
        other = "bfloat16" if states == "float32" else "float32"
        with pytest.raises((ConfigError, CheckpointError), match=r"optimizer\.states"):
            trainer_of("toy_sf_dmd_2step_c1-1", tmp_path, f"optimizer.states={other}")


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Sharded, without and with everything on the host, saved half-way."""
    plain = trained("toy_sf_dmd_2step_c1-1", folder / "plain", *HALF, "trainer.max_iter=2", dims=(1, 2, 1))
    found = trained("toy_sf_dmd_2step_c1-1", folder / "host", *ALL, *HALF, "trainer.max_iter=2", saves=True, dims=(1, 2, 1))
    return {"same": same(plain["state"], found["state"]) and plain["lines"] == found["lines"], "state": found["state"]}


@pytest.mark.dist
@pytest.mark.slow
def test_shards_wait_too_and_another_world_size_resumes(tmp_path: Path) -> None:
    first, second = run_ranks(2, on_two_ranks, tmp_path, tmp_path=tmp_path)
    assert first["same"] and second["same"]
    with process_group("cpu"):
        resumed = trainer_of("toy_sf_dmd_2step_c1-1", tmp_path / "host", *HALF).state
        assert resumed.iteration == 2
        assert same(everything(resumed), first["state"])


def present(net: torch.nn.Module) -> bool:
    shards = [p._local_tensor if hasattr(p, "_local_tensor") else p for p in net.parameters()]
    return all(shard.untyped_storage().nbytes() for shard in shards if shard.numel())


def test_one_network_beside_the_one_in_training(tmp_path: Path) -> None:
    """What is on the device whenever a block computes, and in the backward pass."""
    with process_group("cpu"):
        trainer = trainer_of("toy_sf_dmd_2step_c1-1", tmp_path, "trainer.offload.idle_roles=True")
        nets = {role: waiting.net for role, waiting in trainer.idle._roles.items()}
        assert set(nets) == {"student", "fake_score", "bidirectional_teacher"}
        assert not present(nets["bidirectional_teacher"])
        seen: set[tuple[str, tuple[str, ...]]] = set()

        def watch(role: str) -> Any:
            def hook(*_: Any) -> None:
                there = tuple(sorted(name for name, net in nets.items() if present(net)))
                seen.add((role, there))

            return hook

        for role, net in nets.items():
            net.blocks[0].register_forward_pre_hook(watch(role))
            if role != "bidirectional_teacher":
                net.head.register_full_backward_hook(watch(f"{role} backward"))
        trainer.run()
        assert seen == {
            ("student", ("student",)),
            ("fake_score", ("fake_score", "student")),
            ("bidirectional_teacher", ("bidirectional_teacher", "student")),
            ("student backward", ("student",)),
            ("student", ("fake_score", "student")),
            ("fake_score", ("fake_score",)),
            ("fake_score backward", ("fake_score",)),
        }
        weights = stored_tensors(nets["bidirectional_teacher"])  # reading them fetches them
        assert present(nets["bidirectional_teacher"]) and all(local(w).isfinite().all() for w in weights.values())
        trainer.idle.begin(())
        assert bad_weight(nets["student"]) is None, "previews look at the weights of a student that waits"


def test_a_gradient_through_a_network_that_would_leave_is_refused() -> None:
    idle, nets = IdleRoles(), {"student": make_net(seed=0), "teacher": make_net(seed=1).requires_grad_(False)}
    for role, net in nets.items():
        idle.add(role, net)
    idle.begin(["student"])
    x = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH)
    call(nets["teacher"], x)
    with pytest.raises(ConfigError, match=r"gradients through teacher while student .*idle_roles=False"):
        call(nets["teacher"], x.requires_grad_())
    idle.begin(["teacher"])
    with pytest.raises(ConfigError, match="gradients through student"):
        call(nets["student"], x.detach())
    judge = make_net(seed=2)
    idle.add("fake_score", judge, judges=True)  # it leaves with the next call, its gradient taken
    (pull,) = torch.autograd.grad(call(judge, x).sum(), x)
    assert pull.abs().max() > 0 and present(judge)
    call(nets["teacher"], x.detach())
    assert not present(judge)


def call(net: torch.nn.Module, x: Tensor) -> Tensor:
    from rcm.nets.condition import Condition
    from tests.support.toy_method import CONFIG, LAYOUT

    return net(x, torch.full((1, 1), 500.0), Condition(torch.zeros(1, 5, CONFIG.text_dim)), LAYOUT)


REFUSALS = [
    ("toy_tf_c1-1", ["trainer.offload.idle_roles=True"], "run with one network"),
    ("toy_tf_c1-1", ["model.config.frozen_weights=fp8"], "without a frozen network"),
    ("toy_sf_dmd_lora_c3-3", ["trainer.offload.idle_roles=True"], "lora.rank"),
    ("toy_sf_dmd_lora_c3-3", ["trainer.offload.parameters=True"], "lora.rank"),
    ("toy_sf_dmd_c1-1", ["trainer.offload.parameters=True", "trainer.offload.states=True"], "states=True has no effect"),
    ("toy_tf_dcm_c1-1", ["model.config.frozen_weights=fp8_storage", "model.config.compile=True"], "compile=True"),
    ("toy_tf_dcm_c1-1", ["model.config.frozen_weights=fp4"], "frozen_weights"),
    ("toy_tf_dcm_c1-1", ["optimizer.states=int4"], "optimizer.states"),
]


@pytest.mark.parametrize(("experiment", "more", "told"), REFUSALS, ids=lambda v: str(v)[:40])
def test_what_cannot_be_combined_is_refused(experiment: str, more: list[str], told: str) -> None:
    registry_distill.register()
    with pytest.raises(ConfigError, match=told):
        compose_run([f"experiment={experiment}", *more], environ={}, world_size=1, require_inputs=False)
