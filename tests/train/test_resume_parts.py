"""Parts of a checkpoint: what is asked for is read bit by bit, what is left out stays as it was
built.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.core.errors import CheckpointError, ConfigError
from rcm.parallel.mesh import ParallelDims
from rcm.train.checkpoint import Checkpointer
from rcm.train.continuity import Settings
from rcm.train.resume import PARTS, Taken
from rcm.train.state import TrainState
from tests.support.toy_method import make_loader, make_run
from tests.train.run_support import DESCRIPTION, everything, launch

ONE = ParallelDims()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A job with a checkpoint at 4, and its trainer."""
    job = tmp_path_factory.mktemp("job")
    trainer = launch(job, max_iter=4, settings=Settings({"loss": 1}))
    trainer.run()
    return job, trainer


def facts(state: TrainState, loader=None) -> dict[str, object]:
    """What each part says, in a form that can be compared."""
    found = everything(state)
    slots = {role: {k: v for k, v in found.items() if k.startswith((f"{role}.exp_", f"{role}.step"))} for role in state.roles}
    model = {k: v for k, v in found.items() if ".exp_avg" not in k and ".step." not in k}
    return {
        "model": model,
        "optim_net": slots["student"],
        "optim_fake_score": slots["fake_score"],
        "scheduler_net": state.roles["student"].updates,
        "scheduler_fake_score": state.roles["fake_score"].updates,
        "trainer": (state.iteration, None if loader is None else loader.state_dict()),
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict) and all(isinstance(v, torch.Tensor) for v in (*a.values(), *b.values())):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return a == b


CASES = [
    ("everything", Taken(), PARTS),
    *((f"without {part}", Taken.all_but([part]), tuple(p for p in PARTS if p != part)) for part in PARTS),
    ("without moments", Taken.all_but(["optim"]), ("model", "scheduler_net", "scheduler_fake_score", "trainer")),
    ("without schedules", Taken.all_but(["scheduler"]), ("model", "optim_net", "optim_fake_score", "trainer")),
    ("weights alone", Taken().weights_alone(), ("model",)),
    ("weights and schedules", Taken().weights_alone(scheduler=True), ("model", "scheduler_net", "scheduler_fake_score")),
    ("weights and one schedule", Taken.all_but(["scheduler_net"]).weights_alone(scheduler=True), ("model", "scheduler_fake_score")),
]


@pytest.mark.parametrize(("taken", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_parts_are_read_or_left_as_built(trained, taken: Taken, parts: tuple[str, ...]) -> None:
    job, trainer = trained
    there = facts(trainer.state, trainer.loader)
    _, state = make_run(dims=ONE, precision="fp64")
    with torch.no_grad():
        for slot in state.roles.values():
            for p in slot.net.parameters():
                p.add_(1.0)  # as built from other weights
    loader = make_loader(dims=ONE, prefetch=0)
    built = facts(state, loader)
    assert not any(equal(built[part], there[part]) for part in PARTS)
    Checkpointer(job, dims=ONE, description=DESCRIPTION).load(state, loader=loader, taken=taken)
    now = facts(state, loader)
    assert taken.left == [part for part in PARTS if part not in parts]
    for part in PARTS:
        assert equal(now[part], there[part] if part in parts else built[part]), part


@pytest.mark.parametrize("averaging", [True, False])
def test_the_student_starts_from_the_average(trained, averaging: bool) -> None:
    """Rounded from the average to the weights' own dtype; an average of the new run goes on from
    there, one is not needed.
    """
    job, trainer = trained
    _, state = make_run(dims=ONE, precision="fp64", ema=averaging)
    saved = job / "checkpoints" / "iter_000000004"
    Checkpointer(job, dims=ONE, description=DESCRIPTION).load(state, path=saved, taken=Taken(averaged=True))
    shadow = trainer.state.ema.shadow
    net = dict(state.roles["student"].net.named_parameters())
    assert net.keys() == shadow.keys()
    assert all(torch.equal(net[name].detach(), shadow[name]) for name in net)
    assert any(not torch.equal(net[name], p) for name, p in trainer.state.roles["student"].net.named_parameters())
    critic = dict(trainer.state.roles["fake_score"].net.named_parameters())
    assert all(torch.equal(p, critic[name]) for name, p in state.roles["fake_score"].net.named_parameters())
    assert (state.ema is not None) == averaging
    if averaging:
        assert all(torch.equal(state.ema.shadow[name], shadow[name]) for name in shadow)


def test_no_average_to_start_from(tmp_path: Path) -> None:
    _, state = make_run(dims=ONE, precision="fp64", ema=False)
    checkpointer = Checkpointer(tmp_path, dims=ONE, description=DESCRIPTION)
    path = checkpointer.save(state)
    before = everything(state)
    with pytest.raises(CheckpointError, match="holds no averaged weights, which checkpoint.load_ema_to_reg=True starts from"):
        checkpointer.load(state, path=path, taken=Taken(averaged=True))
    assert equal(before, everything(state))


def test_settings_bind_whoever_takes_the_iteration(trained) -> None:
    """A run that goes on must share them; one that takes weights alone is another run."""
    job, _ = trained
    checkpointer = Checkpointer(job, dims=ONE, description=DESCRIPTION, settings=Settings({"loss": 2}))
    with pytest.raises(ConfigError, match="loss: 1 there, 2 here"):
        checkpointer.load(make_run(dims=ONE, precision="fp64")[1])
    checkpointer.load(make_run(dims=ONE, precision="fp64")[1], taken=Taken.all_but(["trainer"]))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["optimizer"], "has 'optimizer', which is no part of a checkpoint; its parts are model, optim"),
        (["model", "optim", "scheduler", "trainer"], "leaves nothing to resume"),
    ],
)
def test_keys_that_are_none(keys: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Taken.all_but(keys)
