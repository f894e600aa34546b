"""How many bytes of text each token stands for, so that models with other tokenizers compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from forge_plugins.mathematics.text.byte_alphabet import byte_alphabet
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
from forge_plugins.mathematics.text.tokenizers import Tokenizer

_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""


def token_bytes(tokenizer: Tokenizer) -> Tensor | None:
    """Bytes of UTF-8 of each token.

    Returns:
        int64, shape (vocabulary,); 0 for special tokens. None: the tokenizer does not keep the
        text (it changes letters or drops spaces), so that its tokens have no bytes of their own.
    """
    if not isinstance(tokenizer, LibraryTokenizer):
        return torch.tensor([len(piece or b"") for piece in tokenizer.pieces()])
    about = tokenizer.about
    kinds = {str(part.get("type")) for part in _flat(about.get("decoder"), "decoders")}
    by_bytes = "ByteLevel" in kinds
    if not by_bytes and not kinds & {"Metaspace", "ByteFallback"}:
        return None
    letters = set(byte_alphabet())
    added = {int(token["id"]): token for token in about.get("added_tokens") or []}
    result = torch.zeros(tokenizer.vocabulary, dtype=torch.int64)
    for number, name in tokenizer.names().items():
        token = added.get(number)
        if token is not None:
            size = 0 if token.get("special") else len(name.encode())
        elif by_bytes:
            size = len(name) if letters.issuperset(name) else len(name.encode())
        else:
            size = 1 if _BYTE.fullmatch(name) else len(name.replace(_SPACE, " ").encode())
        result[number] = size
    return result


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A part of a tokenizer.json as a list of its steps."""
    if part is None:
        return []
    steps = part.get(inner)
    return list(steps) if isinstance(steps, list) else [part]
