"""`python -m mlx_maple` is the command `maple`."""

import sys

from mlx_maple.cli import main

if __name__ == "__main__":
    sys.exit(main())
