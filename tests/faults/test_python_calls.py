"""Calls from Python with values of the wrong kind: `rcm.load`, `stream`, `open`, `save`, sessions,
records. Refused in one sentence that names the argument, before anything is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rcm
from rcm.kernels.kv_codec.spec import KVCodecSpec
from rcm.pipelines.session_pool import SessionPool
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from rcm.train.optim import AdamWConfig
from tests.faults.case import Fault, each

P = "a red square moving left"
NAN, INF = float("nan"), float("inf")
HUGE = 10**5000
LATENT = (1, 24, 1, 8, 8)


@cache
def shipped() -> Any:
    return rcm.load(device="cpu")


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    yield
    shipped.cache_clear()


def python(name: str, refusal: str, call: Callable[[Path], object]) -> Fault:
    return Fault(name, kind="values of Python calls", refusal=refusal, call=call)


def first(stream: Any) -> object:
    return next(iter(stream))


def valued(call: Callable[..., object], where: str, table: dict[str, tuple]) -> list[Fault]:
    """One case per value of every argument; the refusal names the argument."""
    return [
        python(
            f"{where} {name} {str(type(value).__name__)} {i}",
            rf"(\b|kv_){name}=|{name} must|{name} has",
            lambda d, n=name, v=value: call(**{n: v}),
        )
        for name, values in table.items()
        for i, value in enumerate(values)
    ]


STREAM = {
    "seed": (-1, 2**32, HUGE, 1.5, "x", None, True, NAN),
    "num_frames": ("9", True, 1.5, NAN, INF, 10**12),
    "guidance": ("x", NAN, INF, True),
    "recipe": ("few_step", {}, 5),
    "prefix": ("x", [1], torch.zeros(3), torch.zeros(LATENT, dtype=torch.int64), torch.full(LATENT, NAN)),
    "ignore_recipe": ("no",),
}
OPEN = {
    "seed": (-1, 1.5, "x", None, True),
    "num_frames": ("9", 1.5, INF),
    "noise": ("x", None),
    "generator": (5, "x"),
    "policy": ("sliding", SlidingWindow, None),
    "keys": ("x", 5),
    "attention": ("x", None),
    "kv_codec": ("int4", 5),
    "hot_chunks": (1.5, "x", None, True, -1),
    "graphs": ("auto", True),
    "look_ahead": ("no", 5, None),
    "first_alone": ("no",),
    "to_host": (1,),
    "decode_ranks": (0, 1.5, True, "x"),
    "recipe": ("x",),
}
LOAD = {
    "path": (5, b"x"),
    "device": ("bogus", "meta", "", 5.5),
    "precision": (5, torch.float16),
    "files": ("vae.pth",),
}
SAVE = {"upscale": (1.5, "2", True), "path": (5, None)}


def stream(**options: Any) -> object:
    return first(shipped().stream(P, **options))


def opened(**options: Any) -> object:
    return first(shipped().loaded.open([P], **{"policy": SlidingWindow(3), **options}))


def session(**options: Any) -> Any:
    return shipped().loaded.open([P], policy=SlidingWindow(3), **options)


def save(folder: Path, **options: Any) -> object:
    return shipped().save(**{"path": folder / "a.mp4", "prompt": P, **options})


PROMPTS = [
    python(f"prompt {name}", "prompt", lambda d, v=value: first(shipped().stream(v)))
    for name, value in {
        "none": None,
        "number": 5,
        "bytes": b"a",
        "list of numbers": [5],
        "empty list": [],
        "mapping": {"a": 1},
        "set": {"a"},
    }.items()
] + [
    python(f"prompts {name}", "prompts must be a list", lambda d, v=value: shipped().loaded.open(v, policy=SlidingWindow(3)))
    for name, value in {"one text": P, "none": None, "numbers": [5], "an iterator": iter([P])}.items()
]
SESSIONS = [
    python("condition none", "cond=None must be a Condition", lambda d: session().set_condition(None)),
    python("condition text", "cond='a' must be a Condition", lambda d: session().set_condition("a")),
    python("recipe text", "recipe='x' must be a SamplingRecipe", lambda d: session().set_recipe("x")),
    python("restart text", "cond='a' must be a Condition", lambda d: session().restart("a")),
    python("restart seed", "seed=1.5 must be a whole number", lambda d: session().restart(seed=1.5)),
    python("restart with NaN", "prefix has NaN", lambda d: session().restart(prefix=torch.full(LATENT, NAN))),
]
RECORDS = [
    python("window of a half", "blocks=1.5 must be a whole number", lambda d: SlidingWindow(1.5)),
    python("window text", "blocks='3' must be a whole number", lambda d: SlidingWindow("3")),
    python("sinks truth", "sinks=True must be a whole number", lambda d: SlidingWindow(3, True)),
    python("rolling text", "total='6' must be", lambda d: RollingSink("6")),
    python("horizon infinite", "horizon=inf must be", lambda d: InfinityRope(horizon=INF)),
    python("rate text", "mr_alpha_long='a' must be", lambda d: MemRope(alpha_long="a")),
    python("recipe times NaN", "mids=.*finite", lambda d: SamplingRecipe("few_step", "c1-1", mids=((NAN,),))),
    python("recipe times text", "mids=.*finite", lambda d: SamplingRecipe("few_step", "c1-1", mids=(("5/8",),))),
    python("recipe guidance", "guidance=nan must be a finite", lambda d: SamplingRecipe("few_step", "c1-1", guidance=NAN)),
    python("recipe context", "noisy_context='no' must be True or False", lambda d: SamplingRecipe("few_step", "c1-1", noisy_context="no")),
    python("rate of a trainer", "lr='1e-4' must be a finite number", lambda d: AdamWConfig(lr="1e-4")),
]
CODEC = {
    "key": ("int4", None),
    "qvg_clusters": (1.5, "4", True),
    "qvg_iters": (NAN,),
    "smooth_alpha": ("x", NAN),
    "triton_restore": ("yes",),
    "qvg_warm_start": (1,),
}
POOL = {"max_sessions": ("x", 1.5, True), "memory_budget_bytes": ("x", NAN), "model": (None,)}
CASES = [
    *valued(KVCodecSpec, "codec", CODEC),
    *valued(lambda **o: SessionPool(**{"model": shipped().loaded, **o}), "pool", POOL),
    *valued(stream, "stream", STREAM),
    *valued(opened, "open", OPEN),
    *valued(lambda **o: rcm.load(**{"device": "cpu", **o}), "load", LOAD),
    *[python(f"save {n} {i}", rf"\b{n}=", lambda d, n=n, v=v: save(d, **{n: v})) for n, vs in SAVE.items() for i, v in enumerate(vs)],
]


@each(CASES + PROMPTS + SESSIONS + RECORDS)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
