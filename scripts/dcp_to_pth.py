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
from rcm.core.errors import CheckpointError, ConfigError
from rcm.inference.outcome import command
from rcm.train.export import PREFIXES, export

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, export, report; exit status 1 with one line on stderr when the checkpoint or the
    target is unusable.
    """
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
    try:
        dtype, weights = DTYPES[options.dtype], options.weights
        target = export(options.dcp_checkpoint_dir, options.save_path, weights=weights, dtype=dtype)
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"dcp_to_pth: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.weights} weights to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
