"""First frames of the image-to-video suite: places, the image of a prompt, its frame.

VBench publishes the list in its repository and the images, cropped, for download; neither comes
with this package. (VBench++, Huang et al. 2024, arXiv 2411.13503.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_prompts import SuiteItem
from rcm.pipelines.image_condition import read_image
from rcm.pipelines.wan_sizes import FrameSize

I2V_FILE = "vbench2_i2v_full_info.json"
CROPS = ("1-1", "8-5", "7-4", "16-9")
"""Aspect ratios, width to height, in which VBench publishes the images."""
_CLONE = Path("vbench2_beta_i2v")
_MOTION = ", camera "
"""Between the prompt that an image is named after and the camera's motion."""


def placed_list(assets: Path, *, clone: Path | None, knob: str) -> Path:
    """The suite's list, of a `clone` of VBench or among `assets`; `knob`: flag of another file."""
    path = assets / I2V_FILE if clone is None else clone / _CLONE / I2V_FILE
    if not path.is_file():
        raise ConfigError(
            f"no list of the image-to-video suite at {path}; take {_CLONE / I2V_FILE} from"
            f" github.com/Vchitect/VBench and place it there, name one with {knob} FILE, or a clone"
            " with --vbench_repo DIR"
        )
    return path


def placed_crops(assets: Path, *, clone: Path | None, aspect_ratio: str) -> Path:
    """Images of `aspect_ratio` ("16:9"), of a `clone` or among `assets`."""
    name = aspect_ratio.replace(":", "-")
    if name not in CROPS:
        raise ConfigError(
            f"VBench has no images of --aspect_ratio {aspect_ratio} (only {', '.join(CROPS)}); give"
            " --image_dir DIR"
        )
    path = (assets if clone is None else clone / _CLONE / "data") / "crop" / name
    if not path.is_dir():
        raise ConfigError(
            f"no images of the image-to-video suite at {path}; unpack crop.zip there, which"
            f" {_CLONE / 'download_data.sh'} of github.com/Vchitect/VBench fetches, or name a"
            " folder with --image_dir DIR"
        )
    return path


def with_images(items: Sequence[SuiteItem]) -> list[SuiteItem]:
    """`items` with images: in older lists, prompts of camera motion share that of the prompt they
    begin with. `ConfigError` for a prompt whose image is not known.
    """
    known = {item.prompt: item.image_name for item in items}
    found = []
    for item in items:
        base = item.prompt.rpartition(_MOTION)[0]
        found.append(item if item.image_name else replace(item, image_name=known.get(base)))
    unnamed = next((item.prompt for item in found if not item.image_name), None)
    if unnamed is not None:
        raise ConfigError(
            f"the prompt {unnamed!r} has no image_name; --prompt_json must be the image-to-video"
            " suite's list"
        )
    return found


def require_images(
    items: Sequence[SuiteItem], folder: Path, *, skip_missing: bool = False
) -> list[SuiteItem]:
    """The items whose image is in `folder`; `ConfigError` for a missing one, unless `skip_missing`
    and some are there.
    """
    there = [
        item
        for item in items
        if item.image_name is not None and (folder / item.image_name).is_file()
    ]
    if len(there) == len(items) or (there and skip_missing):
        return there
    first = next(item.image_name for item in items if item not in there)
    more = "" if skip_missing else ", or pass --skip_missing_images for a partial suite"
    raise ConfigError(
        f"{len(items) - len(there)} of {len(items)} images are not in --image_dir {folder}, the"
        f" first is {first!r}; put them there (VBench's crops of one aspect ratio){more}"
    )


def stretched_image(path: str | Path, size: FrameSize) -> Tensor:
    """A file stretched to `size` (Lanczos): float32 [1, 3, 1, H, W] in [-1, 1]."""
    pixels = Image.fromarray(read_image(path).numpy()).resize(
        (size.width, size.height), Image.Resampling.LANCZOS
    )
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
