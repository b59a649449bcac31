"""Write golden_tokens.json: what transformers' CLIPTokenizer makes of the curated prompts.

    python tests/text/make_golden.py bpe_simple_vocab_16e6.txt.gz

Needs the parity extra and OpenAI's published list of merges, so that nothing of ours is in it.
"""

import gzip
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import tokenizers
import transformers
from curated import VARIED, write_small_vocabulary
from tokenizers import Regex, normalizers

TARGET = Path(__file__).with_name("golden_tokens.json")


def main(source: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = write_small_vocabulary(Path(folder))
        small = transformers.CLIPTokenizer(vocab=str(vocab_file), merges=str(merges_file))
    full = official_tokenizer(source)
    golden = {
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "characters_sha256": characters_digest(),
        "prompts": [
            {"text": text, "full": ids(full, text), "small": ids(small, text)} for text in VARIED
        ],
    }
    TARGET.write_text(dump(golden))


def official_tokenizer(source: str) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer, built by transformers from the published list."""
    lines = gzip.decompress(Path(source).read_bytes()).decode().split("\n")[1:48895]
    merges = [tuple(line.split(" ")) for line in lines]
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printing), *(chr(0x100 + i) for i in range(256 - len(printing)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


def ids(tokenizer: transformers.CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def characters_digest() -> str:
    """One number for the class and the normal form of every code point."""
    normal = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]).normalize_str
    classes = {
        name: normalizers.Replace(Regex(pattern), "<match>").normalize_str
        for name, pattern in (("S", r"\s"), ("L", r"\p{L}"), ("N", r"\p{N}"))
    }
    digest = hashlib.sha256()
    for code in range(0x110000):
        if 0xD800 <= code <= 0xDFFF:
            continue
        char = chr(code)
        name = next((n for n, match in classes.items() if match(char) == "<match>"), "O")
        digest.update(f"{name} {normal(char)}\n".encode())
    return digest.hexdigest()


def dump(golden: dict) -> str:
    """JSON with one prompt a line."""
    rows = ",\n".join(json.dumps(prompt) for prompt in golden.pop("prompts"))
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    return f'{{\n{head},\n"prompts": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    main(sys.argv[1])
