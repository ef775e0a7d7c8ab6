"""Synthetic data: a bidirectional many-step teacher samples a list of prompts into shards
(docs/reference/training.md#data).

Sample i is a function of the teacher, prompt i and `seed + i`, whatever the batch size, the number
of ranks, or what was built before.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.data.shard_writer import (
    ShardSample,
    ShardSpan,
    pending_shards,
    record_if_whole,
    require_finite,
    write_span,
)
from rcm.encoders.text_protocol import TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, guided
from rcm.nets.velocity_model import VelocityModel
from rcm.parallel.apply import parallelize
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.described import PieceFiles
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.text_to_video import WholeVideoRecipe, walk
from rcm.storage.pickle_file import write_pickle

RELEASE_RECIPE = WholeVideoRecipe("ode", sigma_max=5000.0, steps=100, shift=3.0, guidance=5.0)
"""How the released data sets were sampled from Wan2.1-14B (docs/reference/training.md#data)."""

_TEXT_BATCH = 8

_Pending = tuple[list[Path], list[ShardSpan]]
"""Shards of a part, and those that are still to be written."""


@dataclass(frozen=True)
class Teacher:
    """A many-step bidirectional network, ready to sample.

    `latent_shape` (C, T, H, W) of a sample; `recipe` its default sampler; `codec`, `encoder`
    describe what its latents and embeddings are of; `identity` tells it from another teacher in a
    data set's manifest. `shared`: the ranks that compute each sample together, None without context
    parallelism.
    """

    denoiser: Denoiser
    text: TextEncoder
    latent_shape: tuple[int, int, int, int]
    recipe: WholeVideoRecipe
    codec: Mapping[str, Any]
    encoder: Mapping[str, Any]
    identity: Mapping[str, Any]
    device: torch.device
    shared: ParallelDims | None = None

    def over(self, dims: ParallelDims) -> Teacher:
        """This teacher with each sample spread over the `dims.cp` ranks of a group (Ulysses), its
        weights sharded over them.

        Raises `ConfigError` unless cp divides heads and tokens per frame and the dims multiply to
        the world size.
        """
        if dims.cp == 1:
            return self
        grid = self.denoiser.token_grid(*self.latent_shape[2:])
        dims.check(num_heads=self.denoiser.net.config.num_heads, tokens_per_frame=grid[0] * grid[1])
        parallelize(self.denoiser.net, dims=dims, precision=self.denoiser.precision)
        return replace(self, shared=dims)

    def condition(self, text: Tensor) -> Condition:
        """Embeddings [B, L, E] on the device, with their cross-attention keys computed once where
        the network is whole.
        """
        cond = Condition(text.to(self.device))
        return cond if self.shared is not None else self.denoiser.prepare(cond)


def described_teacher(
    path: str | Path,
    *,
    weights: str,
    device: torch.device,
    precision: Precision | str | None,
    attention: str,
    files: PieceFiles = PieceFiles(),
) -> Teacher:
    """The teacher that a checkpoint of this package holds; `files` as for `open_checkpoint`.
    `ConfigError` for a causal or few-step one: it has no whole-video ODE.
    """
    model = open_checkpoint(
        path, weights=weights, device=device, precision=precision, attention=attention, files=files
    )
    told = model.description
    if model.sampler is None or model.sampler.kind != "ode":
        kind = "causal" if model.sampler is None else "a few-step student"
        raise ConfigError(
            f"--teacher {path} is {kind} (stage {told.stage}); data are sampled from a"
            " bidirectional many-step teacher"
        )
    return Teacher(
        denoiser=model.denoiser,
        text=model.text,
        latent_shape=model.latent_shape,
        recipe=model.sampler,
        codec=told.extra["codec"],
        encoder=told.extra["text"],
        identity={
            "path": str(model.source.resolve()),
            "weights": weights,
            "stage": told.stage,
            "iteration": told.iteration,
        },
        device=device,
    )


def wan_teacher(
    denoiser: Denoiser,
    text: TextEncoder,
    *,
    latent_shape: tuple[int, int, int, int],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Teacher:
    """A teacher with Wan's VAE latents and umT5 embeddings, sampled as the release sampled its data
    by default.
    """
    channels, sizes = latent_shape[0], denoiser.net.config
    if channels != sizes.in_dim or channels != sizes.out_dim:
        raise ConfigError(
            f"the network reads {sizes.in_dim} and predicts {sizes.out_dim} channels, samples have"
            f" {channels}: data are sampled from a text-to-video network"
        )
    if text.text_dim != sizes.text_dim or text.text_len > sizes.text_len:
        raise ConfigError(
            f"the text encoder gives {text.text_len} rows of width {text.text_dim}, the network"
            f" reads at most {sizes.text_len} of {sizes.text_dim}; they do not belong together"
            " (--text_encoder_path, --dit_path)"
        )
    denoiser.token_grid(*latent_shape[2:])
    codec, encoder = {"name": "wan_vae"}, {"name": "umt5"}
    return Teacher(denoiser, text, latent_shape, RELEASE_RECIPE, codec, encoder, identity, device)


def sample_noise(shape: Sequence[int], numbers: range, *, seed: int) -> Tensor:
    """Unit noise [B, *shape] float32 on the CPU; the row of sample i is the first draw of a
    generator seeded with `seed + i`.
    """
    generators = (torch.Generator().manual_seed(seed + number) for number in numbers)
    return torch.stack([torch.randn(tuple(shape), generator=each) for each in generators])


@dataclass
class TeacherSampler:
    """Makes samples by number. Sample i takes prompt i modulo their number, and always its own
    noise. `recipe` must be an ODE.
    """

    teacher: Teacher
    recipe: WholeVideoRecipe
    _: KW_ONLY
    prompts: Sequence[str]
    seed: int
    dtype: torch.dtype
    _negative: Condition | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.recipe.kind != "ode":
            raise ConfigError(
                f"data are sampled along the ODE, got a recipe of kind {self.recipe.kind!r}"
            )
        if not self.prompts:
            raise ConfigError("no prompts to sample; give --prompts FILE")

    def manifest(self) -> dict[str, object]:
        """What the samples are made of; nothing that leaves them as they are (batch size, ranks) is
        in it.
        """
        precision = self.teacher.denoiser.precision
        return {
            "source": "teacher",
            "teacher": dict(self.teacher.identity),
            "sampler": {**asdict(self.recipe), "solver": self.recipe.solver or "euler"},
            "precision": {
                "compute": _dtype_name(precision.compute),
                "time": _dtype_name(precision.time),
            },
            "seed": self.seed,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
            "latent_shape": list(self.teacher.latent_shape),
            "codec": dict(self.teacher.codec),
            "text": dict(self.teacher.encoder),
            "dtype": _dtype_name(self.dtype),
        }

    def samples(self, start: int, stop: int, *, batch: int) -> Iterator[ShardSample]:
        """Samples start .. stop - 1, `batch` at a time. All their prompts are encoded first; then
        an encoder that can be unloaded is.
        """
        if batch < 1:
            raise ConfigError(f"batch={batch} must be at least 1; change --batch")
        prompts = [self.prompts[number % len(self.prompts)] for number in range(start, stop)]
        embeddings, model = self._encode(prompts), self._model()
        for first in range(start, stop, batch):
            numbers = range(first, min(first + batch, stop))
            chosen = slice(first - start, first - start + len(numbers))
            yield from map(
                ShardSample,
                self._latents(model, numbers, embeddings[chosen]),
                embeddings[chosen],
                prompts[chosen],
            )

    def _model(self) -> VelocityModel:
        return guided(self.teacher.denoiser, self._negative_condition, self.recipe.guidance)

    def _negative_condition(self) -> Condition:
        if self._negative is None:
            text = self._encode([self.teacher.text.negative_prompt])
            self._negative = self.teacher.condition(text.float())
        return self._negative

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, E] in the stored dtype on the CPU, so that the teacher sees what training will.
        One rank of a group encodes.
        """
        dims, text = self.teacher.shared, self.teacher.text
        out = torch.empty(len(prompts), text.text_len, text.text_dim, dtype=self.dtype)
        if dims is None or dims.cp_rank == 0:
            for first in range(0, len(prompts), _TEXT_BATCH):
                out[first : first + _TEXT_BATCH] = text.encode(prompts[first : first + _TEXT_BATCH])
            if hasattr(text, "unload"):
                text.unload()
        if dims is not None:
            dist.broadcast(out.view(torch.uint8), src=dims.rank - dims.cp_rank, group=dims.cp_group)
        return out

    @torch.no_grad()
    def _latents(self, model: VelocityModel, numbers: range, embeddings: Tensor) -> Tensor:
        """x0 [B, C, T, H, W] in the stored dtype on the CPU; the state of the sampler in
        float64.
        """
        teacher = self.teacher
        noise = sample_noise(teacher.latent_shape, numbers, seed=self.seed)
        cond = teacher.condition(embeddings.float())
        x0 = walk(model, cond, self.recipe, noise.to(teacher.device, torch.float64))
        require_finite(
            x0,
            numbers,
            what="latents",
            knob="look at the teacher's weights and precision, or lower --guidance_scale",
        )
        return x0.to("cpu", self.dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_teacher_shards(
    folder: Path,
    sampler: TeacherSampler,
    *,
    num: int,
    shard_size: int,
    batch: int,
    part: tuple[int, int] = (0, 1),
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write samples 0 .. num - 1 as shards, continuing what is there; returns the paths of this
    `part` (see `pending_shards`).

    `told(done, total)` is called after every sample with this part's counts. With a teacher that is
    shared by a context-parallel group all its ranks call this; the first of them reads and writes
    the folder and returns its paths, the others none.
    """
    dims = sampler.teacher.shared
    leads = dims is None or dims.cp_rank == 0
    recipe: dict[str, Any] = {
        "num_samples": num,
        "shard_size": shard_size,
        "recipe": sampler.manifest(),
        "part": part,
    }
    paths, missing = _on_leader(lambda: pending_shards(folder, **recipe), dims)
    total, done = sum(span.stop - span.start for span in missing), 0

    def counted(span: ShardSpan) -> Iterator[ShardSample]:
        nonlocal done
        for sample in sampler.samples(span.start, span.stop, batch=batch):
            done += 1
            told(done, total)
            yield sample

    for span in missing:
        if leads:
            write_span(span, counted(span))
        else:
            deque(counted(span), maxlen=0)
    if leads:
        record_if_whole(folder, num_samples=num, shard_size=shard_size)
    return paths if leads else []


def _on_leader(look: Callable[[], _Pending], dims: ParallelDims | None) -> _Pending:
    """What the first rank of a context-parallel group finds, on all of its ranks; its refusal is
    everyone's.
    """
    if dims is None:
        return look()
    box: list[tuple[_Pending | None, str]] = [(None, "")]
    if dims.cp_rank == 0:
        try:
            box = [(look(), "")]
        except (ConfigError, OSError) as error:
            box = [(None, str(error))]
    dist.broadcast_object_list(box, src=dims.rank - dims.cp_rank, group=dims.cp_group)
    found, refusal = box[0]
    if found is None:
        raise ConfigError(refusal)
    return found


def write_negative_embedding(
    path: Path, text: TextEncoder, *, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Store the negative prompt's embedding as a tensor [L, E], as `model.config.neg_embed_path`
    reads it (docs/reference/encoders.md#umt5); whole or not at all.
    """
    embedding = text.encode([text.negative_prompt])[0].to("cpu", dtype).contiguous().clone()
    try:
        with OutputFile.claim(path).replacing() as temporary:
            write_pickle(temporary, embedding)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write the negative embedding to {path}: {error}") from error
    return path
