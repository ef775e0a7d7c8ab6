"""Turn a DCP checkpoint into one file: `python -m scripts.dcp_to_pth --dcp_checkpoint_dir
JOB/checkpoints/iter_000001000/model --save_path student.pth`.

By default the averaged weights (`net_ema.*`, renamed to `net.*`) in bfloat16, as the released
checkpoints are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rcm.core.arguments import Arguments
from rcm.inference.outcome import command
from rcm.train.export import PREFIXES, export

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@command(failure=1)
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, export, report."""
    parser = Arguments(description=__doc__)
    add, here = parser.add_argument, "checkpoints/iter_000010000/model"
    told = "DCP directory (iter_*/model), its parent iter_*, or a job directory"
    add("--dcp_checkpoint_dir", type=Path, default=here, help=f"{told} (default: %(default)s)")
    told = "target file: .pth, .pt or .safetensors (default: %(default)s)"
    add("--save_path", type=Path, default="saved_model.pt", help=told)
    told = "which weights (default: ema)"
    add("--weights", choices=sorted(PREFIXES), default="ema", help=told)
    told = "stored dtype (default: bf16)"
    add("--dtype", choices=sorted(DTYPES), default="bf16", help=told)
    options = parser.parse_args(arguments)
    dtype, weights = DTYPES[options.dtype], options.weights
    target = export(options.dcp_checkpoint_dir, options.save_path, weights=weights, dtype=dtype)
    print(f"wrote {weights} weights to {target}")


if __name__ == "__main__":
    sys.exit(main())
