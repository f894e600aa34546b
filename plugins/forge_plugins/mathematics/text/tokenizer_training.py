"""A tokenizer learned from texts: byte pairs, of which any text is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence


def train_byte_pairs(
    texts: Iterator[str], vocabulary: int, end: str, specials: Sequence[str] = ()
) -> str:
    """The content of a `tokenizer.json` (byte-level BPE, Radford et al. 2019).

    Pairs are merged in the order of how often they stand together in the texts. All bytes are
    tokens, so that there is no unknown one.

    Args:
        texts: read once.
        vocabulary: tokens, special ones included; fewer where the texts have no more pairs.
        end: the token that ends a text, number 0.
        specials: others that stand for themselves, such as the marks of a chat template.

    Raises:
        ValueError: there is no room for the bytes, a token is named twice, or there is no text.
        ImportError: the library tokenizers is not installed.
    """
    import tokenizers as library

    fixed = [end, *specials]
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(fixed)
    if len(set(fixed)) < len(fixed) or not all(fixed):
        raise ValueError("special tokens are empty or named twice: name each once")
    if vocabulary < least:
        raise ValueError(
            f"{vocabulary} tokens are too few: 256 bytes and {len(fixed)} special ones need {least}"
        )
    first = next(texts, None)
    if first is None:
        raise ValueError("there is no text to learn from")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=fixed, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer.train_from_iterator(all_texts(), trainer)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1) + "\n"
