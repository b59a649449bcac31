"""Write mlx_maple/text/vocabulary/merges.txt.gz from OpenAI's published list.

    python tests/text/make_vocabulary.py bpe_simple_vocab_16e6.txt.gz

The list holds 262,144 lines; CLIP uses lines 1 to 48,894 after the header (clip/simple_tokenizer.py
of openai/CLIP @d05afc4). Everything else of the vocabulary follows from these merges.
"""

import gzip
import sys
from pathlib import Path

TARGET = Path(__file__).parents[2] / "mlx_maple" / "text" / "vocabulary" / "merges.txt.gz"


def main(source: str) -> None:
    lines = gzip.decompress(Path(source).read_bytes()).decode().split("\n")
    merges = "\n".join(lines[1:48895])
    TARGET.write_bytes(gzip.compress(merges.encode(), 9, mtime=0))  # the same bytes every time


if __name__ == "__main__":
    main(sys.argv[1])
