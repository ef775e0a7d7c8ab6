"""Attention back ends of packages that are installed apart: FlashAttention-2, -3 and -4,
MagiAttention, Transformer Engine.

Tested with stand-ins of the documented signatures; which of them ran against the packages
themselves, on which card, is in docs/scale.md. Each raises `ConfigError` saying what to install
when its package is missing, and what to do when it cannot be called here, found out before the
first call of each kind (`attention_trial`).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import os
from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import lru_cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from rcm.core.device_copy import out_of_memory
from rcm.core.errors import ConfigError, first_line
from rcm.kernels.launching import device_of
from rcm.kernels.masks import Full, MaskSpec
from rcm.nets.attention_dense import by_segment, wants_gradient
from rcm.nets.attention_trial import TOKENS, trial

CHOOSE = (
    "choose attention_backend / RCM_ATTENTION_BACKEND from auto, triton, cudnn, sdpa, reference"
)


WITHOUT_KEY = "RCM_ATTENTION_WITHOUT"
"""Environment: back ends that auto does not choose, such as "flash3" or "flash3,flash4"."""
FLASH4_HINT = "pip install --pre 'flash-attn-4[cu13]' (needs compute capability 9.0 or higher)"


class NotInstalled(ConfigError):
    """The package of a back end is not there at all."""


def require_package(backend: str, module: str, *, hint: str) -> None:
    """Raise `NotInstalled` naming what to install unless `module` can be found, `ConfigError` where
    a parent of it does not load; only the parents of a dotted name are imported.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    except Exception as error:  # packages for another torch or card raise whatever they meet
        raise _does_not_load(backend, module, error) from error
    if not found:
        raise NotInstalled(
            f"attention backend '{backend}' is not available: {module} is not installed: {hint}; or"
            f" {CHOOSE}"
        )


def _does_not_load(backend: str, module: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"attention backend '{backend}' is not available: {module} is installed but does not load"
        f" ({first_line(error)}): install a build for torch {torch.__version__}; or {CHOOSE}"
    )


def failed(backend: str, module: str, q: Tensor, k: Tensor, error: Exception) -> Exception:
    """What to raise for what a package raised in a call that nothing spoke against: `error` itself
    where it is none of the package's, for memory ran out, or torch's recomputation leaves a forward
    pass as soon as it has what was saved.
    """
    if isinstance(error, ConfigError | _StopRecomputationError) or out_of_memory(error):
        return error
    return ConfigError(
        f"attention backend '{backend}' failed: {_told(module)} raised {first_line(error)} for q"
        f" {tuple(q.shape)}, k {tuple(k.shape)} in {q.dtype} on {q.device}; {CHOOSE}; where auto"
        f" had chosen it, {WITHOUT_KEY}={backend} leaves it out"
    )


class Package(ABC):
    """What the four have in common: the package's module, imported at the first call, 16-bit CUDA
    tensors, and a trial before the first call of each kind.
    """

    name: str
    module: str
    hint: str

    def __init__(self) -> None:
        require_package(self.name, self.module, hint=self.hint)

    @classmethod
    def loaded(cls) -> Self:
        """This back end with its package imported; `ConfigError` where that fails."""
        backend = cls()
        backend._import()
        return backend

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `AttentionBackend`. `ConfigError` where the package cannot be called here, or fails
        in a call after its trial; out of memory is raised as it is.
        """
        if (problem := self.problem(q, k, v)) is not None:
            raise ConfigError(problem)
        try:
            with nullcontext() if torch.compiler.is_compiling() else device_of(q):
                return self.attend(q, k, v, mask=mask, scale=scale)
        except Exception as error:
            told = failed(self.name, self.module, q, k, error)
            if told is error:
                raise
            raise told from error

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `AttentionBackend`: the package's own calls."""

    def problem(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why calls of this kind (heads and their sizes, dtype, device, gradient) cannot be made
        here, in one sentence; None where they can. Tried once per process; not in compiled code nor
        while a graph is captured. `ConfigError` for other dtypes, and a package that does not load.
        """
        module = self._open(q)
        if torch.compiler.is_compiling() or (
            q.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            return None
        widths = (q.shape[3], v.shape[3])
        return _tried(
            type(self), module, q.shape[2], widths, q.dtype, q.device, wants_gradient(q, k, v)
        )

    def _open(self, q: Tensor) -> ModuleType:
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"attention backend '{self.name}' needs bfloat16 or float16, got {q.dtype}; set"
                f" precision, or {CHOOSE}"
            )
        return self._import()

    def _import(self) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except Exception as error:
            raise _does_not_load(self.name, self.module, error) from error


@lru_cache(maxsize=256)
def _tried(
    kind: type[Package],
    module: ModuleType,
    heads: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    gradient: bool,
) -> str | None:
    """See `Package.problem`."""
    attend = partial(kind().attend, mask=None, scale=widths[0] ** -0.5)
    found = trial(attend, heads=heads, widths=widths, dtype=dtype, device=device, gradient=gradient)
    if found is None:
        return None
    how = "forward and backward" if gradient else "forward"
    return (
        f"attention backend '{kind.name}' is not available: {_told(module.__name__)} loads and"
        f" fails at its first call, {how} of {TOKENS} tokens in {heads} heads of {widths[0]} in"
        f" {dtype} on {device} ({found}): install a build for torch {torch.__version__} and this"
        f" machine; or {CHOOSE}"
    )


def _told(module: str) -> str:
    """A module, and what was installed to bring it, with versions."""
    top = module.partition(".")[0]
    brought = sorted(set(packages_distributions().get(top, ())))
    if brought:
        return f"{module} of {', '.join(f'{name} {version(name)}' for name in brought)}"
    found = getattr(importlib.import_module(top), "__version__", None)
    return module if found is None else f"{module} {found}"


class Flash2(Package):
    """FlashAttention-2, `flash_attn.flash_attn_func` (2.7 and later): one dense call per run of
    queries with equal keys.
    """

    # not "flash_attn" itself, which FlashAttention-4 alone leaves as a folder without functions
    name, module = "flash2", "flash_attn.flash_attn_interface"
    hint = "pip install 'rcm[flash]' (flash-attn 2, built from source, needs CUDA)"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `Package`."""
        attend = self._open(q).flash_attn_func
        deterministic = torch.are_deterministic_algorithms_enabled()

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _first(attend(q, k, v, softmax_scale=scale, deterministic=deterministic))

        return by_segment(dense, q, k, v, mask=mask)


class Flash3(Flash2):
    """FlashAttention-3, `flash_attn_interface.flash_attn_func` (Hopper), in the same calls.
    Versions differ in whether the log-sum-exp comes beside the result; both are read.
    """

    name, module = "flash3", "flash_attn_interface"
    hint = "build FlashAttention-3 (the folder hopper/ of its sources), needs sm90"


class Flash4(Flash2):
    """FlashAttention-4, `flash_attn.cute.flash_attn_func` (CuTe DSL, compute capability 9.0 and
    later), in the same calls; compiles at the first call of each kind, some seconds.
    """

    name, module = "flash4", "flash_attn.cute"
    hint = FLASH4_HINT


class Magi(Package):
    """MagiAttention, `magi_attention.api.flex_flash_attn_func` (1.0 and later, Hopper): one call
    over (query range, key range) pairs, all of the full type; a batch is a longer sequence whose
    entries share no pair.
    """

    name, module = "magi", "magi_attention.api"
    hint = "build MagiAttention from source (github.com/SandAI-org/MagiAttention), needs sm90"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `Package`."""
        attend = self._open(q).flex_flash_attn_func
        mask = Full(q.shape[1], k.shape[1]) if mask is None else mask
        q_ranges, k_ranges = _ranges(mask, q.shape[0], q.device)
        kinds = torch.zeros(len(q_ranges), dtype=torch.int32, device=q.device)
        extra: dict[str, int] = {}
        # until 1.0.3; later versions find it out themselves
        if "max_seqlen_k" in inspect.signature(attend).parameters:
            segments = mask.row_segments()
            extra["max_seqlen_q"] = max(s.q_stop - s.q_start for s in segments)
            extra["max_seqlen_k"] = max(
                stop - start for s in segments for start, stop in s.intervals
            )
        deterministic = torch.are_deterministic_algorithms_enabled()
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = attend(
            *flat,
            q_ranges=q_ranges,
            k_ranges=k_ranges,
            attn_type_map=kinds,
            softmax_scale=scale,
            deterministic=deterministic,
            **extra,
        )
        return _first(out).to(q.dtype).unflatten(0, (q.shape[0], q.shape[1]))


class TransformerEngine(Package):
    """NVIDIA Transformer Engine, `transformer_engine.pytorch.DotProductAttention` (2.0 and later)
    in the layout "bshd" without mask: one dense call per run of queries with equal keys.

    Its unfused attention, which holds the whole score matrix, is switched off for the process
    unless NVTE_UNFUSED_ATTN says otherwise; `ConfigError` where it has no other for a call. It is
    given torch's cuDNN, all parts of it, unless CUDNN_HOME names one: it would take what torch has
    not loaded yet from the CUDA toolkit, and the parts of two versions do not load together.
    """

    name, module = "te", "transformer_engine.pytorch"
    hint = "pip install 'rcm[te]' (needs a CUDA toolchain)"

    def __init__(self) -> None:
        folder = _folder_of_cudnn() if importlib.util.find_spec("transformer_engine") else None
        if folder and "CUDNN_HOME" not in os.environ:
            os.environ["CUDNN_HOME"] = folder
            try:  # before a look for the package imports its parent, which is linked to every part
                for part in sorted(Path(folder, "lib").glob("libcudnn*.so.*")):
                    ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise _does_not_load(self.name, "nvidia.cudnn", error) from error
        super().__init__()
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
        self._modules: dict[tuple[int, int, int, float], torch.nn.Module] = {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `Package`."""
        package, key = self._open(q), (q.shape[2], q.shape[3], v.shape[3], scale)
        if key not in self._modules:
            width = q.shape[3] if q.shape[3] == v.shape[3] else (q.shape[3], v.shape[3])
            self._modules[key] = package.DotProductAttention(
                q.shape[2],
                width,
                attention_dropout=0.0,
                qkv_format="bshd",
                attn_mask_type="no_mask",
                softmax_scale=scale,
            )
        attend = self._modules[key]

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            try:
                out = attend(*(_apart(x) for x in (q, k, v)))
            except ValueError as error:
                raise ConfigError(
                    "attention backend 'te' has no fused attention for this call"
                    f" ({first_line(error)}); set NVTE_UNFUSED_ATTN=1 to let it hold the whole"
                    f" score matrix, or {CHOOSE}"
                ) from error
            return out.unflatten(2, (q.shape[2], v.shape[3]))

        return by_segment(dense, q, k, v, mask=mask)


def _folder_of_cudnn() -> str | None:
    """Where the cuDNN is that came with torch as a package of its own; None for other builds."""
    try:
        found = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    places = list(found.submodule_search_locations or ()) if found else []
    return places[0] if places else None


def _apart(x: Tensor) -> Tensor:
    """`x` dense and at the start of its memory: of a view further in, Transformer Engine cannot
    tell the layout.
    """
    if x.is_contiguous() and x.storage_offset() == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@lru_cache(maxsize=64)
def _ranges(mask: MaskSpec, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and key ranges of every visible rectangle, int32 `[R, 2]`, batch entries one behind the
    other.
    """
    pairs = [
        (
            (b * mask.q_len + s.q_start, b * mask.q_len + s.q_stop),
            (b * mask.kv_len + start, b * mask.kv_len + stop),
        )
        for b in range(batch)
        for s in mask.row_segments()
        for start, stop in s.intervals
    ]
    # the tables may outlive the mode they were first asked for in
    with torch.inference_mode(False):
        queries, keys = (
            torch.tensor(ranges, dtype=torch.int32, device=device)
            for ranges in zip(*pairs, strict=True)
        )
    return queries, keys
