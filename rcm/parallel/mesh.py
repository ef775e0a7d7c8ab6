"""Who computes what: the three parallel axes, their validation, and the device meshes and groups
built from them.

Ranks are laid out row-major as [dp_replicate, dp_shard, cp], cp fastest. Two views of that layout
are used:

* sharding: parameters are sharded over (dp_shard, cp) together and replicated over dp_replicate, so
  that the mean that FSDP2 takes runs over all ranks;
* data: ranks of one cp group read the same data and draw the same noise, so data is keyed by
  `data_rank` = rank // cp.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rcm.core.errors import ConfigError, PeerGone, require_divisible, require_equal
from rcm.parallel.agree import naming_lost_peers
from rcm.parallel.launch import Launch, meeting_place, stated_launch
from rcm.parallel.threads import end_threads_at_exit

SHARD_KNOB = "model.config.fsdp_shard_size"
CP_KNOB = "model_parallel.context_parallel_size"
_REFUSED = re.compile(r"failed to (?:bind|listen).*?message: ([\w ]+)", re.DOTALL)
"""What torch says when it cannot open the port where ranks meet."""
MEETING = timedelta(minutes=30)
"""How long ranks wait for each other at the start, as in torch."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the parallel axes; their product is the world size.

    `dp_replicate`: copies of the sharded model. `dp_shard`: data-parallel ranks among which one
    copy is sharded. `cp`: ranks that share one sequence. `device_type`: "cpu" or "cuda", where the
    meshes live. Raises ConfigError for a size below 1.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "cp"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"parallel size {name}={getattr(self, name)} must be at least 1; set"
                    f" {SHARD_KNOB} and {CP_KNOB}"
                )

    @classmethod
    def plan(
        cls, world_size: int, *, fsdp_shard_size: int, cp: int, device_type: str = "cpu"
    ) -> ParallelDims:
        """Dims from the public keys: parameters sharded over `fsdp_shard_size` consecutive ranks
        (which include the cp ranks), replicated over the rest.

        Raises ConfigError unless cp divides fsdp_shard_size and fsdp_shard_size divides the world
        size.
        """
        require_divisible(
            "world size", value=world_size, by=cp, by_name="context parallel size", knob=CP_KNOB
        )
        require_divisible(
            "world size",
            value=world_size,
            by=fsdp_shard_size,
            by_name="shard size",
            knob=SHARD_KNOB,
        )
        if fsdp_shard_size % cp:
            raise ConfigError(
                f"{SHARD_KNOB}={fsdp_shard_size} must be a multiple of {CP_KNOB}={cp}: the ranks of"
                f" a cp group share the parameters; choose a multiple of {cp} that divides the"
                f" world size {world_size}"
            )
        return cls(world_size // fsdp_shard_size, fsdp_shard_size // cp, cp, device_type)

    @property
    def world_size(self) -> int:
        """Number of ranks these dims describe."""
        return self.dp_replicate * self.dp_shard * self.cp

    @property
    def num_data_ranks(self) -> int:
        """Number of different data streams: dp_replicate * dp_shard."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_size(self) -> int:
        """Ranks over which one copy of the parameters is sharded: dp_shard * cp."""
        return self.dp_shard * self.cp

    @property
    def rank(self) -> int:
        """This process's global rank; 0 without a process group."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def data_rank(self) -> int:
        """Index of this process's data stream, in [0, num_data_ranks): the key of its data shard
        and of its random draws.
        """
        return self.rank // self.cp

    @property
    def cp_rank(self) -> int:
        """Place of this process inside its context-parallel group, in [0, cp)."""
        return self.rank % self.cp

    def check(
        self,
        *,
        num_heads: int | None = None,
        tokens_per_frame: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Raise ConfigError unless heads and tokens of a frame divide over cp, and the dims
        multiply to the world size (where given).
        """
        if world_size is not None:
            require_equal(
                "dp_replicate * dp_shard * cp",
                got=self.world_size,
                expected=world_size,
                knob=f"{SHARD_KNOB}, {CP_KNOB}",
            )
        if num_heads is not None:
            require_divisible(
                "num_heads",
                value=num_heads,
                by=self.cp,
                by_name="context parallel size",
                knob=CP_KNOB,
            )
        if tokens_per_frame is not None:
            require_divisible(
                "tokens per frame",
                value=tokens_per_frame,
                by=self.cp,
                by_name="context parallel size",
                knob=CP_KNOB,
            )

    def _require_group(self) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                f"a mesh of {self.world_size} rank(s) needs a process group; enter"
                " rcm.parallel.mesh.process_group(device_type) first"
            )
        self.check(world_size=dist.get_world_size())

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """Mesh over which parameters are sharded: axes ("dp_replicate", "shard"), or ("shard",)
        without replication. Collective on first use.
        """
        self._require_group()
        if self.dp_replicate == 1:
            return init_device_mesh(self.device_type, (self.shard_size,), mesh_dim_names=("shard",))
        return init_device_mesh(
            self.device_type,
            (self.dp_replicate, self.shard_size),
            mesh_dim_names=("dp_replicate", "shard"),
        )

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """Mesh with axes ("data", "cp"). Collective on first use."""
        self._require_group()
        return init_device_mesh(
            self.device_type, (self.num_data_ranks, self.cp), mesh_dim_names=("data", "cp")
        )

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Process group of the ranks that share this rank's sequence."""
        return self.data_mesh.get_group("cp")


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """Enter the process group of this launch and yield this rank's device.

    Under torchrun (`rcm.parallel.launch`) the group spans its ranks: gloo for CPU tensors, and
    NCCL for CUDA tensors where `device_type` is "cuda". Otherwise, and in a launch of one, a group
    of one rank is made in memory, so that a single process takes the same code path (FSDP2 mixed
    precision included); where ranks of a parent meet it has no business. An existing group is used
    as it is and left open.
    """
    launch = stated_launch()
    device = launch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    end_threads_at_exit()
    try:
        if launch.launched and launch.world_size > 1:
            place: Any = {"rank": launch.rank, "world_size": launch.world_size}
            own = None if device.type == "cpu" else device
            with meeting(launch) as store:
                dist.init_process_group(backend, store=store, device_id=own, **place)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:
        if (name := os.environ.get("GLOO_SOCKET_IFNAME")) and "find address for" in str(error):
            raise ConfigError(
                f"environment variable GLOO_SOCKET_IFNAME={name} names no network interface of this"
                " machine that has an address; name one, or unset it"
            ) from error
        raise
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def launch_group() -> Iterator[torch.device]:
    """`process_group` on CUDA where there is one; a collective inside that broke because another
    rank ended raises PeerGone.
    """
    with (
        process_group("cuda" if torch.cuda.is_available() else "cpu") as device,
        naming_lost_peers(),
    ):
        yield device


@contextmanager
def meeting(launch: Launch) -> Iterator[dist.Store]:
    """A store of the ranks of this start of the launch, in which they make groups within the
    context. ConfigError for an environment that no launcher leaves, PeerGone where they do not
    meet.
    """
    address, port = meeting_place()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            yield _named_store(launch, address, port)
        else:
            yield next(dist.rendezvous("env://", launch.rank, launch.world_size))[0]
    except (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError) as error:
        if refused := _REFUSED.search(str(error)):
            raise ConfigError(
                f"environment variable MASTER_PORT={port}: rank 0 cannot wait for the others there"
                f" ({refused[1]}); give another port, the same for every rank"
            ) from error
        if "Duplicate GPU" in str(error):
            raise ConfigError(
                "two ranks of this launch were given one GPU, which NCCL refuses; let every rank"
                " see its own (CUDA_VISIBLE_DEVICES) or number them on each machine (LOCAL_RANK)"
            ) from error
        raise PeerGone(
            f"the {launch.world_size} ranks of this launch did not meet at {address}:{port}; see"
            " what the others say"
        ) from error


def _named_store(launch: Launch, address: str, port: int) -> dist.Store:
    """The store of torchrun's agents, under a name that rank 0 draws for this start. Over a restart
    torchrun keeps the addresses of the dead in it, and agents of several machines count restarts
    each for itself. A rank asks for the name with a word of its own, so that it takes no older
    answer, and says that it has it.
    """
    store = dist.TCPStore(address, port, is_master=False, timeout=MEETING)
    word = uuid.uuid4().hex
    if launch.rank == 0:
        name = word
        _tell(store, name, others=set(range(1, launch.world_size)))
    else:
        store.set(f"rcm asks {launch.rank}", word)
        name = store.get(f"rcm tells {word}").decode()
        store.set(f"rcm {name} {launch.rank}", "has it")
    return dist.PrefixStore(name, store)


def _tell(store: dist.Store, name: str, *, others: set[int]) -> None:
    """Answer every rank that asks with `name`, until all `others` have it: what is found first may
    be the word of one that is dead.
    """
    told: dict[int, bytes] = {}
    deadline = time.monotonic() + MEETING.total_seconds()
    while others := {rank for rank in others if not store.check([f"rcm {name} {rank}"])}:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(others)} did not ask rank 0 for a name")
        for rank in sorted(others):
            asked = f"rcm asks {rank}"
            if store.check([asked]) and (word := store.get(asked)) != told.get(rank):
                store.set(f"rcm tells {word.decode()}", name)
                told[rank] = word
        time.sleep(0.05)
