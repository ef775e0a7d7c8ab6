"""Streams that benchmarks run: a network of full size with random weights, and what is measured of
a video and of a stream in its steady state.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from rcm.core.dtypes import Precision
from rcm.encoders.wan_vae import WanVAECodec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.config import PRESETS
from rcm.nets.wan.model import WanDiT
from rcm.parallel.init import materialise, on_meta
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from scripts.bench_measure import GIB, fill, quantile

LATENT = (16, 60, 104)
FRAMES = 21
"""Latent frames of a video of 81."""
FOUR = (15 / 16, 5 / 6, 5 / 8)


def _recipe(pattern: str, *mids: tuple[float, ...], noisy: bool = False) -> SamplingRecipe:
    start = {"noisy_context": True, "noisy_context_start_chunk": 1} if noisy else {}
    return SamplingRecipe("few_step", pattern, mids=mids, **start)


RECIPES = {
    "c3-3 [4,2]": _recipe("c3-3", FOUR, (5 / 6,)),
    "c3-3 [4,2] noisy": _recipe("c3-3", FOUR, (5 / 8,), noisy=True),
    "c3-3 [4]": _recipe("c3-3", FOUR),
    "c1-1 [4,1]": _recipe("c1-1", FOUR, ()),
    "c1-1 [4,2] noisy": _recipe("c1-1", FOUR, (5 / 8,), noisy=True),
    "c1-1 [4,1] noisy": _recipe("c1-1", FOUR, (), noisy=True),
}


def build(size: str, *, fused: str = "on") -> Denoiser:
    """A network of the published size with random weights in bfloat16."""
    config = PRESETS[size]
    net = on_meta(lambda: WanDiT(config, fused=fused)).requires_grad_(False).to(torch.bfloat16)
    fill(materialise(net, device="cuda"))
    return Denoiser(net, Precision.preset("bf16")).eval_params()


def prompt(denoiser: Denoiser, *, seed: int = 0) -> Condition:
    """A random prompt with its cross-attention keys."""
    config = denoiser.net.config
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (1, config.text_len, config.text_dim)
    text = torch.randn(shape, generator=generator, device="cuda")
    return denoiser.prepare(Condition(text))


CHOSEN: dict[str, Any] = {}
"""What the command line says of every stream."""


def engine(recipe: SamplingRecipe, **options: Any) -> StreamSpec:
    """A stream as fast as it goes."""
    ahead = dict.fromkeys(("look_ahead", "first_alone", "to_host"), True)
    given = {"graphs": "on", "draw_on": "cuda", **ahead, **CHOSEN, **options}
    return StreamSpec(recipe, LATENT, **given)


def opened(denoiser: Denoiser, codec: WanVAECodec | None, name: str, **options: Any) -> Session:
    """A stream of the recipe `name` as fast as it goes."""
    spec = engine(RECIPES[name], **options)
    return Session(denoiser, codec, prompt(denoiser), spec, device="cuda")


def watch(session: Session) -> dict[str, Any]:
    """Arrival of the pieces of a video, from the moment at which it begins: in host memory, or,
    latents alone, made.
    """
    stamps, frames = [], []
    while (chunk := session.step()) is not None:
        returned = time.perf_counter()
        if chunk.images is None:  # its stamp is that of its issue
            torch.cuda.synchronize()
        stamps.append(chunk.seconds + time.perf_counter() - returned)
        frames.append(chunk.frames.shape[2])
    return {"first": stamps[0], "stamps": stamps, "frames": frames, "fps": sum(frames) / stamps[-1]}


def video(
    denoiser: Denoiser, codec: WanVAECodec | None, spec: StreamSpec, *, repeats: int = 3
) -> dict[str, Any]:
    """Medians over `repeats` videos of one session, after one that compiles and captures."""
    cond = prompt(denoiser)
    torch.cuda.reset_peak_memory_stats()
    with Session(denoiser, codec, cond, spec, device="cuda") as session:
        begin = time.perf_counter()
        watch(session)
        cold, runs = time.perf_counter() - begin, []
        for _ in range(repeats):
            torch.cuda.synchronize()
            session.restart()
            runs.append(watch(session))
        gaps = [
            b - a
            for run in runs
            for a, b in zip(run["stamps"][1:-1], run["stamps"][2:], strict=True)
        ]
        # the first frame of a chunk of several comes alone
        whole = 1 if spec.first_alone and spec.recipe.blocks.first > 1 else 0
        chunk = statistics.median(run["stamps"][whole] for run in runs)
        counts = getattr(session.loop, "counts", None)
    return {
        "fps": statistics.median(run["fps"] for run in runs),
        "total_s": statistics.median(run["stamps"][-1] for run in runs),
        "first_visible_s": statistics.median(run["first"] for run in runs),
        "first_chunk_s": chunk,
        "gap_p50_ms": 1e3 * statistics.median(gaps),
        "gap_p95_ms": 1e3 * quantile(gaps, 0.95),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
        "cold_video_s": cold,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "passes": counts,
    }


def steady(
    denoiser: Denoiser,
    codec: WanVAECodec | None,
    recipe: SamplingRecipe,
    *,
    chunks: int,
    window: int = 7,
    sinks: int = 0,
    idle: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """A stream without end in its steady state: time per chunk, drift of time and memory, GPU idle
    share.
    """
    spec = engine(recipe, policy=SlidingWindow(window, sinks), **options)
    with Session(denoiser, codec, prompt(denoiser), spec, device="cuda") as session:
        for _ in range(window + sinks + 6):
            session.step()
        torch.cuda.synchronize()
        session.step()  # the first step after a pause finds nothing under way
        stamps, memory = [], []
        begin = time.perf_counter()
        for _ in range(chunks):
            session.step()
            if codec is None:
                torch.cuda.synchronize()
            stamps.append(time.perf_counter() - begin)
            memory.append(torch.cuda.memory_allocated())
        block = session.next_block
        # before any profiler, which slows launches down for the rest of the process
        issue_ms = issued(session)
        share = idle_share(session) if idle else None
        torch.cuda.synchronize()
    times = [b - a for a, b in zip([0.0, *stamps[:-1]], stamps, strict=True)]
    tenth = max(1, len(times) // 10)
    return {
        "chunk_ms": 1e3 * statistics.median(times),
        "p95_ms": 1e3 * quantile(times, 0.95),
        "p99_ms": 1e3 * quantile(times, 0.99),
        "chunks": chunks,
        "last_over_first_tenth": (
            statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
        ),
        "memory_growth": memory[-1] / memory[0] - 1,
        "memory_gib": memory[-1] / GIB,
        "host_issue_ms": issue_ms,
        "idle_share": share,
        "last_block": block,
    }


def issued(session: Session) -> float:
    """Median milliseconds in which the host issues a chunk, of five."""
    produce, spent = session._produce, []

    def timed() -> Any:
        begin = time.perf_counter()
        made = produce()
        spent.append(1e3 * (time.perf_counter() - begin))
        return made

    session._produce = timed
    for _ in range(5):
        session.step()
    del session._produce  # the class's again
    return statistics.median(spent)


def idle_share(session: Session, *, steps: int = 4) -> float:
    """Share of a few steady steps in which no kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    session.step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            session.step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    if not spans:
        return float("nan")
    busy, at = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, at))
        at = max(at, end)
    return 1 - busy / (at - spans[0][0])
