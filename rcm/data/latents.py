"""Tar shards as released: `KEY.latent.pt`, `KEY.embed.pt`, `KEY.prompt.txt`.

Why not stream with webdataset: it has no resumable position and shuffles within a buffer. Here the
order belongs to `loader.Loader`, a permutation over all samples, and this source answers "give me
samples i, j, k". Released shards are read as they are.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from rcm.core.errors import ConfigError
from rcm.data.batch import LatentBatch
from rcm.data.set_index import each, open_shards
from rcm.data.stored_sample import stored_prompt, stored_tensor
from rcm.data.tar_index import CONTEXT, FIELDS, Shard

FINGERPRINT = "v2-"
"""Beginning of fingerprints that cover all shards; earlier versions looked at the first sample
alone.
"""

PATTERN_KNOB = "dataloader_train.tar_path_pattern"
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_SHARDS = 1_000_000
_LATENT, _EMBED, _PROMPT, _CONTEXT = range(4)

_Sample = tuple[torch.Tensor, torch.Tensor, str, torch.Tensor | None]
"""Latents, text embedding, prompt, context."""


def expand_pattern(pattern: str, *, knob: str = PATTERN_KNOB) -> list[Path]:
    """Files of a pattern with braces ("shard-{000000..000011}.tar", "{a,b}.tar") and globs ("*",
    "?", "[...]"), sorted within each brace alternative. Folders and files that exist under the very
    name that is written ("run[1]", "x{y}") are meant as they stand.

    A file that braces spell out and that is missing raises, as does a pattern that matches nothing:
    `ConfigError` naming `knob`, the key or flag to change.
    """
    files: list[Path] = []
    start, rest = _split_literal(pattern)
    for name in _expand_braces(rest, knob):
        matches = _matches(start + name)
        if not matches:
            part = f" (of {pattern!r})" if start + name != pattern else ""
            raise ConfigError(f"no shard matches {start + name!r}{part}; change {knob}")
        files.extend(map(Path, matches))
    for path, whole in zip(files, each(Path.is_file, files), strict=True):
        if not whole:
            raise ConfigError(
                f"{path} is no file but a folder or a device (of {pattern!r}); change {knob}"
            )
    return list(dict.fromkeys(files))


def _matches(name: str) -> list[str]:
    """What is there of a pattern without braces."""
    if os.path.lexists(name):
        found = [name]
    else:
        literal, magic = _split_literal(name)
        found = sorted(glob.glob(glob.escape(literal) + magic, recursive=True))
    return [match for match in found if not os.path.basename(match).startswith("._")]


def _split_literal(pattern: str) -> tuple[str, str]:
    """The longest beginning, in whole names, that exists as it is written, and the rest."""
    ends = [found.start() for found in re.finditer(r"(?<=[^/])/", pattern)] + [len(pattern)]
    there = max((end for end in ends if os.path.exists(pattern[:end])), default=0)
    return pattern[:there], pattern[there:]


def _expand_braces(pattern: str, knob: str) -> list[str]:
    """Every alternative, as in bash: braces without a comma or a range are plain characters."""
    match = next(
        (m for m in re.finditer(r"\{([^{}]*)\}", pattern) if "," in m[1] or _RANGE.fullmatch(m[1])),
        None,
    )
    if match is None:
        return [pattern]
    ends = _RANGE.fullmatch(match[1])
    if ends:
        low, high, width = int(ends[1]), int(ends[2]), len(ends[1])
        if abs(high - low) >= _MOST_SHARDS:
            raise ConfigError(
                f"{{{match[1]}}} names more than {_MOST_SHARDS} shards; change {knob}"
            )
        numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
        choices = [f"{i:0{width}d}" for i in numbers]
    else:
        choices = match[1].split(",")
    names = [
        name
        for choice in choices
        for name in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :], knob)
    ]
    if len(names) > _MOST_SHARDS:
        raise ConfigError(f"{pattern!r} names more than {_MOST_SHARDS} shards; change {knob}")
    return names


class LatentShards:
    """Random access to tar shards, a `loader.Source`: files of a pattern, or the given ones.

    `num_latent_frames`: take the first that many latent frames of each sample (None: all).
    `latent_channels`, `latent_size` (H, W), `text_shape` (most rows L, E): refuse samples that
    differ (None: whatever the first sample has, since a batch needs equal shapes). `cache_bytes`:
    keep decoded samples in memory up to this many bytes. Trajectories [K, C, T, H, W] arrive as
    `LatentBatch.trajectory`, with `context.pt` as `latents` where the shards have it, else the
    trajectory's clean end. Raises `ConfigError` for a pattern without files and for shapes that
    contradict the settings, `ShardError` for damage, both naming shard and member.
    """

    def __init__(
        self,
        tar_path_pattern: str | Sequence[Path],
        *,
        num_latent_frames: int | None = None,
        latent_channels: int | None = None,
        latent_size: tuple[int, int] | None = None,
        text_shape: tuple[int, int] | None = None,
        cache_bytes: int = 0,
    ) -> None:
        if isinstance(tar_path_pattern, str):
            tar_path_pattern = expand_pattern(tar_path_pattern)
        if num_latent_frames is not None and num_latent_frames < 1:
            raise ConfigError(f"num_latent_frames={num_latent_frames} must be at least 1")
        self.shards = open_shards(tar_path_pattern)
        self._first = np.cumsum([0] + [len(shard) for shard in self.shards])
        self._fingerprint = ""
        self._frames, self._channels = num_latent_frames, latent_channels
        self._size, self._text_shape = latent_size, text_shape
        with_context = [shard.path for shard in self.shards if CONTEXT in shard.fields]
        if len(with_context) not in (0, len(self.shards)):
            without = next(shard.path for shard in self.shards if CONTEXT not in shard.fields)
            raise ConfigError(
                f"{with_context[0]} has {CONTEXT} members and {without} has none: two kinds of"
                f" data; change {PATTERN_KNOB}"
            )
        self._cache: dict[int, _Sample] = {}
        self._cache_room = cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first[-1])

    def fingerprint(self) -> str:
        """Hash of names, keys and contents (`content_digest`) of all shards, for checkpoints."""
        if not self._fingerprint:  # of ten million samples it takes a second, and every save asks
            digest = hashlib.sha256()
            for shard in self.shards:
                name = shard.path.name.encode(errors="surrogateescape")
                digest.update(b"%b\n%d\n%b\n" % (name, shard.size, shard.joined_keys()))
                digest.update(b"%b\n" % shard.digest.encode())
            self._fingerprint = f"{FINGERPRINT}{digest.hexdigest()[:16]}"
        return self._fingerprint

    def captions(self) -> Iterator[str]:
        """Every caption, in order, without reading latents; what is not UTF-8 in them is replaced
        (`fetch` refuses it).
        """
        return (
            shard.read(i, _PROMPT).decode("utf-8", errors="replace")
            for shard in self.shards
            for i in range(len(shard))
        )

    def fetch(self, indices: Sequence[int]) -> LatentBatch:
        """The batch of samples `indices`, each in [0, len): latents and embeddings as float32."""
        samples = [self._sample(index) for index in indices]
        for what, part in (("latents", 0), ("text embeddings", 1)):
            shapes = [tuple((latents, text)[part].shape) for latents, text, *_ in samples]
            if len(set(shapes)) > 1:
                names = [
                    f"{self._name(i, part)} {shape}"
                    for i, shape in zip(indices, shapes, strict=True)
                ]
                raise ConfigError(
                    f"{what} of one batch differ in shape: {'; '.join(names)}; use shards of one"
                    " shape"
                )
        stacked = _stacked([sample[0] for sample in samples])
        contexts = [sample[3] for sample in samples if sample[3] is not None]
        clean = stacked[:, 0] if stacked.ndim == 6 else stacked
        return LatentBatch(
            latents=_stacked(contexts) if contexts else clean,
            cond=_stacked([sample[1] for sample in samples]),
            prompts=[sample[2] for sample in samples],
            keys=[shard.key(sample) for shard, sample in map(self._locate, indices)],
            trajectory=stacked if stacked.ndim == 6 else None,
        )

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.shards[shard], index - int(self._first[shard])

    def _name(self, index: int, field: int) -> str:
        shard, sample = self._locate(index)
        return f"{shard.path}: {shard.member(sample, field)}"

    def _sample(self, index: int) -> _Sample:
        if index in self._cache:
            return self._cache[index]
        shard, sample = self._locate(index)
        members = shard.read_members(sample, range(len(shard.fields)))
        stored = stored_tensor(shard, sample, _LATENT, members[_LATENT])
        latents = self._check_latents(stored, self._name(index, _LATENT))
        text = stored_tensor(shard, sample, _EMBED, members[_EMBED])
        most, width = self._text_shape or (None, None)
        if text.ndim != 2 or (
            most is not None and (text.shape[0] > most or text.shape[1] != width)
        ):
            wanted = "[L, E]" if most is None else f"[at most {most}, {width}]"
            raise ConfigError(
                f"{self._name(index, _EMBED)} has shape {list(text.shape)}, expected {wanted} "
                f"(the network's text_len, text_dim); change {PATTERN_KNOB} or model.config.net"
            )
        prompt = stored_prompt(shard, sample, members[_PROMPT])
        context = None
        if CONTEXT in shard.fields:
            context = self._context(shard, sample, latents, members[_CONTEXT])
        numbers = latents.numel() + text.numel() + (0 if context is None else context.numel())
        with self._lock:
            if index not in self._cache and 4 * numbers <= self._cache_room:
                self._cache[index] = (
                    latents.to(torch.float32, copy=True),
                    text.to(torch.float32, copy=True),
                    prompt,
                    None if context is None else context.to(torch.float32, copy=True),
                )
                self._cache_room -= 4 * numbers
        return latents, text, prompt, context

    def _context(
        self, shard: Shard, sample: int, latents: torch.Tensor, data: bytearray
    ) -> torch.Tensor:
        """The data's latents [C, T, H, W] of a trajectory `latents`, cut to the same frames."""
        name = f"{shard.path}: {shard.member(sample, _CONTEXT)}"
        context = self._check_latents(stored_tensor(shard, sample, _CONTEXT, data), name)
        if latents.ndim != 5 or context.shape != latents.shape[1:]:
            raise ConfigError(
                f"{name} has shape {tuple(context.shape)}, beside {FIELDS[0]}"
                f" {tuple(latents.shape)}; it belongs to a trajectory [K, C, T, H, W] of its own"
                f" shape; change {PATTERN_KNOB}"
            )
        return context

    def _check_latents(self, latents: torch.Tensor, name: str) -> torch.Tensor:
        """[C, T, H, W], or [K, C, T, H, W] of ODE trajectories, cut to the frames asked for."""
        if latents.ndim not in (4, 5):
            raise ConfigError(
                f"{name} has shape {tuple(latents.shape)}, expected [C, T, H, W] or a trajectory"
                f" [K, C, T, H, W]; change {PATTERN_KNOB}"
            )
        channels, frames = latents.shape[-4], latents.shape[-3]
        if self._channels is not None and channels != self._channels:
            raise ConfigError(
                f"{name} has {channels} channels, the network takes {self._channels}; change"
                f" {PATTERN_KNOB} or the network's in_dim"
            )
        if self._frames is not None and frames < self._frames:
            raise ConfigError(
                f"{name} has {frames} latent frames, fewer than state_t={self._frames}; change"
                f" model.config.state_t or {PATTERN_KNOB}"
            )
        if self._size is not None and tuple(latents.shape[-2:]) != tuple(self._size):
            raise ConfigError(
                f"{name} has latent frames of {latents.shape[-2]} x {latents.shape[-1]}, "
                f"the run is set to {self._size[0]} x {self._size[1]}; "
                f"change model.config.latent_hw (or resolution and aspect_ratio) or {PATTERN_KNOB}"
            )
        return latents if self._frames is None else latents[..., : self._frames, :, :]


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape and any dtype as one of float32, converted where they will stand."""
    stacked = torch.empty((len(tensors), *tensors[0].shape), dtype=torch.float32)
    for row, tensor in zip(stacked, tensors, strict=True):
        row.copy_(tensor)
    return stacked
