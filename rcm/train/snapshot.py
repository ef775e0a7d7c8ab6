"""What a checkpoint holds: the state as named tensors, and the way back.

Parts: `model` (net.*, net_ema.*, net_fake_score.*, net_gan_head.*), `optim_net`,
`optim_fake_score`, `optim_gan_head` (slot.parameter), `scheduler` (update counts), `trainer` (one
JSON record of the iteration, the data positions and the settings, as bytes). Random generators are
not among them: every draw is keyed by seed, step and data rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from rcm.core.errors import CheckpointError, first_line
from rcm.parallel.agree import together
from rcm.parallel.fsdp import local, stored_parameters, stored_tensors
from rcm.parallel.mesh import ParallelDims
from rcm.storage.dcp_folder import DcpFolder
from rcm.storage.json_file import parse_json
from rcm.storage.state_dicts import check_keys, shapes_of
from rcm.train.continuity import Settings
from rcm.train.ema import EMAConfig, PowerEMA
from rcm.train.kept_adamw import KeptAdamW
from rcm.train.resume import Taken
from rcm.train.state import CHECKPOINT_NAMES, STUDENT, RoleState, TrainState

Part = dict[str, Tensor]


class Positioned(Protocol):
    """A data stream that can say and restore its exact position; the state is JSON."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the batches handed out so far."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        ...


def capture(
    state: TrainState, *, positions: list[dict[str, Any] | None], settings: Settings = Settings()
) -> dict[str, Part]:
    """The state as flat parts of tensors that share memory with it; what `restore` expects to
    find.
    """
    parts: dict[str, Part] = {"model": _model_part(state, average=state.ema)}
    for role, slot in state.roles.items():
        parts[_optim_name(role)] = {f"{key}.{name}": value for name, key, value in _slots(slot)}
    parts["scheduler"] = {
        f"{CHECKPOINT_NAMES[role]}.updates": torch.tensor(slot.updates)
        for role, slot in state.roles.items()
    }
    record = json.dumps(
        {"iteration": state.iteration, "positions": positions, "settings": settings.record()}
    ).encode()
    parts["trainer"] = {"record": torch.frombuffer(bytearray(record), dtype=torch.uint8)}
    return parts


def restore(
    state: TrainState,
    directory: Path,
    *,
    loader: Positioned | None,
    dims: ParallelDims,
    settings: Settings = Settings(),
    taken: Taken = Taken(),
) -> None:
    """Fill `state` and the loader with the parts `taken` of a checkpoint directory. Their key
    lists, settings and the data position are checked before any weight is written.
    """
    average = state.ema
    if average is None and taken.averaged:
        average = PowerEMA(state.roles[STUDENT].net, EMAConfig())  # a place to read into
    counts = {f"{CHECKPOINT_NAMES[role]}.updates": torch.tensor(0) for role in state.roles}
    scheduled = [role for role in state.roles if _taken_as("scheduler", role) in taken.parts]
    names = {
        role: _optim_name(role) for role in state.roles if _taken_as("optim", role) in taken.parts
    }
    opened = (
        [name for name in ("model", "trainer") if name in taken.parts]
        + ["scheduler"] * bool(scheduled)
        + [*names.values()]
    )
    model = _model_part(state, average=average)

    def check() -> tuple[
        dict[str, DcpFolder], dict[str, tuple[Part, dict[Tensor, dict[str, str]]]]
    ]:
        if "model" in opened:
            _require_same_roles(state, shapes_of(DcpFolder(directory / "model")), directory)
        folders = {name: DcpFolder(directory / name) for name in opened}
        found = {name: shapes_of(folder) for name, folder in folders.items()}
        if "model" in folders:
            if taken.averaged and not any(name.startswith("net_ema.") for name in found["model"]):
                raise CheckpointError(
                    f"{directory}/model holds no averaged weights, which"
                    " checkpoint.load_ema_to_reg=True starts from"
                )
            check_keys(f"{directory}/model", shapes=found["model"], expected=shapes_of(model))
        optim = {
            role: _empty_slots(state.roles[role], found[name], source=f"{directory}/{name}")
            for role, name in names.items()
        }
        if scheduled:
            check_keys(
                f"{directory}/scheduler", shapes=found["scheduler"], expected=shapes_of(counts)
            )
        return folders, optim

    folders, optim = together(check)
    if "trainer" in folders:
        record = {
            "record": torch.empty(
                shapes_of(folders["trainer"]).get("record", (0,)), dtype=torch.uint8
            )
        }
        folders["trainer"].load_into(record)
        facts = together(
            lambda: _continued(
                record["record"], directory, loader=loader, dims=dims, settings=settings
            )
        )
        state.iteration = facts["iteration"]
    if scheduled:
        folders["scheduler"].load_into(counts)
    if "model" in folders:
        folders["model"].load_into(model)
    if average is not None and taken.averaged:
        average.write_to(state.roles[STUDENT].net)
    for role, (flat, by_parameter) in optim.items():
        folders[names[role]].load_into(flat)
        for parameter, values in by_parameter.items():
            state.roles[role].optimizer.state[parameter] = {
                key: flat[name] for key, name in values.items()
            }
    for role in scheduled:
        state.roles[role].updates = int(counts[f"{CHECKPOINT_NAMES[role]}.updates"])


def _require_same_roles(state: TrainState, found: Iterable[str], directory: Path) -> None:
    """CheckpointError where only one of both trains a discriminator's head."""
    there = any(name.startswith(f"{CHECKPOINT_NAMES['gan_head']}.") for name in found)
    if there != ("gan_head" in state.roles):
        what, mine = ("a", "has none") if there else ("no", "trains one")
        raise CheckpointError(
            f"{directory} holds {what} discriminator's head, this run {mine}; set"
            " model.config.gan.loss_scale as there, or start from it under another job.name with"
            f" model.config.student_ckpt={directory}"
        )


def _continued(
    record: Tensor,
    directory: Path,
    *,
    loader: Positioned | None,
    dims: ParallelDims,
    settings: Settings,
) -> dict[str, Any]:
    """The facts of the record, once they are seen to be those of this run; the loader stands where
    they say.
    """
    facts = _facts(record, source=directory / "trainer")
    settings.require_continues(facts.get("settings"), source=str(directory))
    if loader is not None:
        _reposition(loader, facts["positions"], dims=dims, source=directory)
    return facts


def _facts(record: Tensor, *, source: Path) -> dict[str, Any]:
    """The JSON record of `capture`; CheckpointError unless it is one."""
    try:
        facts = parse_json(bytes(record.tolist()), source=source)
        whole = (
            isinstance(facts["iteration"], int)
            and facts["iteration"] >= 0
            and isinstance(facts["positions"], list)
        )
        if not (whole and facts["positions"] and isinstance(facts.get("settings", {}), dict)):
            raise ValueError("a field has another type")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source} holds no iteration and data positions ({first_line(error)}); it is damaged"
        ) from error
    return facts


def _optim_name(role: str) -> str:
    name = CHECKPOINT_NAMES[role]
    return "optim_" + (name.removeprefix("net_") if name != "net" else name)


def _taken_as(kind: str, role: str) -> str:
    """The part of `rcm.train.resume.PARTS` with which a role's is taken or left: a discriminator's
    head goes with the fake score, as it is updated with it.
    """
    return _optim_name("fake_score" if role == "gan_head" else role).replace("optim", kind)


def _model_part(state: TrainState, *, average: PowerEMA | None) -> Part:
    part = {
        f"{CHECKPOINT_NAMES[role]}.{k}": v
        for role, slot in state.roles.items()
        for k, v in stored_tensors(slot.net).items()
    }
    if average is not None:
        part |= {f"net_ema.{name}": value for name, value in average.shadow.items()}
    return part


def _slots(slot: RoleState) -> list[tuple[str, str, Tensor]]:
    """(parameter name, slot key, value) of the optimiser state that exists so far."""
    named = (
        (name, slot.optimizer.state.get(p, {})) for name, p in stored_parameters(slot.net).items()
    )
    return [(name, key, value) for name, values in named for key, value in values.items()]


def _empty_slots(
    slot: RoleState, found: dict[str, tuple[int, ...]], *, source: str
) -> tuple[Part, dict[Tensor, dict[str, str]]]:
    """Tensors to read an optimiser's state into, flat, and by parameter: slot key -> flat key.
    Empty when the optimiser had not stepped.
    """
    flat: Part = {}
    by_parameter: dict[Tensor, dict[str, str]] = {}
    keys = sorted({name.partition(".")[0] for name in found})
    for name, p in stored_parameters(slot.net).items():
        if not p.requires_grad or not keys:
            continue
        blank = _blank_state(slot.optimizer, p, keys)
        by_parameter[p] = {key: f"{key}.{name}" for key in blank}
        flat |= {f"{key}.{name}": value for key, value in blank.items()}
    told = "optimizer.states must be what it was" if "exp_avg" in keys else ""
    check_keys(source, shapes=found, expected=shapes_of(flat), advice=told)
    return flat, by_parameter


def _blank_state(optimizer: torch.optim.Optimizer, p: Tensor, keys: list[str]) -> Part:
    """What an optimiser keeps of a parameter, to be read into."""
    if isinstance(optimizer, KeptAdamW):
        return optimizer.blank_state(p)
    # AdamW keeps its step count as a float32 scalar, on the parameter's device when fused.
    device = local(p).device if optimizer.defaults.get("fused") else "cpu"
    return {
        key: torch.zeros((), device=device)
        if key == "step"
        else torch.zeros_like(p, requires_grad=False)
        for key in keys
    }


def gather_positions(loader: Positioned | None, dims: ParallelDims) -> list[dict[str, Any] | None]:
    """The loader's position on every data rank (None without a loader). Collective."""
    own = None if loader is None else loader.state_dict()
    everyone: list[Any] = [own]
    if dims.world_size > 1:
        everyone = [None] * dims.world_size
        dist.all_gather_object(everyone, own)
    return everyone[:: dims.cp]


def _reposition(
    loader: Positioned, positions: list[dict[str, Any] | None], *, dims: ParallelDims, source: Path
) -> None:
    if len(positions) == dims.num_data_ranks:
        position = positions[dims.data_rank]
    else:
        position = positions[0]
        logger.warning(
            "{} was written by {} data ranks, now there are {}; data continues from rank 0's"
            " position",
            source,
            len(positions),
            dims.num_data_ranks,
        )
    if position is None:
        raise CheckpointError(f"{source} holds no data position; it was saved without a loader")
    loader.load_state_dict(position)
