"""Sampling a suite: whole files under their names, shared over ranks, resumed by a restart.

Sample i of every prompt is drawn from seed + i: the same noise over prompts and ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.errors import ConfigError, NonFinite
from rcm.evaluation.vbench_manifest import RunFolder, VideoRecord, beside, file_sha256
from rcm.evaluation.vbench_prompts import SuiteItem
from rcm.parallel.agree import on_first, shared
from rcm.parallel.launch import this_launch
from rcm.parallel.mesh import meeting
from rcm.parallel.threads import end_threads_at_exit
from rcm.pipelines.video_io import write_mp4

CRF = 12
"""Quality of the files, x264: visually lossless. Part of a run's settings."""


@dataclass(frozen=True)
class ClipRequest:
    """One video to make; `image` is its first frame."""

    text: str
    seed: int
    image: Path | None = None


class VideoSampler(Protocol):
    """What samples a suite; ranks that share a video call it in the same order."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides pixels besides text and seed: weights, recipe, size. JSON values."""

    @property
    def fps(self) -> float:
        """Frames per second of the files."""

    def prepare(self, texts: Sequence[str]) -> None:
        """Told all texts before the first video: encode them once, and free the encoder."""

    def sample(self, request: ClipRequest) -> Tensor | None:
        """Pixels [3, F, H, W] in [-1, 1] on a video's first rank, None elsewhere."""


@dataclass(frozen=True)
class Share:
    """This process's part: groups of `cp_size` ranks make a video, each its share of prompts."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1

    @classmethod
    def of_launch(cls, *, cp_size: int = 1) -> Share:
        """The share of this rank of torchrun's, whose ranks divide into groups."""
        launch = this_launch()
        rank, world = launch.rank, launch.world_size
        if world % cp_size:
            raise ConfigError(f"--cp_size {cp_size} must divide the {world} ranks of the launch")
        return cls(rank // cp_size, world // cp_size, rank % cp_size, cp_size)

    def of(self, items: Sequence[SuiteItem]) -> list[SuiteItem]:
        return list(items[self.dp_rank :: self.dp_size])


@contextmanager
def group_of_video(share: Share, *, device: torch.device) -> Iterator[None]:
    """A process group of one video's ranks, as if they were the whole launch, so that what shares a
    video knows nothing of other groups. No group for one rank.
    """
    if share.cp_size == 1:
        yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    end_threads_at_exit()
    with meeting(this_launch()) as store:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"video{share.dp_rank}", store),
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
    """`items`, `num_samples` of each, `seed` of sample 0; `image_dir` holds first frames."""

    items: Sequence[SuiteItem]
    folder: Path
    num_samples: int = 5
    seed: int = 0
    image_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise ConfigError("no prompt to sample")

    def names(self, item: SuiteItem) -> list[str]:
        return [item.video_name(sample) for sample in range(self.num_samples)]

    def image(self, item: SuiteItem) -> Path | None:
        """The file of its first frame."""
        return None if self.image_dir is None else self.image_dir / (item.image_name or "")


def sample_suite(
    run: SuiteRun,
    sampler: VideoSampler,
    *,
    share: Share = Share(),
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> bool:
    """Make what this group's share lacks; True if the suite is complete, on the last to end.

    `settings`: what decides videos besides the sampler's own; `about`: what does not. `tell` gets a
    line per video. `ConfigError` for videos of other settings. A kill leaves only whole files, and
    a second call goes on.
    """
    folder = RunFolder(run.folder, rank=share.dp_rank)
    every = {**(settings or {}), **sampler.settings}
    every |= {"seed": run.seed, "fps": sampler.fps, "crf": CRF}
    ranks = {"ranks": share.dp_size * share.cp_size, "cp_size": share.cp_size}
    with closing(folder):
        on_first(lambda: folder.begin(every, run={**ranks, **(about or {})}))
        on_first(lambda: _check_case(run, share))
        _sample_share(run, sampler, folder, share, tell)
        rows = [item.eval_row(run.names(item)) for item in run.items]
        return bool(shared(on_first(lambda: folder.finish(rows))))


def _sample_share(
    run: SuiteRun,
    sampler: VideoSampler,
    folder: RunFolder,
    share: Share,
    tell: Callable[[str], None],
) -> None:
    wanted = [(item, i) for item in share.of(run.items) for i in range(run.num_samples)]
    todo = shared(on_first(lambda: [one for one in wanted if not _done(folder, run, *one)]))
    tell(f"{len(wanted)} videos for this rank, {len(wanted) - len(todo)} are there")
    if todo:
        sampler.prepare(list(dict.fromkeys(item.text for item, _ in todo)))
    for number, (item, sample) in enumerate(todo, 1):
        begin, name, image = time.perf_counter(), item.video_name(sample), run.image(item)
        request = ClipRequest(item.text, run.seed + sample, image)
        try:
            frames = sampler.sample(request)
            seconds = time.perf_counter() - begin
            if share.cp_rank > 0:
                continue
            assert frames is not None
            staged = write_mp4(folder.staging / name, frames, fps=sampler.fps, crf=CRF)
        except NonFinite as error:
            raise NonFinite(f"{name} (seed {request.seed}): {error}") from error
        path = folder.place(staged)
        record = VideoRecord(
            path.name,
            sample=sample,
            seed=request.seed,
            text=item.text,
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            frames=frames.shape[1],
            seconds=round(seconds, 3),
            image=None if image is None else file_sha256(image),
        )
        folder.add(record)
        tell(f"{number}/{len(todo)} {path.name}: {frames.shape[1]} frames in {seconds:.2f} s")


def _done(folder: RunFolder, run: SuiteRun, item: SuiteItem, sample: int) -> bool:
    name, seed, image = item.video_name(sample), run.seed + sample, run.image(item)
    digest = None if image is None else file_sha256(image)
    return folder.has(name, text=item.text, seed=seed, sample=sample, image=digest)


def _check_case(run: SuiteRun, share: Share) -> None:
    """Names that differ by case alone need a file system that tells them apart."""
    seen: dict[str, str] = {}
    twins = [
        (seen[key], item.prompt)
        for item in run.items
        if seen.setdefault(key := item.prompt.casefold(), item.prompt) != item.prompt
    ]
    if not twins:
        return
    probe = beside(run.folder) / f".Case{share.dp_rank}"
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
