"""`python -m rcm`: the command `rcm`, also where its script is not on the path."""

from __future__ import annotations

import sys

from rcm.front.cli import main

if __name__ == "__main__":
    sys.exit(main())
