"""Weights at any path: the containers of `rcm/storage`, and what is made of several: checkpoints of
runs, published folders of networks.

    file, shards, folder with one network    rcm/storage/weight_files.py
    folder                                   a DCP directory, or a checkpoint of a run
    folder of folders                        diffusers (transformer/, transformer_2/), Wan2.2
                                             (high_noise_model/, low_noise_model/)

Whose network the keys are is `rcm/pipelines/wan_files.py`'s business. docs/reference/wan.md#files.
"""

from __future__ import annotations

from pathlib import Path

from rcm.core.errors import CheckpointError
from rcm.storage.dcp_folder import DcpFolder
from rcm.storage.weight_files import WeightFile, open_container
from rcm.train.export import find_model_directory

EXPERTS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
"""Folder names of networks inside a published folder: diffusers, Wan2.2; the second is the expert
for low noise.
"""


def open_weights(path: str | Path) -> WeightFile:
    """The tensors of any container (see the module), none of them read yet.

    Raises `CheckpointError` for a path that does not exist, a folder that could mean several
    networks (naming them), a file that is truncated, damaged or of an unknown kind, a shard that is
    missing or disagrees with its index.
    """
    if not str(path).strip() or not Path(path).is_dir():
        return open_container(path)
    path = Path(path)
    inner = experts_at(path)
    if len(inner) > 1:
        named = " (high noise) and ".join(map(str, inner)) + " (low noise)"
        raise CheckpointError(f"{path} holds two networks: {named}; give one of these paths")
    if inner and inner[0].name != EXPERTS[0][0]:  # which alone is the network of Wan2.1
        raise CheckpointError(
            f"{path} holds one of two experts, {inner[0].name}, and not the other; give {inner[0]}"
            " if it is meant"
        )
    if inner:
        return open_weights(inner[0])
    model = find_model_directory(path)
    if model is None:
        return open_container(
            path, hint="it is not a DCP checkpoint either (no .metadata in it or in its model/)"
        )
    folder = DcpFolder(model)
    return WeightFile(
        model,
        container="DCP directory",
        headers=folder.headers,
        read=folder.__getitem__,
        others=folder.others,
    )


def experts_at(path: str | Path) -> tuple[Path, ...]:
    """Folders of the networks inside a published folder, high noise first; empty for any other
    path.
    """
    path = Path(path)
    for names in EXPERTS:
        found = tuple(path / name for name in names if (path / name).is_dir())
        if found:
            return found
    return ()
