"""Stream to a web page on which you change the prompt and watch it take effect, chunk by chunk.

    rcm serve  # the shipped checkpoint of the toy world, on this machine only
    rcm serve --ckpt outputs/rcm/toy/toy_tf_c3-3 --max_sessions 2
    RCM_TOKEN=secret rcm serve --host 0.0.0.0 --ckpt student.safetensors --vae_path Wan2.1_VAE.pth

All viewers of the shared stream see the same video; a private stream is a separate session.
Ctrl-C closes all of them. docs/serve.md has more.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rcm.core.arguments import Arguments, one_of
from rcm.core.errors import ConfigError
from rcm.encoders.prompt_cleaning import says_nothing
from rcm.inference.checkpoint_flags import HERE, KINDS, open_flagged
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import check_device, exit_status
from rcm.pipelines.from_checkpoint import LoadedModel
from rcm.pipelines.session_pool import SessionPool
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.storage.shipped import TOY_PROMPTS, asset

GIB = 2**30
PACKAGES = ("starlette", "uvicorn", "websockets")
TOKEN_VARIABLE = "RCM_TOKEN"
WAN_PROMPTS = "prompts/wan.txt"
SMALL = 128
"""Pixels of the shorter side up to which pictures are sent exactly, as PNG."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rcm serve`; returns the exit status, 0 after Ctrl-C."""
    return exit_status(lambda: run(_parser().parse_args(argv)))


def run(flags: argparse.Namespace) -> None:
    """Check the flags, load the checkpoint, serve until stopped."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"rcm serve needs {', '.join(missing)}, which is not installed; install it with: pip"
            ' install "rcm[serve]"'
        )
    check_device(flags.device)
    if flags.prompt is not None and says_nothing(flags.prompt):
        raise ConfigError("--prompt is empty; write one, or leave it out for the first preset")
    token = flags.token if flags.token is not None else os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and (not token.isprintable() or not token or " " in token):
        raise ConfigError(
            f"{TOKEN_VARIABLE if flags.token is None else '--token'} must be a text that clients"
            " can send: not empty, printable, without blanks; choose another"
        )
    loopback = flags.host in ("127.0.0.1", "localhost", "::1")
    if not loopback and token is None:
        raise ConfigError(
            f"--host {flags.host} is open to other machines; protect it with --token TEXT (or"
            f" {TOKEN_VARIABLE} in the environment), or leave --host out"
        )
    from rcm.serve.access import Access
    from rcm.serve.hub import Hub
    from rcm.serve.limits import Limits
    from rcm.serve.server import listen, serve

    limits = Limits(
        sessions=flags.max_sessions,
        clients=flags.max_clients,
        idle_s=flags.idle_s,
        session_s=flags.session_s,
    )
    listener = listen(
        flags.host, flags.port, send_s=limits.send_s, send_buffer=flags.send_kib * 1024
    )
    try:
        model = open_flagged(flags)
        offer, budget = make_offer(flags, model), _budget(flags, model.device)
        # what no client could open is refused now
        pool = SessionPool(model, budget)
        pool.close(pool.open([offer.prompt], to_host=True, **offer.options))
        hub = Hub(offer, limits, budget)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"{model.source}: http://{shown}:{port}/{'' if token is None else '?token=...'} (Ctrl-C"
            " stops it)",
            flush=True,
        )
        closed = asyncio.run(
            serve(hub, Access(token, tuple(flags.allow_origin), loopback), listener)
        )
    finally:
        listener.close()
    print(f"stopped; {closed} session{'' if closed == 1 else 's'} closed", flush=True)


def make_offer(flags: argparse.Namespace, model: LoadedModel) -> Any:
    """How sessions of `model` are opened and shown. `ConfigError` for a checkpoint that cannot
    stream.
    """
    from rcm.serve.hub import Offer

    recipe = model.recipe
    if recipe is None:
        stage = model.description.stage
        raise ConfigError(
            f"{model.source} samples whole videos (stage {stage}); only causal checkpoints can be"
            " served"
        )
    graphs = flags.graphs == "on" or (flags.graphs == "auto" and model.device.type == "cuda")
    sinks = recipe.sinks if flags.sinks is None else flags.sinks
    window = flags.window or recipe.window or max(1, _trained_blocks(model) - sinks)
    options: dict[str, Any] = {"policy": SlidingWindow(window, sinks), "seed": flags.seed}
    if graphs:
        options |= {"graphs": "on", "look_ahead": True, "first_alone": True}
    words = tuple(getattr(model.text, "words", ()))
    presets = _presets(words)
    kind = flags.format
    if kind == "auto":
        kind = "png" if min(model.pixel_size) <= SMALL else "jpeg"
        if kind == "png" and flags.quality is not None:
            raise ConfigError(
                "--quality has no effect on pictures as small as these, which are sent as png; add"
                " --format jpeg, or leave --quality out"
            )
    return Offer(
        model=model,
        prompt=flags.prompt or presets[0],
        options=options,
        fps=flags.fps or model.fps,
        kind=kind,
        quality=85 if flags.quality is None else flags.quality,
        presets=presets,
        words=words,
    )


def _trained_blocks(model: LoadedModel) -> int:
    """Whole blocks of a video as long as those it was trained on."""
    assert model.recipe is not None
    pattern, blocks = model.recipe.blocks, 1
    while pattern.frames_before(blocks + 1) <= model.latent_shape[1]:
        blocks += 1
    return blocks


def _presets(words: tuple[str, ...]) -> tuple[str, ...]:
    """Prompts of the shipped lists: those whose words the checkpoint knows, or, where it keeps no
    list of words, those made for Wan.
    """
    lines = asset(TOY_PROMPTS if words else WAN_PROMPTS).read_text(encoding="utf-8").splitlines()
    known = [
        line
        for line in lines
        if line.strip() and (not words or set(line.lower().split()) <= set(words))
    ]
    return tuple(known[:8]) or (" ".join(words[:3]),)


def _budget(flags: argparse.Namespace, device: torch.device) -> int | None:
    """Bytes for sessions: as told, or nine tenths of what a card has left; on a CPU without bound
    but for --max_sessions.
    """
    if flags.memory_gib is not None:
        return int(flags.memory_gib * GIB)
    return int(0.9 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


_WHAT = """
ckpt         job folder, iter_* folder, or exported file [the shipped toy checkpoint]
prompt TEXT  what a stream begins with [the first preset of the page]
seed = 0     of the noise [%(default)s]
window N     newest blocks that a chunk attends to, its own included [as in training]
sinks N      first blocks that stay visible [as in training]
fps          pictures per second [as trained]
format auto|jpeg|webp|png = auto  picture format [png for small ones, else jpeg]
quality int                       picture quality of jpeg and webp, 1 to 100 [85]
"""
_VIEWERS = f"""
host str = 127.0.0.1  address to listen on [%(default)s: this machine only]
port int = 8765       port to listen on; 0: any free one [%(default)s]
token str             secret that a client must give; better set the variable {TOKEN_VARIABLE},
  which other users cannot see
allow_origin ORIGIN   another page that may open streams, repeatable
max_sessions N = 4    streams at once, the shared one included [%(default)s]
max_clients N = 100   viewers at once [%(default)s]
memory_gib X          limit for caches and decoders of all streams
  [cuda: 0.9 of what is left; cpu: no bound]
send_kib N = 256      kernel send buffer per client, which delays a slow one [%(default)s]
idle_s S = 60.0       seconds until a stream that nobody watches is closed [%(default)s]
session_s S = 3600.0  seconds until a private stream is closed [%(default)s]
"""
_MACHINE = """
weights = ema           averaged or last weights [%(default)s]
device                  cpu or cuda [%(default)s]
precision               of the network [that of the training run]
graphs auto|on|off = auto  CUDA graphs, and decoding overlapped with denoising [on with cuda]
vae_path                Wan2.1_VAE.pth [where the checkpoint says]
text_encoder_path       umT5 [where the checkpoint says]
tokenizer_path          folder of umT5's tokenizer [beside the text encoder]
text_cache              folder that keeps umT5's embeddings for later runs
"""


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="rcm serve", allow_abbrev=False, description=__doc__)
    group = parser.add_argument_group
    add_flags(group("what to stream"), _WHAT, KINDS)
    several = {"action": "append", "default": []}
    add_flags(group("who may watch"), _VIEWERS, allow_origin=several)
    add_flags(group("weights and machine"), _MACHINE, KINDS, device=HERE)
    parser.idle("quality", beside="format", when=one_of("format", "png"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
