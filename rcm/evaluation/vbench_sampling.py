"""Sampling a suite: every prompt `num_samples` times, each file appearing whole under its name,
shared over ranks, resumed by starting again.

Sample i of every prompt is drawn from a generator seeded with `seed + i`: the same noise over
prompts, whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_manifest import RunFolder, VideoRecord, file_sha256
from rcm.evaluation.vbench_prompts import SuiteItem
from rcm.parallel.agree import on_first, shared
from rcm.parallel.launch import this_launch
from rcm.pipelines.video_io import write_mp4

CRF = 12
"""Quality of the files, x264: visually lossless. Part of a run's settings."""


@dataclass(frozen=True)
class ClipRequest:
    """One video to make: the text given to the model, the seed of its generator, the first frame of
    image-to-video.
    """

    text: str
    seed: int
    image: Path | None = None


class VideoSampler(Protocol):
    """What samples a suite. On several ranks that share a video every rank calls the same methods
    in the same order.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides the pixels besides text and seed: checkpoint digest, recipe,
        size, frames, precision. JSON values.
        """
        ...

    @property
    def fps(self) -> float:
        """Frames per second of the files."""
        ...

    def prepare(self, texts: Sequence[str]) -> None:
        """Told all texts that will be asked for, before the first: encode them once, and free the
        encoder.
        """
        ...

    def sample(self, request: ClipRequest) -> Tensor | None:
        """Pixels [3, F, H, W] in [-1, 1], of which the first rank of the video's group writes a
        file; None on other ranks is enough.
        """
        ...


@dataclass(frozen=True)
class Share:
    """This process's part of a launch: groups of `cp_size` ranks make a video together, group
    number `dp_rank` of `dp_size` takes every `dp_size`-th prompt.
    """

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1

    @classmethod
    def of_launch(cls, *, cp_size: int = 1) -> Share:
        """From torchrun's environment; one process without it. `ConfigError` unless the ranks
        divide into groups.
        """
        launch = this_launch()
        rank, world = launch.rank, launch.world_size
        if cp_size < 1 or world % cp_size:
            raise ConfigError(
                f"--cp_size {cp_size} must be at least 1 and divide the {world} ranks of the launch"
            )
        return cls(rank // cp_size, world // cp_size, rank % cp_size, cp_size)

    def of(self, items: Sequence[SuiteItem]) -> list[SuiteItem]:
        """The prompts of this group."""
        return list(items[self.dp_rank :: self.dp_size])


@contextmanager
def group_of_video(share: Share, *, device: torch.device) -> Iterator[None]:
    """A process group of the ranks that make one video together, as if they were the whole launch:
    what shares a video needs to know nothing of the other groups. No group at all for one rank.
    """
    if share.cp_size == 1:
        yield
        return
    store, _, _ = next(
        dist.rendezvous(
            "env://", share.dp_rank * share.cp_size + share.cp_rank, share.dp_size * share.cp_size
        )
    )
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    own = dist.PrefixStore(f"video{share.dp_rank}", store)
    dist.init_process_group(
        backend,
        store=own,
        rank=share.cp_rank,
        world_size=share.cp_size,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class SuiteRun:
    """What to sample: `items`, `num_samples` of each, `seed` of sample 0, the folder of the videos;
    `image_dir` holds the items' first frames.
    """

    items: Sequence[SuiteItem]
    folder: Path
    num_samples: int = 5
    seed: int = 0
    image_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"--num_samples {self.num_samples} must be at least 1")
        if not self.items:
            raise ConfigError("no prompt to sample")

    def names(self, item: SuiteItem) -> list[str]:
        """File names of an item."""
        return [item.video_name(sample) for sample in range(self.num_samples)]


def sample_suite(
    run: SuiteRun,
    sampler: VideoSampler,
    *,
    share: Share = Share(),
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> bool:
    """Make what is missing of this group's share. Returns whether the whole suite is complete,
    which the last group to end finds.

    `settings`: what decides the videos besides the sampler's own; `about`: what to note of this run
    that does not. `tell` receives a line per video. Raises `ConfigError` where other settings made
    the videos that are there. A kill at any moment leaves only whole files, and a second call goes
    on.
    """
    folder = RunFolder(run.folder, rank=share.dp_rank)
    every = {
        **(settings or {}),
        **sampler.settings,
        "seed": run.seed,
        "fps": sampler.fps,
        "crf": CRF,
    }
    on_first(
        lambda: folder.begin(
            every,
            run={"ranks": share.dp_size * share.cp_size, "cp_size": share.cp_size, **(about or {})},
        )
    )
    on_first(lambda: _check_case(run, share))
    mine = share.of(run.items)
    wanted = [(item, sample) for item in mine for sample in range(run.num_samples)]
    todo = shared(
        on_first(
            lambda: [
                (item, sample) for item, sample in wanted if not _done(folder, run, item, sample)
            ]
        )
    )
    tell(f"{len(wanted)} videos for this rank, {len(wanted) - len(todo)} are there")
    if todo:
        sampler.prepare(list(dict.fromkeys(item.text for item, _ in todo)))
    for number, (item, sample) in enumerate(todo, 1):
        begin = time.perf_counter()
        request = ClipRequest(
            item.text,
            run.seed + sample,
            None if run.image_dir is None else run.image_dir / (item.image_name or ""),
        )
        frames = sampler.sample(request)
        if share.cp_rank > 0:
            continue
        assert frames is not None
        seconds = time.perf_counter() - begin
        path = folder.place(
            write_mp4(folder.staging / item.video_name(sample), frames, fps=sampler.fps, crf=CRF)
        )
        record = VideoRecord(
            path.name,
            sample,
            request.seed,
            item.text,
            path.stat().st_size,
            file_sha256(path),
            frames.shape[1],
            round(seconds, 3),
        )
        folder.add(record)
        tell(f"{number}/{len(todo)} {path.name}: {frames.shape[1]} frames in {seconds:.2f} s")
    return bool(
        shared(
            on_first(lambda: folder.finish([item.eval_row(run.names(item)) for item in run.items]))
        )
    )


def _done(folder: RunFolder, run: SuiteRun, item: SuiteItem, sample: int) -> bool:
    return folder.has(
        item.video_name(sample), text=item.text, seed=run.seed + sample, sample=sample
    )


def _check_case(run: SuiteRun, share: Share) -> None:
    """Where names differ by case alone the file system must tell them apart, or one video replaces
    the other.
    """
    seen: dict[str, str] = {}
    twins = [
        (seen[key], item.prompt)
        for item in run.items
        if seen.setdefault(key := item.prompt.casefold(), item.prompt) != item.prompt
    ]
    if not twins:
        return
    probe = run.folder.with_name(f"{run.folder.name}_run") / f".Case{share.dp_rank}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    blind = probe.with_name(probe.name.lower()).exists()
    probe.unlink()
    if blind:
        raise ConfigError(
            f"{run.folder} is on a file system that does not tell upper from lower case, and the"
            f" prompts {twins[0][0]!r} and {twins[0][1]!r} differ in nothing else; choose an"
            " --output_dir on another one"
        )
