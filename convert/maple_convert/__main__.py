"""``python -m maple_convert``."""

import sys

from maple_convert.cli import main

sys.exit(main())
