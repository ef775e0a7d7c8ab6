"""Streams whose attention runs in FP8 beside the same in bf16: error of the latents, milliseconds
of a chunk, frames per second.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from rcm.encoders.wan_vae import WanVAECodec
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from scripts.bench_measure import relative
from scripts.bench_stream_runs import (
    FRAMES,
    LATENT,
    RECIPES,
    build,
    engine,
    prompt,
    steady,
    video,
)

ATTENTION = ("net", "fp8")
VIDEOS = {"c3-3 [4,2]": 15, "c1-1 [4,1]": 7}
"""Recipe to the latent frames on which errors are taken."""
WINDOWS = {"c3-3 [4]": 7, "c3-3 [4,2]": 7, "c1-1 [4,1]": 21}
"""Recipe to the chunks of a window of 21 frames."""


def latents(denoiser: Denoiser, name: str, *, graphs: str, attention: str) -> Tensor:
    """Of a short video over a window of three chunks and a sink."""
    options = {"num_frames": VIDEOS[name], "policy": SlidingWindow(3, 1), "draw_on": "cuda"}
    spec = StreamSpec(RECIPES[name], LATENT, graphs=graphs, attention=attention, **options)
    with Session(denoiser, None, prompt(denoiser), spec, device="cuda") as session:
        return torch.cat([chunk.latents for chunk in session], dim=2)


def errors(denoiser: Denoiser) -> dict[str, Any]:
    """Relative errors against captured bf16 on the same noise: of FP8, captured and not, and, the
    yardstick, of bf16 with plain layers.
    """
    plain = build("1.3B", fused="off")
    plain.net.load_state_dict(denoiser.net.state_dict())
    found = {}
    for name in VIDEOS:
        truth = latents(denoiser, name, graphs="on", attention="net")
        runs = {
            "bf16, plain layers": latents(plain, name, graphs="off", attention="net"),
            "fp8": latents(denoiser, name, graphs="on", attention="fp8"),
            "fp8, eager": latents(denoiser, name, graphs="off", attention="fp8"),
        }
        found[name] = {kind: relative(x, truth) for kind, x in runs.items()}
        first = relative(runs["fp8"][:, :, 0], truth[:, :, 0])
        eager = relative(runs["fp8"], runs["fp8, eager"])
        found[name] |= {"fp8, first frame": first, "fp8, captured against eager": eager}
    return found


def measure() -> dict[str, Any]:
    """Errors, then times of the 1.3B network with random weights; chunks without the decoder, then
    two figures with it.
    """
    denoiser, found = build("1.3B"), {}
    found["errors"] = errors(denoiser)
    print(found["errors"], flush=True)
    for name, window in WINDOWS.items():
        for attention in ATTENTION:
            gc.collect()
            options = dict.fromkeys(("look_ahead", "first_alone", "to_host", "idle"), False)
            options |= {"chunks": 12, "window": window, "attention": attention}
            got = steady(denoiser, None, RECIPES[name], **options)
            found[f"{name} latents, {attention}"] = got
            told = f"{name} window of {FRAMES} frames, latents, {attention}"
            print(f"{told}: {got['chunk_ms']:.1f} ms per chunk", flush=True)
    codec = WanVAECodec.random(device="cuda")
    for attention in ATTENTION:
        options = {"chunks": 16, "window": 7, "idle": False, "attention": attention}
        got = steady(denoiser, codec, RECIPES["c3-3 [4]"], **options)
        found[f"c3-3 [4] decoded, {attention}"] = got
        told = f"c3-3 [4] window of {FRAMES} frames, decoded, {attention}"
        print(f"{told}: {got['chunk_ms']:.1f} ms per chunk", flush=True)
        spec = engine(RECIPES["c3-3 [4,2]"], num_frames=FRAMES, attention=attention)
        got = video(denoiser, codec, spec, repeats=2)
        found[f"c3-3 [4,2] video, {attention}"] = got
        told = f"{got['fps']:.1f} FPS, first {got['first_visible_s']:.3f} s"
        print(f"c3-3 [4,2] 81 frames, {attention}: {told}", flush=True)
    return found
