"""The causal command with defaults for videos longer than those trained on, at bounded memory:
choose what of the past is kept.

    python -m rcm.inference.wan2pt1_t2v_causal_extrapolation_infer --dit_path FILE \\
        --distilled --num_steps 4 --num_frames 957 --extrapolation_method rolling_sink
    python -m rcm.inference.wan2pt1_t2v_causal_extrapolation_infer --dit_path FILE \\
        --distilled --num_steps 4 --extrapolation_method infinity_rope \\
        --prompt "a harbour at dawn[10s] | the harbour in a storm[10s#]"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rcm.inference.causal_command import causal_main
from rcm.inference.causal_flags import EXTRAPOLATION


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return causal_main(
        "wan2pt1_t2v_causal_extrapolation_infer", argv, about=__doc__, defaults=EXTRAPOLATION
    )


if __name__ == "__main__":
    sys.exit(main())
