"""Training launch point: `torchrun --nproc_per_node=N -m scripts.train [--config=REGISTRY --]
experiment=NAME key=value ...`.
"""

from __future__ import annotations

import os
import sys

from rcm.configs.cli import main

if __name__ == "__main__":
    status = main()
    if status and os.environ.get("WORLD_SIZE", "1") != "1":
        # all is closed and told; threads of a group whose peer has gone may abort what follows
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
