"""From a DCP checkpoint to one file that anybody can load: `net.*` tensors of one role, in one
dtype, with the self-description beside them.

Runs in one process on CPU; reads only the tensors asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError, ConfigError
from rcm.core.output_file import OutputFile
from rcm.nets.wan.convert import WRAPPERS
from rcm.nets.wan.lora import by_layer, published
from rcm.storage.dcp_folder import DcpFolder
from rcm.storage.inside import pointed_at
from rcm.storage.pickle_file import write_pickle
from rcm.storage.safetensors_file import write_safetensors
from rcm.storage.state_dicts import in_dtype
from rcm.train.describe import FILE_NAME, Description, replacing_described

PREFIXES = {"ema": "net_ema.", "reg": "net.", "fake_score": "net_fake_score."}
"""Name of a set of weights -> its key prefix: the student's average, the student itself, the
critic.
"""


def find_model_directory(path: str | Path) -> Path | None:
    """The DCP directory with the weights: `path` itself, its `model/`, or that of the newest
    checkpoint of a job directory; None where there is none.
    """
    path = Path(path)
    pointer = path / "checkpoints" / "latest_checkpoint.txt"
    if pointer.is_file():
        path = pointed_at(pointer)
    return next(
        (found for found in (path, path / "model") if (found / ".metadata").is_file()), None
    )


def model_directory(path: str | Path) -> Path:
    """As `find_model_directory`; `CheckpointError` where there is none."""
    found = find_model_directory(path)
    if found is None:
        raise CheckpointError(
            f"{path} is not a DCP checkpoint: neither it nor {Path(path) / 'model'} has a .metadata"
            " file"
        )
    return found


def describe(path: str | Path) -> Description | None:
    """Self-description that travels with a DCP checkpoint or an exported file; None where there is
    none.
    """
    path = Path(path)
    if path.is_file():
        beside = path.with_name(path.name + ".json")
    else:
        model = find_model_directory(path)
        places = [path] if model is None else [model, model.parent]
        beside = next(
            (place / FILE_NAME for place in places if (place / FILE_NAME).is_file()),
            places[0] / FILE_NAME,
        )
    return Description.read(beside) if beside.is_file() else None


def read_weights(
    path: str | Path, *, weights: str = "ema", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Full tensors of one set of `weights` ("ema", "reg", "fake_score") of a DCP checkpoint, by
    network key (without the names that wrappers leave), in `dtype` (None: as stored).
    """
    if weights not in PREFIXES:
        raise ConfigError(f"unknown weights {weights!r}; choose from {', '.join(PREFIXES)}")
    directory, prefix = model_directory(path), PREFIXES[weights]
    folder = DcpFolder(directory)
    keys = [k for k in folder if k.startswith(prefix) and not k.endswith("._extra_state")]
    if not keys:
        present = sorted({k.partition(".")[0] for k in folder})
        raise CheckpointError(
            f"{directory} holds no {prefix}* weights (it has {', '.join(present)}); choose other"
            f" weights than {weights!r}"
        )
    return {WRAPPERS.sub("", k.removeprefix(prefix)): in_dtype(k, folder[k], dtype) for k in keys}


def export(
    path: str | Path,
    save_path: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write one set of weights to `save_path` (.safetensors or .pt/.pth) under `net.*` keys,
    atomically, and return it. Of a run that trained adapters, those alone, under the keys of the
    published layout "wan" (`rcm/nets/wan/lora.py:LAYOUTS`).

    The self-description goes into a safetensors file's metadata and into `<save_path>.json`, with
    the set of weights in `extra["weights"]`. Raises ConfigError for another suffix, OSError where
    no file can be made.
    """
    target = Path(save_path)
    if target.suffix not in (".safetensors", ".pt", ".pth"):
        raise ConfigError(f"save path {target} must end in .safetensors, .pt or .pth")
    OutputFile.claim(target)
    description, tensors = describe(path), read_weights(path, weights=weights, dtype=dtype)
    adapters = None if description is None else description.extra.get("adapters")
    if adapters is None:
        tensors = {f"net.{k}": v for k, v in tensors.items()}
    else:
        tensors = published(by_layer(tensors), layout="wan", alpha=adapters["alpha"])
    if description is not None:
        description = description.holding(weights)
    with replacing_described(target, description) as partial:
        if target.suffix == ".safetensors":
            metadata = {"format": "pt", **({"rcm": description.to_json()} if description else {})}
            write_safetensors(partial, tensors, tensors.__getitem__, metadata=metadata)
        else:
            write_pickle(partial, tensors)
    return target
