"""An old name, see `rcm.front.old_names`."""

import sys

from rcm.front.old_names import main

if __name__ == "__main__":
    sys.exit(main(__file__))
