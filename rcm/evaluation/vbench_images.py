"""First frames of the image-to-video suite: where its list and its images are, which image a prompt
has, how it becomes a frame.

VBench publishes the list in its repository, and the images, cropped to four aspect ratios, for
download; neither comes with this package. (VBench++, Huang et al. 2024, arXiv 2411.13503.)
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
"""Before the camera's motion in a prompt; what is left of it is the prompt that the image is named
after.
"""


def placed_list(assets: Path, *, clone: Path | None, knob: str) -> Path:
    """The suite's list: in a `clone` of VBench where one is given, else among `assets`.
    `ConfigError`, naming the place, if it is not there; `knob` is the flag that names another file.
    """
    path = assets / I2V_FILE if clone is None else clone / _CLONE / I2V_FILE
    if not path.is_file():
        raise ConfigError(
            f"no list of the image-to-video suite at {path}; take {_CLONE / I2V_FILE} from"
            f" github.com/Vchitect/VBench and place it there, name one with {knob} FILE, or a clone"
            " with --vbench_repo DIR"
        )
    return path


def placed_crops(assets: Path, *, clone: Path | None, aspect_ratio: str) -> Path:
    """The folder of images of `aspect_ratio` ("16:9"): `vbench2_beta_i2v/data/crop/16-9` of a
    `clone`, else `crop/16-9` among `assets`. `ConfigError`, saying what to place where, if it is
    not there.
    """
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
    """`items`, each with an image: older lists name none for prompts of camera motion, which share
    that of the prompt they begin with. `ConfigError` for a prompt whose image is not known.
    """
    known = {item.prompt: item.image_name for item in items}
    found = [
        (
            item
            if item.image_name
            else replace(item, image_name=known.get(item.prompt.rpartition(_MOTION)[0]))
        )
        for item in items
    ]
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
    """The items whose first frame is in `folder`: all of them, or `ConfigError` naming the first
    missing one unless `skip_missing`, which still needs one.
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
    """An image file stretched to `size` (Lanczos, nothing is cut), as the image-to-video suite
    gives its crops to a model: float32 [1, 3, 1, H, W] in [-1, 1]. `VideoError` for a file that
    cannot be read.
    """
    pixels = Image.fromarray(read_image(path).numpy()).resize(
        (size.width, size.height), Image.Resampling.LANCZOS
    )
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
