"""One dimension, or a look at it, inside VBench's own environment, which has no rcm.

Started as a file by `rcm.evaluation.vbench_launch`. With RANK (torchrun) VBench's process group is
used, which needs CUDA; alone it runs on any device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--suite", choices=("t2v", "i2v"), default="t2v")
    parser.add_argument("--dimension", required=True)
    parser.add_argument("--videos", default="")
    parser.add_argument("--full_json", default="")
    parser.add_argument("--output", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--local", type=int, default=0)
    parser.add_argument("--options", default="{}")
    parser.add_argument("--check", action="store_true")
    flags = parser.parse_args()
    # VBench's checkpoints are pickles from before torch 2.6
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _torchvision()
    if flags.check:
        importlib.import_module(f"vbench.{flags.dimension}")
        return 0
    import torch

    if "RANK" in os.environ:
        importlib.import_module("vbench.distributed").dist_init()
    package, kind = (
        ("vbench", "VBench") if flags.suite == "t2v" else ("vbench2_beta_i2v", "VBenchI2V")
    )
    scorer = getattr(importlib.import_module(package), kind)(
        torch.device(flags.device), flags.full_json, flags.output
    )
    options = json.loads(flags.options)
    scorer.evaluate(
        videos_path=flags.videos,
        name=flags.dimension,
        dimension_list=[flags.dimension],
        local=bool(flags.local),
        read_frame=False,
        **options,
    )
    return 0


def _torchvision() -> None:
    """Import torchvision. Its CUDA build beside a CPU build of torch fails to describe `nms` and
    `qnms`; with a declaration of these two, which only detectron2 calls, the rest of it works.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or torch.cuda.is_available():
            raise
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # an operator lives as long as its library
        importlib.import_module("torchvision")


_KEPT: list[object] = []


if __name__ == "__main__":
    sys.exit(main())
