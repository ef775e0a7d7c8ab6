"""Training launch point: `torchrun --nproc_per_node=N -m scripts.train [--config=REGISTRY --]
experiment=NAME key=value ...`.
"""

from __future__ import annotations

import sys

from rcm.configs.cli import main

if __name__ == "__main__":
    sys.exit(main())
