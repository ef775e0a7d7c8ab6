"""Order, shards and position of a source: batches depend on (seed, data rank), resume exactly.

Epoch e visits the samples in the permutation drawn from (seed, e). Step s of an epoch takes the
next `batch_size * data_world` of them, and data rank r the r-th part. Ranks of one context-parallel
group pass the same data rank and so read the same batch: nothing is broadcast. Incomplete last
batches are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from loguru import logger

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.core.rng import generator

Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True)
class DataConfig(Record):
    """Where batches come from."""

    kind: Literal["fake", "toy", "latents", "prompts"] = "latents"  # set by data=NAME
    # latents: shards with latent.pt, embed.pt, prompt.txt (glob or {0000..0099}); prompts: text
    # file or shards
    tar_path_pattern: str = ""
    batch_size: int = within(1, least=1, most=2**16)  # samples per data rank and micro-batch
    # threads that read ahead; 0 = batches are read when asked for
    num_workers: int = within(8, least=0, most=1024)
    prefetch_factor: int = within(2, least=1, most=1024)  # batches that each thread reads ahead
    # permutation of shards and samples per epoch
    shuffle_seed: int = within(0, least=0, most=2**32 - 1)
    num_videos: int = within(512, least=1, most=10**7)  # toy: size of the procedural data set


class Source(Protocol[Batch]):
    """Samples by number: shards, prompts, the toy world, fakes. Threads may `fetch` at once."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Batch:
        """The batch of these samples, in this order."""
        ...

    def fingerprint(self) -> str:
        """A short hash of the data's identity."""
        ...


class Loader(Generic[Batch]):
    """Endless iterator over batches of `source`, with an exact position.

    `batch_size` samples per data rank; `data_rank` in [0, data_world); `shuffle` False keeps the
    order of the source in every epoch; `prefetch` batches are read ahead by `threads` threads (0:
    read when asked). `accept_changed`: a stored place is taken over for as many samples of other
    contents. Raises `ConfigError` for a source smaller than one global batch, or a rank out of
    range.
    """

    def __init__(
        self,
        source: Source[Batch],
        *,
        batch_size: int,
        seed: int = 0,
        data_rank: int = 0,
        data_world: int = 1,
        shuffle: bool = True,
        prefetch: int = 2,
        threads: int = 1,
        accept_changed: bool = False,
    ) -> None:
        if batch_size < 1 or prefetch < 0 or threads < 1 or not 0 <= data_rank < data_world:
            raise ConfigError(
                f"loader got batch_size={batch_size}, prefetch={prefetch}, data_rank={data_rank} of"
                f" data_world={data_world}"
            )
        if len(source) < batch_size * data_world:
            raise ConfigError(
                f"{len(source)} samples do not fill one global batch of {batch_size} x {data_world}"
                " data ranks; lower dataloader_train.batch_size"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._rank, self._world, self._shuffle = data_rank, data_world, shuffle
        self._prefetch, self._threads = prefetch, threads
        self._accept_changed = accept_changed
        self._epoch, self._position = 0, 0
        self._planned = (0, 0)  # where the next batch to be read ahead begins
        self._order: tuple[int, torch.Tensor] | None = None
        self._ahead: deque[tuple[tuple[int, int], Future[Batch]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __iter__(self) -> Loader[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._prefetch:
            after, indices = self._plan((self._epoch, self._position))
            batch = self.source.fetch(indices)
        else:
            self._pool = self._pool or ThreadPoolExecutor(
                self._threads, thread_name_prefix="rcm-data"
            )
            while len(self._ahead) <= self._prefetch:
                self._planned, indices = self._plan(self._planned)
                self._ahead.append((self._planned, self._pool.submit(self.source.fetch, indices)))
            after, future = self._ahead.popleft()
            batch = future.result()
        self._epoch, self._position = after
        return batch

    def _plan(self, at: tuple[int, int]) -> tuple[tuple[int, int], list[int]]:
        """The place behind the batch at `at` = (epoch, samples of all ranks); this rank's part."""
        epoch, position = at
        step = self.batch_size * self._world
        if position + step > len(self.source):
            epoch, position = epoch + 1, 0
        start = position + self._rank * self.batch_size
        mine = self._permutation(epoch)[start : start + self.batch_size].tolist()
        return (epoch, position + step), mine

    def _permutation(self, epoch: int) -> torch.Tensor:
        if self._order is None or self._order[0] != epoch:
            count = len(self.source)
            stream = generator(seed=self.seed, step=epoch, dp_rank=0, purpose="data_order")
            order = (
                torch.randperm(count, generator=stream) if self._shuffle else torch.arange(count)
            )
            # half the memory: ten million samples take 40 MB
            self._order = (epoch, order.int() if count < 2**31 else order)
        return self._order[1]

    def state_dict(self) -> dict[str, int | str]:
        """The place behind the last batch handed out (not the last one read), and of what."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "shuffle": int(self._shuffle),
            "num_samples": len(self.source),
            "fingerprint": self.source.fingerprint(),
            "global_batch": self.batch_size * self._world,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a stored place. Raises `ConfigError` when the data or the seed are others;
        a new batch size or world is noted and accepted.
        """
        mine = self.state_dict()
        if lacking := mine.keys() - state.keys():
            raise ConfigError(
                f"stored data position lacks {', '.join(sorted(lacking))}; it is of another"
                " version, or damaged"
            )
        for name in ("seed", "shuffle", "num_samples"):
            if state[name] != mine[name]:
                raise ConfigError(
                    f"stored data position is for {name}={state[name]!r}, this loader has"
                    f" {mine[name]!r}; resume with the data it came from"
                )
        if state["fingerprint"] != mine["fingerprint"]:
            self._judge_change(str(state["fingerprint"]), str(mine["fingerprint"]))
        if not 0 <= int(state["position"]) <= len(self.source) or int(state["epoch"]) < 0:
            raise ConfigError(
                f"stored data position {state['epoch']}:{state['position']} is outside of"
                f" {len(self.source)} samples"
            )
        if state["global_batch"] != mine["global_batch"]:
            logger.warning(
                f"global batch changed from {state['global_batch']} to {mine['global_batch']}: "
                "the run continues at the same sample, not bit-exactly"
            )
        self._ahead.clear()
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._planned = (self._epoch, self._position)

    def _judge_change(self, stored: str, mine: str) -> None:
        """The data's contents are others than those of a stored place."""
        if mine.startswith("v2-") and not stored.startswith("v2-"):
            logger.warning(
                "the checkpoint names its data as an older version did; they are not compared, see"
                " that they are the same"
            )
        elif self._accept_changed:
            logger.warning(
                "the data are others than the checkpoint's ({} there, {} here); the run goes on"
                " with them",
                stored,
                mine,
            )
        else:
            raise ConfigError(
                f"stored data position is for fingerprint={stored!r}, this loader has {mine!r};"
                " resume with the data it came from, or set checkpoint.accept_changed_data=True"
                " where samples were mended in their place"
            )

    def close(self) -> None:
        """Stop reading ahead; the loader can still be used."""
        self._ahead.clear()
        self._planned = (self._epoch, self._position)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
