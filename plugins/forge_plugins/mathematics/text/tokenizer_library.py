"""Tokenizers from `tokenizer.json`, the file of the library `tokenizers` and of transformers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any, Final

import torch
from torch import Tensor

from forge_plugins.mathematics.text.tokenizers import TokenizerName

ENDS: Final = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "<|end|>",
    "[SEP]", "[EOS]",
)  # fmt: skip
"""What the usual families call the token that ends a document; the first that is there is taken."""


class LibraryTokenizer:
    """A tokenizer as its file says; no special tokens are added but the end of documents.

    Args:
        content: of the file.
        end: the token that ends a document; None: the first of `ENDS` that it has.

    Raises:
        ValueError: it is no tokenizer, or has no such token.
        ImportError: the library is not installed.
    """

    kind: TokenizerName = "library"

    def __init__(self, content: str, end: str | None = None) -> None:
        import tokenizers

        self.content = content
        self.settings: dict[str, Any] = {}
        """What other programs are told of it beside its file: a chat template, say."""
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content)
        except Exception as error:
            raise ValueError(f"it is no tokenizer.json: {str(error)[:200]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(names.values(), default=-1) + 1
        known = [name for name in (ENDS if end is None else (end,)) if name in names]
        if not known:
            usual = ", ".join(ENDS)
            message = f"it has no token {end}" if end else f"it has none of {usual}"
            raise ValueError(f"{message}: name the one that ends a document")
        self.end_name = known[0]
        self.end = int(names[self.end_name])

    def encode(self, text: str) -> Tensor:
        """Tokens of a text, int64, shape (n,)."""
        return torch.tensor(self.encode_all([text])[0], dtype=torch.int64)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Tokens of several texts, by all cores."""
        result = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [item.ids for item in result]

    def encode_placed(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Tokens of several texts, and the characters that each is of: begin and end."""
        result = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(item.ids, item.offsets) for item in result]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special ones give nothing."""
        text: str = self._tokenizer.decode([int(token) for token in tokens])
        return text

    def pieces(self) -> list[bytes | None]:
        """The bytes of each token; None for all: what a token is depends on its neighbours."""
        return [None] * self.vocabulary

    @property
    def about(self) -> dict[str, Any]:
        """What the file says, as data."""
        result: dict[str, Any] = json.loads(self.content)
        return result

    def names(self) -> dict[int, str]:
        """What the tokens are called, by number; there may be holes."""
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        return {number: name for name, number in known.items()}

    def specials(self) -> list[str]:
        """Added tokens: they stand for themselves wherever a text holds them."""
        return [token["content"] for token in self.about.get("added_tokens") or []]

    def reaches_all(self, but: Collection[int] = ()) -> bool:
        """Whether merges give each token from its own letters.

        Args:
            but: numbers of tokens that need not be reached.
        """
        model = self._tokenizer.model
        held = model.ignore_merges
        model.ignore_merges = False
        try:
            return all(
                [item.id for item in model.tokenize(name)] == [number]
                for number, name in self.names().items()
                if number not in but
            )
        finally:
            model.ignore_merges = held
