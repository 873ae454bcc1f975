"""T5's tokenizer as transformers has it, over a small vocabulary of our own: no download."""

from __future__ import annotations

from functools import cache
from string import ascii_letters, digits

from transformers import T5Tokenizer

WORDS = ("a", "an", "the", "red", "blue", "green", "circle", "cross", "ring", "square", "two", "above", "cat", "dog")
PIECES = ("ing", "s", "er", "sand", "wich", "cap", "y", "bara", "ax", "olot", "l", "eat", "rid")


@cache
def t5_tokenizer() -> T5Tokenizer:
    """A unigram model with T5's special tokens first; unknown words fall into letters. Callers share one instance."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(f"▁{word}", -3.0) for word in WORDS] + [(piece, -3.5) for piece in PIECES if len(piece) > 1]
    vocab += [(letter, -8.0) for letter in ascii_letters + digits + ".,'-"]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5Tokenizer(vocab=vocab, model_max_length=512)
