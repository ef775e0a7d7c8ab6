"""Model files of VBench's dimensions: sizes, check sums, places. Nothing here downloads.

As published for VBench 0.1.5; those on GRiT also need a compiled detectron2, in no registry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRIT = ("object_class", "multiple_objects", "color", "spatial_relationship")


@dataclass(frozen=True)
class ModelFile:
    """A file in VBench's cache; `sha256` begins so, `published` says where to find it."""

    path: str
    bytes: int
    sha256: str
    dimensions: tuple[str, ...]
    published: str


_TABLE = """
caption_model/tag2text_swin_14m.pth 4478705095 4ce96f0ce98f
    scene
    huggingface.co/spaces/xinyu1205/recognize-anything
ViCLIP/ViClip-InternVid-10M-FLT.pth 1710545812 7a4d6ad6eac6
    temporal_style,overall_consistency
    huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main
ViCLIP/bpe_simple_vocab_16e6.txt.gz 1356917 924691ac288e
    temporal_style,overall_consistency
    raw.githubusercontent.com/openai/CLIP
clip_model/ViT-L-14.pt 932768134 b8cca3fd41ae
    aesthetic_quality
    openaipublic.azureedge.net/clip
clip_model/ViT-B-32.pt 353976522 40d365715913
    background_consistency,appearance_style,i2v_background
    openaipublic.azureedge.net/clip
umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth 607024201 bfee78a03bf8
    human_action
    huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main
grit_model/grit_b_densecap_objectdet.pth 417381733 53b6e9b3fd94
    object_class,multiple_objects,color,spatial_relationship
    datarelease.blob.core.windows.net/grit/models
dino_model/dino_vitbase16_pretrain.pth 343242485 bf34ad0f424b
    subject_consistency,i2v_subject
    dl.fbaipublicfiles.com/dino
pyiqa_model/musiq_spaq_ckpt-358bb6af.pth 108610983 358bb6af275e
    imaging_quality
    github.com/chaofengc/IQA-PyTorch
raft_model/models/raft-things.pth 21108000 fcfa4125d641
    dynamic_degree
    dl.dropboxusercontent.com (models.zip)
amt_model/amt-s.pth 12038359 07e7e03405c2
    motion_smoothness
    huggingface.co/lalala125/AMT
aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth 4071 2cd4e60f4f24
    aesthetic_quality
    github.com/LAION-AI/aesthetic-predictor
"""
FILES = tuple(
    ModelFile(path, int(size), sha256, tuple(dimensions.split(",")), published)
    for path, size, sha256, dimensions, published in re.findall(
        r"^(\S+) (\d+) (\w+)\n +(\S+)\n +(.+)$", _TABLE, re.M
    )
)

_DINO = (
    "github.com/facebookresearch/dino as a clone, and the file of DINO also as"
    " $TORCH_HOME/hub/checkpoints/dino_vitbase16_pretrain.pth"
)
OTHER_NEEDS = {
    **dict.fromkeys(
        GRIT,
        "detectron2, compiled in the environment, and bert-base-uncased in the Hugging Face cache",
    ),
    "scene": "bert-base-uncased in the Hugging Face cache (the whole model)",
    "subject_consistency": _DINO,
    "i2v_subject": (
        "the images of the suite under vbench2_beta_i2v/data/crop, dreamsim for VBench-I2V's older"
        f" form, {_DINO}"
    ),
    "i2v_background": "the images of the suite under vbench2_beta_i2v/data/crop, dreamsim",
    "camera_motion": "CoTracker (torch.hub), the images of the suite",
}
"""Dimension -> what it needs that is no file of the cache."""


def cache_folder(given: str | Path | None = None) -> Path:
    """VBench's cache: `given`, else $VBENCH_CACHE_DIR, else ~/.cache/vbench. Absolute, for VBench
    runs in another folder.
    """
    home = Path.home() / ".cache" / "vbench"
    return Path(given or os.environ.get("VBENCH_CACHE_DIR") or home).absolute()


def files_for(dimensions: Sequence[str]) -> list[ModelFile]:
    """Files that any of `dimensions` reads."""
    return [file for file in FILES if set(file.dimensions) & set(dimensions)]


def problems(cache: Path, dimensions: Sequence[str]) -> dict[str, str]:
    """Path -> what is wrong, for files of `dimensions` that are missing or of another size."""
    found = {}
    for file in files_for(dimensions):
        path = cache / file.path
        if not path.is_file():
            found[file.path] = "missing"
        elif path.stat().st_size != file.bytes:
            found[file.path] = f"{path.stat().st_size:,} bytes, {file.bytes:,} expected"
    return found


def told(cache: Path, dimensions: Sequence[str]) -> str:
    """The files of `dimensions` as lines, what is wrong with them, and other needs."""
    wrong, lines = problems(cache, dimensions), []
    for file in files_for(dimensions):
        state = wrong.get(file.path, "there")
        lines.append(
            f"{cache / file.path}: {state}; {file.bytes:,} bytes, sha256 {file.sha256}...;"
            f" {', '.join(file.dimensions)}; {file.published}"
        )
    lines += [
        f"{name} also needs {OTHER_NEEDS[name]}" for name in dimensions if name in OTHER_NEEDS
    ]
    total = sum(file.bytes for file in files_for(dimensions))
    return "\n".join([*lines, f"in all {total:,} bytes"]) if lines else "no file is needed"
