"""``python -m maple_convert.layouts FOLDER`` writes the tables as pages, docs/layouts here."""

import sys
from pathlib import Path

from maple_convert.layouts.markdown import pages

for name, text in pages().items():
    (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")
