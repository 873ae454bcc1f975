"""OpenAI's CLIP tokenizer as transformers has it, from the vocabulary file that open_clip ships: no download."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """The 49408-entry tokenizer of SD and SDXL; callers share one instance."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    text = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    # The file has a heading and more merges than CLIP takes: 256 bytes, twice, and two special tokens fill the rest.
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    # CLIP numbers the bytes it prints as themselves first, in their order, then the stand-ins, in theirs.
    alphabet = sorted(ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == 49408
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)  # type: ignore[arg-type]  # pairs, not str
