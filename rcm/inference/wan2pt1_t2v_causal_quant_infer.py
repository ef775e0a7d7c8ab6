"""The causal command with defaults for a quantised cache: say how keys and values are stored.

    python -m rcm.inference.wan2pt1_t2v_causal_quant_infer --dit_path FILE \\
        --distilled --num_steps 4 --kv_dtype_k int2 --kv_dtype_v int2 \\
        --kv_smoothing_k qvg --kv_smoothing_v qvg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rcm.inference.causal_command import causal_main
from rcm.inference.causal_flags import QUANT


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return causal_main("wan2pt1_t2v_causal_quant_infer", argv, about=__doc__, defaults=QUANT)


if __name__ == "__main__":
    sys.exit(main())
