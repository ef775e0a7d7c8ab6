"""Text (or a first image) to video, chunk by chunk, with a causal Wan2.1 network: many steps with
guidance, or few with --distilled.

    python -m rcm.inference.wan2pt1_t2v_causal_infer --dit_path FILE --prompt "..." \\
        --distilled --num_steps 4 --first_chunk_t 3 --chunk_t 3
    python -m rcm.inference.wan2pt1_t2v_causal_infer --dit_path FILE \\
        --distilled --steps_per_chunk 4 2 --mid_t_schedules "15/16,5/6,5/8;5/6"
    python -m rcm.inference.wan2pt1_t2v_causal_infer --dit_path FILE --prompt "..." \\
        --image_path first.png --num_steps 50 --chunk_t 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rcm.inference.causal_command import causal_main
from rcm.inference.causal_flags import CAUSAL


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return causal_main("wan2pt1_t2v_causal_infer", argv, about=__doc__, defaults=CAUSAL)


if __name__ == "__main__":
    sys.exit(main())
