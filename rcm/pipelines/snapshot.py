"""Which sessions may take up a snapshot: those that would have made it. What would go on as another
video, or fail chunks later, is refused before anything is changed.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.nets.denoiser import Guided
from rcm.nets.velocity_model import VelocityModel
from rcm.pipelines.finite import net_of
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.autoregressive import ChunkLoop

PARTS = (
    *("recipe", "seed", "given", "prefix", "block", "pending", "ahead", "pieces"),
    *("steering", "loop", "decoder", "made_by"),
)
"""What a snapshot consists of."""


def maker(spec: StreamSpec, loop: ChunkLoop, *, decoder: object) -> dict[str, str]:
    """What a session has in common with those that may take up its snapshots, by name."""
    recipe, model = spec.recipe, loop.denoiser
    guide = model if isinstance(model, Guided) and model.active else None
    precision = getattr(getattr(model, "denoiser", model), "precision", None)
    return {
        "network": signature(model),
        "compute dtype": str(model.compute_dtype),
        "dtype of times": str(getattr(precision, "time", None)),
        "latent": str(tuple(spec.latent)),
        "batch": str(spec.batch),
        "pattern": recipe.pattern,
        "sampling kind": recipe.kind,
        "guidance": "none" if guide is None else f"{guide.scale}",
        "negative prompt": "none" if guide is None else digest(guide.negative.text),
        # that of a video has been drawn, to its end
        "noise": "chunk" if spec.noise == "chunk" else f"video of {spec.num_frames} frames",
        "draw_on": "-" if spec.noise == "video" else str(spec.draw_on),
        "policy": told(spec.policy),
        "room of the cache in frames": str(spec.cache_frames),
        "keys": spec.keys or spec.policy.keys,
        "attention": spec.attention,
        "kv_codec": told(getattr(spec.kv_codec, "spec", spec.kv_codec)),
        "hot_chunks": str(spec.hot_chunks),
        "decoder": "none" if decoder is None else type(decoder).__name__,
        "tile of the decoder": str(getattr(decoder, "tile", None)),
    }


def require_alike(state: Any, mine: dict[str, str], spec: StreamSpec) -> None:
    """`ConfigError` unless `state` is a whole snapshot by a session that is like `mine` and has not
    gone beyond the end of `spec`.
    """
    require_kind("state", state, dict)
    if missing := [part for part in PARTS if part not in state]:
        raise ConfigError(f"state is no snapshot of a session: it lacks {', '.join(missing)}")
    theirs = state["made_by"]
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ConfigError(
                f"this snapshot was made by a session with another {name}: {theirs.get(name)}, here"
                f" {value}; restore it in a session opened alike"
            )
    done = spec.recipe.blocks.frames_before(state["block"])
    if spec.num_frames is not None and done > spec.num_frames:
        raise ConfigError(
            f"this snapshot was made after {done} latent frames, the stream ends at"
            f" {spec.num_frames}; open one with a larger num_frames"
        )


def signature(model: VelocityModel) -> str:
    """Tells models apart: equal for equal weights, of which it looks at a few numbers each."""
    weights = list(net_of(model).parameters())
    few = [p.detach()[(0,) * (p.ndim - 1)][:8].double() for p in weights if p.ndim]
    return digest(torch.cat(few), told="".join(f"{tuple(p.shape)}" for p in weights))


def digest(x: Tensor, *, told: str = "") -> str:
    """Tells numbers apart, and what is `told` of them."""
    numbers = x.detach().double().cpu().contiguous().numpy().tobytes()
    return blake2b(told.encode() + numbers, digest_size=8).hexdigest()


def told(part: object) -> str:
    """A setting in words that are the same in every process."""
    if not is_dataclass(part):
        return "none" if part is None else type(part).__name__
    values = ((f.name, getattr(part, f.name)) for f in fields(part))
    shown = (f"{name}={value!r}" for name, value in values if not callable(value))
    return f"{type(part).__name__}({', '.join(shown)})"
