"""Prompts to token ids: CLIP's tokenizer and the chunks a text encoder reads."""

from mlx_maple.text.prompt import EncodedPrompt, encode_prompt
from mlx_maple.text.tokenizer import Tokenizer, VocabularyError

__all__ = ["EncodedPrompt", "Tokenizer", "VocabularyError", "encode_prompt"]
