"""The models of a Wan command: are their files there and of the right size, and a pipeline that
reads each when it needs it.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.clip_vision import ClipVision, open_clip
from rcm.encoders.codec import LatentCodec
from rcm.encoders.taehv import TinyDecoderCodec
from rcm.encoders.text_protocol import TextEncoder
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_compile import compile_decoder
from rcm.inference.wan_flags import PRECISIONS, PUBLISHED, NetworkFile
from rcm.kernels.precompile import precompile
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.config import WanConfig, preset
from rcm.nets.wan.fp8 import attention_error, noise_velocity, quantise_linears_
from rcm.parallel.agree import on_first
from rcm.parallel.apply import parallelize
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.adapted_weights import MergedWeights
from rcm.pipelines.experts import Expert
from rcm.pipelines.models import ImageEncoder
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import MemoryPolicy, Resident, move_codec
from rcm.pipelines.wan_files import config_of, load_wan, network_weights, random_wan, require_fit
from rcm.pipelines.wan_pipeline import WanPipeline
from rcm.pipelines.wan_ranks import check_ranks, num_ranks, share_tokens
from rcm.pipelines.wan_sizes import FrameSize
from rcm.pipelines.weight_files import open_weights
from rcm.storage.state_dicts import LazyWeights

FP8_PROBE = (32, 32)
"""Latent size of the noise on which --fp8 states its error."""
M = TypeVar("M")
VAE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Task:
    """What a command gives a network: so many input channels, CLIP's tokens of so many `images`,
    encoded by the file `clip_path`.
    """

    channels: int
    images: int = 0
    clip_path: str | None = None

    def require(self, config: WanConfig, path: str) -> None:
        """`CheckpointError` for a network that was made for another task."""
        if config.two_times:
            raise CheckpointError(
                f"{path} has two times, and this command would take its velocity at one for the"
                " mean between both; sample it with rcm stream --ckpt"
            )
        if config.in_dim != self.channels:
            raise CheckpointError(
                f"{path} reads {config.in_dim} channels, this command gives {self.channels}: it was"
                " made for another task"
            )
        reads = 0 if not config.image_branch else 2 if config.image_positions else 1
        if reads != self.images:
            raise CheckpointError(
                f"{path} reads CLIP's tokens of {reads} images, this command gives {self.images}:"
                f" {_TASKS[reads]}"
            )


_TASKS = (
    "it has no image branch; Wan2.2's experts are sampled by wan2pt2_i2v_diffusion_infer",
    (
        "it was made for a first frame alone (Wan2.1 I2V); wan2pt1_i2v_diffusion_infer samples it"
        " without --last_image_path"
    ),
    (
        "it was made for a first and a last frame (Wan2.1 FLF2V); wan2pt1_i2v_diffusion_infer"
        " samples it with --last_image_path"
    ),
)
"""What a network is that reads 0, 1, 2 images."""


def check_files(
    flags: argparse.Namespace, networks: Sequence[NetworkFile], *, family: str, task: Task
) -> None:
    """Raise `CheckpointError` for a file that is missing (where it is published), damaged, of
    another network than --model_size, or of another task, before any of them is read.
    """
    needed = [(network.flag, network.path, f"{family} {network.flag}") for network in networks]
    decoder = "tiny_decoder" if getattr(flags, "tiny_decoder", "") else "vae_path"
    for name in (decoder, "text_encoder_path"):
        needed.append((f"--{name}", getattr(flags, name), f"--{name}"))
    if task.clip_path is not None:
        needed.append(("--clip_path", task.clip_path, "--clip_path"))
    for flag, path, key in needed:
        if not path or not Path(path).exists():
            told = f"{flag} {path} does not exist" if path else f"{flag} is not given"
            raise CheckpointError(
                f"{told}; fetch {PUBLISHED[key]}, and say where it is with {flag}"
            )
    for network in networks:
        _check_network(network, size=flags.model_size, weights=flags.weights, task=task)
    if task.clip_path is not None:
        open_clip(task.clip_path)


def _check_network(file: NetworkFile, *, size: str, weights: str, task: Task) -> None:
    """Names and shapes of a network and its low-rank updates, from the headers of their files."""
    try:
        network = network_weights(open_weights(file.path), weights=weights)
        config = config_of(network, expect=None if size == "auto" else size)
        require_fit(network, config)
        task.require(config, file.path)
        merged: LazyWeights = network
        for lora in file.loras:
            merged = MergedWeights(merged, lora)
    except CheckpointError as error:
        raise CheckpointError(f"{file.flag} with --model_size {size}: {error}") from error


def open_pipeline(
    flags: argparse.Namespace,
    networks: Sequence[NetworkFile],
    *,
    family: str,
    task: Task,
    clock: PartClock,
    size: FrameSize,
) -> WanPipeline:
    """The pipeline of a command, once its ranks and its files are seen to fit; as
    `build_pipeline`.
    """
    if flags.model_size != "auto":
        heads = preset(flags.model_size).num_heads
        check_ranks(num_ranks(), num_heads=heads, tokens_per_frame=tokens_per_frame(size))
    if not flags.random_weights:
        on_first(lambda: check_files(flags, networks, family=family, task=task))
    return build_pipeline(flags, networks, clock=clock, size=size, clip_path=task.clip_path)


def tokens_per_frame(size: FrameSize) -> int:
    """Tokens of a latent frame of Wan's: patches of 2 x 2."""
    return size.height * size.width // (2 * WanVAECodec.spatial_stride) ** 2


def build_pipeline(
    flags: argparse.Namespace,
    networks: Sequence[NetworkFile],
    *,
    clock: PartClock,
    size: FrameSize,
    clip_path: str | None = None,
) -> WanPipeline:
    """The pipeline of a command for frames of `size`, with CLIP where `clip_path` names its file.
    Rank 0 checks text encoder and codec now, and its refusal is everyone's; networks are read when
    they are needed. Collective over the ranks of a launch.
    """
    if flags.compile and num_ranks() > 1:
        raise ConfigError("--compile works on one GPU; leave it out under torchrun")
    pieces, policy = _Pieces(flags, clock, size), MemoryPolicy.preset(flags.offload)
    if policy.expert == "cpu" and flags.warmup_iters == 0:
        # one video: the expert that is done is not needed again, and copying 29 GB takes 15 s
        policy = replace(policy, expert="free")
    codec = pieces.resident(pieces.codec, move=move_codec)
    _compile_ahead(flags, size, device=clock.device)

    def open_text() -> TextEncoder:
        codec.use()
        codec.rest(policy.codec)
        return pieces.text()

    text = on_first(open_text)
    return WanPipeline(
        text=_NoText() if text is None else text,
        experts=[pieces.expert(file, number) for number, file in enumerate(networks)],
        codec=codec,
        device=clock.device,
        clock=clock,
        memory=policy,
        clip=None if clip_path is None else pieces.clip(clip_path),
    )


class _Pieces:
    """What a video is made with, as the flags say, each made when it is asked for."""

    def __init__(self, flags: argparse.Namespace, clock: PartClock, size: FrameSize) -> None:
        self.flags, self.clock, self.size = flags, clock, size
        self.device, self.random = clock.device, flags.random_weights

    def resident(
        self, load: Callable[[], M], *, move: Callable[[M, torch.device], Any]
    ) -> Resident[M]:
        return Resident(load, move=move, device=self.device, clock=self.clock)

    def clip(self, path: str) -> ImageEncoder:
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        if self.random:
            return _RandomImages()
        return ClipVision.from_file(path, device=self.device, dtype=dtype)

    def text(self) -> TextEncoder:
        flags, kind = self.flags, UMT5TextEncoder
        if self.random:
            return kind.random(text_dim=preset(flags.model_size).text_dim, device=self.device)
        where = {"tokenizer": flags.tokenizer_path, "cache": flags.text_cache}
        return kind.from_files(flags.text_encoder_path, device=self.device, **where)

    def codec(self) -> LatentCodec:
        flags = self.flags
        kind: type[WanVAECodec] | type[TinyDecoderCodec] = WanVAECodec
        options: dict[str, Any] = {"device": self.device, "dtype": VAE_DTYPES[flags.vae_precision]}
        path = flags.vae_path
        if tiny := getattr(flags, "tiny_decoder", ""):
            kind, path = TinyDecoderCodec, tiny
        else:
            stride = WanVAECodec.spatial_stride
            options["tile"] = None if flags.vae_tile is None else flags.vae_tile // stride
        return kind.random(**options) if self.random else kind.from_file(path, **options)

    def expert(self, file: NetworkFile, number: int) -> Expert:
        load = partial(self.network, file, number)
        network = self.resident(load, move=lambda denoiser, device: denoiser.net.to(device))
        return Expert(file.name, network, file.down_to)

    def network(self, file: NetworkFile, number: int) -> Denoiser:
        flags = self.flags
        numerics = PRECISIONS[flags.precision]
        precision = Precision.preset(numerics.precision)
        options = {"device": self.device, "precision": precision, "attention": flags.attention}
        if self.random:
            denoiser = random_wan(preset(flags.model_size), seed=number, **options)
        else:
            denoiser = load_wan(
                file.path,
                expect=None if flags.model_size == "auto" else flags.model_size,
                weights=flags.weights,
                loras=file.loras,
                **options,
            )
        denoiser.net.set_fused(numerics.fused)
        if (fp8 := getattr(flags, "fp8", "off")) != "off":
            report = quantise_linears_(
                denoiser.net, which=fp8, velocity=noise_velocity(denoiser.net, size=FP8_PROBE)
            )
            logger.info("{}", report)
        if getattr(flags, "fp8_attention", False):
            error = attention_error(denoiser, size=FP8_PROBE)
            logger.info(
                "FP8 attention: error {:.2e} of the velocity, same noise and weights", error
            )
        if flags.compile:
            parallelize(denoiser.net, dims=ParallelDims(), precision=precision, compile=True)
        return share_tokens(denoiser, tokens_per_frame=tokens_per_frame(self.size))


def _compile_ahead(flags: argparse.Namespace, size: FrameSize, *, device: torch.device) -> None:
    """Begin to compile, in threads, kernels that would be compiled one by one when they are first
    needed: the decoder's take 11 s on an H200.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return

    def decoder() -> None:
        dtype = VAE_DTYPES[flags.vae_precision]
        compile_decoder(device, size=(size.height, size.width), dtype=dtype)

    # Triton is imported only on CUDA
    def coded_attention() -> None:
        from rcm.kernels.fp8_attention.compile_list import attention_plan

        precompile(attention_plan, device=device)

    def captured_attention() -> None:
        from rcm.kernels.persistent_attention.compile_list import attention_plan

        precompile(attention_plan, device=device)

    if not getattr(flags, "tiny_decoder", "") and flags.vae_tile is None:
        _in_thread(decoder, "the decoder")
    if getattr(flags, "fp8_attention", False):
        _in_thread(coded_attention, "FP8 attention")
    elif (
        getattr(flags, "graphs", "off") != "off"
        and flags.attention == "auto"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and Precision.preset(PRECISIONS[flags.precision].precision).compute == torch.bfloat16
    ):
        _in_thread(captured_attention, "attention")


def _in_thread(compile_: Callable[[], None], what: str) -> None:
    def run() -> None:
        try:
            compile_()
        # whoever needs them compiles what is missing, and raises what stands in its way
        except Exception as error:
            logger.warning("compiling {} ahead of time failed: {}", what, error)

    # no daemon: one that comes back out of torch while the interpreter ends aborts the process
    threading.Thread(target=run, name=f"compile {what}").start()


class _RandomImages:
    """CLIP's place under --random_weights."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Random tokens [B, 257, 1280]."""
        return torch.randn(images.shape[0], 257, 1280, generator=torch.Generator().manual_seed(0))


class _NoText:
    """The text encoder of ranks that do not encode: they receive what rank 0 encoded."""

    text_len = text_dim = 0
    negative_prompt = ""

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Nothing asks for it: `Models.embed` encodes on rank 0."""
        # a call here is a fault of the program, not of its user: no sentence for a command line
        raise NotImplementedError("rank 0 encodes, and sends what it made")
