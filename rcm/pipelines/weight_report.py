"""What a file or folder of weights is: whose form, which network fits, what is missing, which
copies it holds, where it can be used.

Reads names and shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rcm.core.errors import CheckpointError
from rcm.nets.wan.config import PRESETS
from rcm.nets.wan.convert import PATCH_KEY
from rcm.nets.wan.foreign import LORA, foreign
from rcm.nets.wan.lora import lora_pairs
from rcm.pipelines.adapted_weights import adapter_settings
from rcm.pipelines.described import description_of, stream_command, typed
from rcm.pipelines.wan_files import (
    NetworkWeights,
    config_of,
    copies_in,
    network_headers,
    network_weights,
    preset_of,
    require_fit,
    told_size,
)
from rcm.pipelines.weight_files import experts_at, open_weights
from rcm.storage.state_dicts import listed, misfit, shapes_of
from rcm.storage.weight_files import WeightFile
from rcm.train.describe import Description


@dataclass(frozen=True)
class CopyReport:
    """One network in a file. `copy`: "ema", "live", "fake_score" or "unstated"; `prefix` of its
    keys; `network` in words, `preset` its name if it has one; `missing`, `extra`, `misshapen`
    tensors against that network, by the package's names; `problem` where its sizes cannot be told.
    """

    copy: str
    prefix: str
    tensors: int
    parameters: int
    dtype: str
    network: str
    preset: str | None
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def told(self) -> str:
        """Which copy, in words."""
        if self.copy == "unstated":
            return "weights (which copy is not stated)"
        return f"{self.copy} weights"

    @property
    def fits(self) -> bool:
        """Whether every tensor of the network is there, and nothing else."""
        return not (self.problem or self.missing or self.extra or self.misshapen)


@dataclass(frozen=True)
class WeightsReport:
    """What `inspect_weights` found. `family`: whose form; `container`: how it is stored; `dtype`
    and `tensors` of all entries; `patch`: "5-D" (a convolution's) or "2-D"; `copies` one per
    network; `others` the number of entries that belong to no network; `description` the stage and
    iteration it states; `problem` why it cannot be used, None where it can; `uses` where to pass
    it; `parts` the reports of the networks inside a published folder.
    """

    path: str
    family: str
    container: str = ""
    dtype: str = ""
    tensors: int = 0
    patch: str = ""
    copies: tuple[CopyReport, ...] = ()
    others: int = 0
    description: str | None = None
    problem: str | None = None
    uses: tuple[str, ...] = ()
    parts: tuple[WeightsReport, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it can be used as it is."""
        return self.problem is None and all(part.ok for part in self.parts)

    @property
    def preset(self) -> str | None:
        """The preset that its first network fits, None where none does."""
        return self.copies[0].preset if self.copies else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ok": self.ok, "parts": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        """The lines that `scripts.checkpoint inspect` prints."""
        lines = [self.path, f"  {self.family}"]
        if self.container:
            patch = f", patch weight {self.patch}" if self.patch else ""
            lines.append(f"  {self.container}: {self.tensors} tensors, {self.dtype}{patch}")
        for copy in self.copies:
            under = f" under {copy.prefix}*" if copy.prefix else ""
            lines.append(
                f"  {copy.told}{under}: {copy.network}; {copy.tensors} tensors, {copy.parameters:,}"
                f" parameters, {copy.dtype}"
            )
            for word in ("missing", "extra", "misshapen"):
                if names := getattr(copy, word):
                    lines.append(f"    {len(names)} {word}: {listed(names)}")
        if self.others:
            lines.append(f"  {self.others} other entries")
        if self.description:
            lines.append(f"  describes itself: {self.description}")
        known = "" if self.preset or not self.copies else ", sizes of no published network"
        wrong = f"  CANNOT BE USED: {self.problem or 'see below'}"
        lines.append(f"  complete{known}" if self.ok else wrong)
        lines += [f"  use: {use}" for use in self.uses]
        return "\n".join([*lines, *(f"\n{part}" for part in self.parts)])


def inspect_weights(path: str | Path) -> WeightsReport:
    """What is at `path`; raises `CheckpointError` only for what cannot be read (missing, truncated,
    damaged, no weights at all).
    """
    inner = experts_at(path)
    if len(inner) > 1:
        parts = tuple(inspect_weights(part) for part in inner)
        return WeightsReport(
            str(path),
            "folder of two experts, high noise first; pass each by its own path",
            parts=parts,
        )
    file = open_weights(path)
    told = foreign(file.headers)
    common: dict[str, Any] = {
        "path": str(path),
        "container": file.container,
        "dtype": dtypes(file.headers.values()),
        "tensors": len(file.headers),
    }
    if told == LORA:
        return _lora_report(file, common, description_of(file))
    if told is not None:
        return WeightsReport(
            family="not a network of this package", problem=f"it is {told}", **common
        )
    try:
        copies = tuple(
            _copy_report(NetworkWeights(file, prefix=prefix, copy=copy))
            for prefix, copy in copies_in(file).items()
        )
    except CheckpointError as error:
        return WeightsReport(family="unknown", problem=str(error), **common)
    used = sum(copy.tensors for copy in copies)
    patch = next(
        (tensor.dim() for key, tensor in file.headers.items() if key.endswith(PATCH_KEY)), None
    )
    description = description_of(file)
    streamed = None if description is None else stream_command(path, description)
    return WeightsReport(
        family=_family(file, patch, [copy.prefix for copy in copies]),
        patch=f"{patch}-D" if patch else "",
        copies=copies,
        others=len(file.headers) + len(file.others) - used,
        description=None if description is None else _stated(description),
        problem=_problem(copies),
        uses=(_uses(str(path), copies[0], streamed=streamed) if copies[0].fits else ()),
        **common,
    )


def dtypes(tensors: Iterable[Tensor]) -> str:
    """The dtypes of some tensors, most frequent first."""
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    found = counts.most_common()
    told = (name if len(counts) == 1 else f"{name} ({number})" for name, number in found)
    return ", ".join(told) or "nothing"


def nearest_preset(headers: Mapping[str, Tensor]) -> tuple[str, int]:
    """The preset that agrees with most names and shapes, and with how many."""
    found = _shapes(headers)
    agreement = {name: len(found & _shapes(network_headers(c))) for name, c in PRESETS.items()}
    best = max(agreement, key=lambda name: agreement[name])
    return best, agreement[best]


def _shapes(headers: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in headers.items()}


def _copy_report(network: NetworkWeights) -> CopyReport:
    try:
        config, problem = config_of(network), None
        told = told_size(config)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{network.file.path}: ")
        name, agreeing = nearest_preset(network.headers)
        config = PRESETS[name]
        told = f"nearest to {name}, {agreeing} tensors agree" if agreeing else "no Wan network"
    found = misfit(shapes_of(network), expected=shapes_of(network_headers(config)))
    return CopyReport(
        copy=network.copy,
        prefix=network.prefix,
        tensors=len(network),
        parameters=sum(tensor.numel() for tensor in network.headers.values()),
        dtype=dtypes(network.headers.values()),
        network=told,
        preset=None if problem else preset_of(config),
        problem=problem,
        missing=found.missing,
        extra=found.extra,
        misshapen=found.misshapen,
    )


def _problem(copies: tuple[CopyReport, ...]) -> str | None:
    """Why the networks cannot be used; None where they can."""
    for copy in copies:
        if copy.problem:
            return copy.problem
        if not copy.fits:
            return f"{copy.told}: not every tensor of {copy.network}, or others besides"
    return None


def _lora_report(
    file: WeightFile, common: dict[str, Any], description: Description | None
) -> WeightsReport:
    """A low-rank update; whether it fits is seen when it is merged, or at once where it says to
    which weights it belongs.
    """
    if description is not None and "adapters" in description.extra:
        return _adapters_report(file, common, description)
    try:
        pairs = lora_pairs(file.headers)
        ranks = sorted({file.headers[pair.down].shape[0] for pair in pairs.values()})
        settings = adapter_settings(file, given=True)
        said = (
            "in the file" if any(pair.alpha for pair in pairs.values()) else "unstated (the rank)"
        )
        alpha = f"{settings.alpha:g}" if settings.alpha is not None else said
        alpha += " over the square root of the rank" if settings.stabilised else ""
        alpha += f", {len(settings.alphas)} layers with their own" if settings.alphas else ""
        family = (
            f"low-rank update (LoRA) of {len(pairs)} weights, rank {', '.join(map(str, ranks))},"
            f" alpha {alpha}"
        )
    except CheckpointError as error:
        return WeightsReport(family="low-rank update (LoRA)", problem=str(error), **common)
    use = f"rcm checkpoint convert BASE TARGET --lora {typed(file.path)}"
    return WeightsReport(family=family, uses=(f"merge it: {use}",), **common)


def _adapters_report(
    file: WeightFile, common: dict[str, Any], description: Description
) -> WeightsReport:
    """Adapters of a training run: a checkpoint together with the weights they were trained on."""
    path, said = str(common["path"]), description.extra["adapters"]
    common |= {
        "family": (
            f"adapters (LoRA) of rank {said['rank']}, alpha {said['alpha']:g}, on"
            f" {', '.join(said['layers'])}"
        ),
        "description": (
            f"{_stated(description)}, on the weights of"
            f" {said['bases']['student']['path'] or 'a random start'}"
        ),
    }
    try:
        network = network_weights(file)
        require_fit(network, config_of(network))
    except CheckpointError as error:
        return WeightsReport(problem=str(error).removeprefix(f"{file.path} "), **common)
    streamed = stream_command(path, description)
    uses = (f"stream it: {streamed}",) if streamed else ()
    convert = f"rcm checkpoint convert {typed(path)} TARGET"
    return WeightsReport(
        uses=(
            *uses,
            f"as one network: {convert}",
            f"alone, for other tools: {convert} --adapters wan",
        ),
        **common,
    )


def _stated(description: Description) -> str:
    return (
        f"stage {description.stage}, iteration {description.iteration},"
        f" {description.network_name or 'no name'}"
    )


def _family(file: WeightFile, patch: int | None, prefixes: Iterable[str]) -> str:
    """Whose form this is, from prefixes, naming and patch weight."""
    leads = {prefix.partition(".")[0] for prefix in prefixes}
    if any(
        key.startswith("condition_embedder.") or ".condition_embedder." in key
        for key in file.headers
    ):
        return "diffusers"
    if leads & {"generator", "generator_ema", "critic"}:
        return "Self-Forcing family (Self-Forcing, CausVid, Causal-Forcing, LongLive)"
    if any("diffusion_model." in prefix for prefix in prefixes):
        return "ComfyUI repack"
    if leads & {"net", "net_ema", "net_fake_score"}:
        return "rcm training checkpoint" if len(leads) > 1 else "rcm (also this package's exports)"
    if patch == 2:
        return "rcm names without prefix (as TurboDiffusion publishes them)"
    return "original Wan" if patch == 5 else "unknown"


def _uses(path: str, first: CopyReport, *, streamed: str | None) -> tuple[str, ...]:
    """Where a network of this size can be passed; `streamed`: the line for one that says how it is
    sampled.
    """
    size, as_start = first.preset, typed(f"model.config.student_ckpt={path}")
    path = typed(path)
    if streamed:
        further = f"{as_start} (or a teacher's *_ckpt)"
        if "two times" in first.network:
            further = f"{as_start} with training_type=tf_meanflow"
        return f"stream it: {streamed}", f"training from it: {further}"
    module = "python -m rcm.inference."
    if size in ("1.3B", "14B"):
        return (
            (
                f"few-step student: {module}wan2pt1_t2v_rcm_infer --model_size {size} --dit_path"
                f" {path}"
            ),
            f"teacher: {module}wan2pt1_t2v_diffusion_infer --model_size {size} --dit_path {path}",
            f"training from it: {as_start} (or a teacher's *_ckpt)",
        )
    if size == "A14B":
        experts = "--high_noise_model_path or --low_noise_model_path, as its name says"
        return (
            (
                f"one expert of two: {module}wan2pt2_i2v_rcm_infer (students),"
                f" wan2pt2_i2v_diffusion_infer (teachers), {experts}"
            ),
        )
    if size in ("i2v-14B", "flf2v-14B"):
        last = " --last_image_path LAST" if size == "flf2v-14B" else ""
        return (
            (
                f"image to video: {module}wan2pt1_i2v_diffusion_infer --image_path FIRST{last}"
                f" --dit_path {path}"
            ),
        )
    return ("in Python: rcm.pipelines.load_wan with the sizes of this network",)
