"""The speed of a stream: its passes as CUDA graphs.

A graph is kept per (frames of the chunk, tokens that it sees, role); it holds a whole denoising
step, sampler arithmetic included, or a context pass. What changes between steps is device data:
latents, noise, times, slots of the ring, rotary tables, the prompt's keys. So fill-up replays one
graph per length of the past, and everything after the window is full, prompt changes included,
replays these two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.kernels.cuda_graph import CudaGraph
from rcm.nets.condition import Condition
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_fp8 import Fp8Store
from rcm.nets.layout import TokenLayout
from rcm.nets.paired_cache import PairedView, View
from rcm.nets.velocity_model import VelocityModel
from rcm.pipelines.captured_inputs import CapturedInputs, Kinds, codes_of
from rcm.pipelines.captured_views import CodedView, StaticView
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.autoregressive import Canvas, ChunkLoop, time_tensor
from rcm.rollout.eviction.base import Placement
from rcm.rollout.noise import Noise

TIMES_KEPT = 64
"""Times of which the network's rows are kept, 1.2 MB each at 1.3B: more than the steps of a
schedule.
"""


_Key = tuple[int, int, Kinds | None, bool, bool]
"""Frames of the chunk, tokens of the past, what the codes of each branch are (None: plain caches),
whether it ends at the last keys, whether it sets the scales of FP8 codes.
"""


class CapturedLoop(ChunkLoop):
    """A `ChunkLoop` that replays graphs. The first pass of a chunk size runs eagerly, which
    compiles kernels and allocates the cache, and over a coded cache so does the first that encodes;
    passes that a graph cannot serve (an observed pass, positions per sample, a view of a part of a
    plain cache, a coded cache with plain newest chunks or a codec that is not read by address) run
    eagerly, too.

    A context pass has a graph of its own, which is shorter, once its length of the past has come
    before: until then, while a window fills up, it replays that of the denoising step, which does
    all that it needs, too.

    `counts`: how many passes were replayed, captured, and run eagerly, for reports.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.denoiser.join_projections()
        self.counts = {"replayed": 0, "captured": 0, "eager": 0}
        self._graphs: dict[_Key, CudaGraph] = {}
        self._filled: set[tuple[int, int]] = set()
        self._inputs: dict[int, CapturedInputs] = {}
        self._times: dict[tuple[float, float], tuple[Tensor, ...] | None] = {}
        self._pool: torch.cuda._POOL_HANDLE | None = None

    def advance(
        self,
        x: Tensor,
        cond: Condition,
        placement: Placement,
        *,
        t: float,
        t_next: float,
        noise: Tensor | None,
        append: bool,
    ) -> Tensor:
        """See `ChunkLoop`."""
        view = self.view(placement, append=append)
        layout = self.canvas.layout(placement.frame_index, view)
        inputs = self._prepared(x, cond, view, layout)
        if inputs is None:
            now, then = (time_tensor(time, x.shape[0], x.device) for time in (t, t_next))
            v = self.ask(x, now, then, cond, layout, view)
            self._keep_inputs(x, cond, layout)
            return self.rule(x, v, t=t, t_next=t_next, noise=noise)
        inputs.set(
            x,
            noise,
            t=t,
            t_next=t_next,
            rows=self._time_rows(t, t_next if self.rule.mean else t, x),
        )
        self._replay(inputs, view, layout, context_only=False)
        return inputs.x.clone()

    def fill(
        self, x: Tensor, cond: Condition, view: View, frame_index: tuple[int, ...], *, t: float
    ) -> None:
        """See `ChunkLoop`."""
        layout = self.canvas.layout(frame_index, view)
        inputs = self._prepared(x, cond, view, layout)
        if inputs is None:
            self.denoiser.enter_context(
                x, time_tensor(t, x.shape[0], x.device), cond, layout, cache=view
            )
            self._keep_inputs(x, cond, layout)
            return
        inputs.set(x, None, t=t, t_next=t, rows=self._time_rows(t, t, x))
        length = (len(frame_index), layout.context_tokens)
        shared = (
            inputs.kinds is None
            and length not in self._filled
            and (*length, None, False, False) in self._graphs
        )
        self._replay(inputs, view, layout, context_only=not shared)
        self._filled.add(length)

    def captured_for(self) -> Condition | None:
        """See `ChunkLoop`."""
        return next((inputs.cond for inputs in self._inputs.values()), None)

    def restart(self, *, canvas: Canvas, noise: Noise) -> None:
        """See `ChunkLoop`; weights may have changed meanwhile, which graphs read where they are."""
        self._times.clear()
        super().restart(canvas=canvas, noise=noise)

    def close(self) -> None:
        """Free graphs and cache."""
        self._graphs.clear()
        self._filled.clear()
        self._inputs.clear()
        self._times.clear()
        super().close()

    def _time_rows(self, t: float, s: float, x: Tensor) -> tuple[Tensor, ...] | None:
        """What the network makes of a time, or of two, made once: schedules have few."""
        if (t, s) not in self._times:
            while len(self._times) >= TIMES_KEPT:
                del self._times[next(iter(self._times))]
            first, *second = (
                time_tensor(time, x.shape[0], x.device) for time in ((t, s) if s != t else (t,))
            )
            self._times[t, s] = self.denoiser.time_rows(first, *second)
        return self._times[t, s]

    def _prepared(
        self, x: Tensor, cond: Condition, view: View, layout: TokenLayout
    ) -> CapturedInputs | None:
        """The device memory that graphs of such a pass read, with slots, tables and prompt of this
        one; None if it must run eagerly.
        """
        inputs = self._inputs.get(layout.num_frames)
        if inputs is None or not self._begin(view, layout):
            self.counts["eager"] += 1
            return None
        inputs.place(
            view.branches, [codes_of(branch) for branch in view.branches], layout, self.denoiser
        )
        inputs.prompt(cond)
        return inputs

    def _keep_inputs(self, x: Tensor, cond: Condition, layout: TokenLayout) -> None:
        if layout.num_frames not in self._inputs:
            self._inputs[layout.num_frames] = CapturedInputs(
                x, cond, layout, fused=self.denoiser.fused != "off"
            )

    def _replay(
        self, inputs: CapturedInputs, view: View, layout: TokenLayout, *, context_only: bool
    ) -> None:
        unset = [s for b in view.branches if isinstance(s := b.store, Fp8Store) and s.unset]
        shape = (layout.num_frames, layout.context_tokens)
        key = (*shape, inputs.kinds, context_only, bool(unset))
        if key not in self._graphs:
            self._graphs[key] = self._captured(inputs, layout, context_only=context_only)
            self.counts["captured"] += 1
        self._graphs[key].replay()
        self.counts["replayed"] += 1
        for store in unset:
            store.settle()
        for branch in view.branches:
            branch.commit(layout)

    def _captured(
        self, inputs: CapturedInputs, layout: TokenLayout, *, context_only: bool
    ) -> CudaGraph:
        """One pass over a past of one length, as a graph; all share one pool of memory, since none
        runs beside another.
        """
        views = [
            (
                StaticView(cache, inputs, i, layout)
                if inputs.kinds is None
                else CodedView(
                    cache,
                    inputs,
                    i,
                    layout,
                    groups=inputs.groups[i, inputs.kinds],
                    appends=inputs.kinds[i].appends,
                )
            )
            for i, cache in enumerate(self.cache.branches)
        ]
        view = views[0] if isinstance(self.cache, KVCache) else PairedView(*views)

        def enter() -> None:
            self.denoiser.enter_context(inputs.x, inputs.t, inputs.cond, layout, cache=view)

        def step() -> None:
            v = self.ask(inputs.x, inputs.t, inputs.t_next, inputs.cond, layout, view)
            inputs.x.copy_(
                self.rule.on_device(
                    inputs.x, v, t=inputs.t, t_next=inputs.t_next, noise=inputs.noise
                )
            )

        return self._graph(enter if context_only else step, inputs.x.device)

    def _graph(self, step: Callable[[], None], device: torch.device) -> CudaGraph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return CudaGraph(step, device, pool=self._pool)

    def _begin(self, view: View, layout: TokenLayout) -> bool:
        """Find the slots of the pass; whether a graph can serve it."""
        ok = True
        for branch in view.branches:
            if not ok or branch.observer is not None or branch.mode == "readonly":
                return False
            branch.begin(layout)
            ok = branch.can_be_captured and (
                branch.keys == "post_rope" or branch.positions(layout).frames is not None
            )
        return ok


def new_loop(
    denoiser: VelocityModel,
    spec: StreamSpec,
    *,
    given: int,
    device: torch.device,
    interrupt: Callable[[], None] | None,
) -> ChunkLoop:
    """The chunk loop of a stream behind so many `given` blocks, over an empty cache of its own.
    `ConfigError` for graphs without CUDA.
    """
    if spec.graphs == "on" and device.type != "cuda":
        raise ConfigError(
            f"graphs='on' needs a CUDA device, the stream is on {device}; use graphs='off'"
        )
    policy, grid = spec.policy.fresh(), denoiser.token_grid(*spec.latent[1:])
    cache = denoiser.new_cache(
        num_frames=spec.cache_frames,
        grid=grid,
        keys=spec.keys or policy.keys,
        codec=None if spec.kv_codec is None else spec.kv_codec.fork(),
        hot_chunks=spec.hot_chunks,
        attention=spec.attention,
    )
    kind = CapturedLoop if spec.graphs == "on" else ChunkLoop
    return kind(
        denoiser,
        canvas=Canvas(grid, policy),
        # drawn last: what is refused draws nothing
        noise=spec.new_noise(given, device=device),
        rule=spec.recipe.rule,
        cache=cache,
        in_place=True,
        interrupt=interrupt,
    )
