"""Text as numbers: bytes or characters, exact in both directions, and known to other programs.

Data that was made by a tokenizer offers it as its attribute `tokenizer`, so that an exporter can
write it beside the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

TokenizerName = Literal["bytes", "characters", "library"]
END: Final = "<|end|>"
"""Stands after each document."""
UNKNOWN: Final = "<|unknown|>"
"""Stands for a character that the vocabulary lacks."""


class Tokenizer(Protocol):
    """What turns text into tokens 0 .. vocabulary - 1 and back."""

    kind: TokenizerName
    vocabulary: int
    end: int

    def encode(self, text: str) -> Tensor:
        """Tokens of a text, int64, shape (n,), without the end token."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; end tokens give nothing."""
        ...

    def pieces(self) -> list[bytes | None]:
        """The bytes of each token; None for those that stand for no text."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and the end token: any text, nothing to learn or to lose."""

    kind: TokenizerName = "bytes"
    vocabulary = 257
    end = 256

    def encode(self, text: str) -> Tensor:
        """One token for each byte."""
        raw = bytearray(text.encode("utf-8"))
        return torch.frombuffer(raw, dtype=torch.uint8).long() if raw else torch.empty(0).long()

    def decode(self, tokens: Iterable[int]) -> str:
        """Bytes that are no UTF-8 are shown as U+FFFD."""
        return bytes(token for token in tokens if token != self.end).decode("utf-8", "replace")

    def pieces(self) -> list[bytes | None]:
        """One byte each."""
        return [*(bytes([value]) for value in range(256)), None]


class CharacterTokenizer:
    """The characters of a text in their order in Unicode, an unknown and an end token.

    Args:
        alphabet: the characters, each once.

    Raises:
        ValueError: a character stands in the alphabet twice.
    """

    kind: TokenizerName = "characters"

    def __init__(self, alphabet: Sequence[str]) -> None:
        if len(set(alphabet)) != len(alphabet):
            raise ValueError("a character stands in the alphabet twice")
        self.alphabet = tuple(alphabet)
        self.unknown = len(self.alphabet)
        self.end = self.unknown + 1
        self.vocabulary = self.unknown + 2
        codes = torch.tensor([ord(character) for character in self.alphabet], dtype=torch.int32)
        self._codes, self._numbers = codes.sort()

    @classmethod
    def of(cls, text: str) -> CharacterTokenizer:
        """The tokenizer of all characters of a text."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> Tensor:
        """One token for each character."""
        raw = bytearray(text.encode("utf-32-le", "surrogatepass"))
        if not raw or not len(self._codes):
            return torch.full((len(text),), self.unknown, dtype=torch.int64)
        codes = torch.frombuffer(raw, dtype=torch.int32)
        places = torch.searchsorted(self._codes, codes).clamp_(max=len(self._codes) - 1)
        known = self._codes[places] == codes
        return torch.where(known, self._numbers[places], self.unknown)

    def decode(self, tokens: Iterable[int]) -> str:
        """The unknown token is shown as U+FFFD."""
        shown = (*self.alphabet, "\N{REPLACEMENT CHARACTER}", "")
        return "".join(shown[token] for token in tokens)

    def pieces(self) -> list[bytes | None]:
        """The UTF-8 of each character."""
        return [*(character.encode("utf-8") for character in self.alphabet), None, None]
