"""Our tokenizers as files and metadata of other programs."""

from __future__ import annotations

import json
from typing import Any

from forge_plugins.interchange.llama_cpp_tokenizer import UNUSED, pretrained_vocabulary
from forge_plugins.mathematics.text.byte_alphabet import byte_alphabet
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
from forge_plugins.mathematics.text.tokenizers import END, UNKNOWN, CharacterTokenizer, Tokenizer


def _specials(tokenizer: Tokenizer) -> dict[int, str]:
    result = {tokenizer.end: END}
    if isinstance(tokenizer, CharacterTokenizer):
        result[tokenizer.unknown] = UNKNOWN
    return result


def gguf_vocabulary(tokenizer: Tokenizer | None, count: int) -> dict[str, Any]:
    """The entries `tokenizer.ggml.*` of a GGUF file, each a list, a number or a text.

    A character of several bytes is reached by merging its bytes from the left; no two characters
    can be mixed up, since only the first byte of one is a leading byte.

    Args:
        tokenizer: None when the data has none; the tokens then get names that no text has.
        count: tokens of the model.

    Raises:
        ValueError: llama.cpp would read texts otherwise than the tokenizer, or the tokenizer has
            more tokens than the model.
    """
    if tokenizer is not None and tokenizer.vocabulary > count:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocabulary} tokens, and the model {count}: give the "
            "model that vocabulary"
        )
    if isinstance(tokenizer, LibraryTokenizer):
        return _filled(pretrained_vocabulary(tokenizer), count)
    if tokenizer is None:
        return {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": [f"<|{index}|>" for index in range(count)],
            "token_type": [1] * count,
            "merges": [],
        }
    letters, specials = byte_alphabet(), _specials(tokenizer)
    tokens, kinds, merges = [], [], []
    for index, piece in enumerate(tokenizer.pieces()):
        if piece is None:
            tokens.append(specials[index])
            kinds.append(3)  # control
            continue
        shown = "".join(letters[value] for value in piece)
        tokens.append(shown)
        kinds.append(1)
        merges += [f"{shown[:place]} {shown[place]}" for place in range(1, len(shown))]
    result = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": list(dict.fromkeys(merges)),
        "bos_token_id": tokenizer.end,
        "eos_token_id": tokenizer.end,
        "add_bos_token": False,
    }
    return _filled(result, count)


def _filled(vocabulary: dict[str, Any], count: int) -> dict[str, Any]:
    """A vocabulary with as many tokens as the model has; those that no text gives are unused."""
    numbers = range(len(vocabulary["tokens"]), count)
    vocabulary["tokens"] += [f"<|unused {number}|>" for number in numbers]
    vocabulary["token_type"] += [UNUSED] * len(numbers)
    return vocabulary


def transformers_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """`tokenizer.json` and `tokenizer_config.json` as data, by file name."""
    if isinstance(tokenizer, LibraryTokenizer):
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_name,
            "bos_token": tokenizer.end_name, "clean_up_tokenization_spaces": False,
            **tokenizer.settings,
        }  # fmt: skip
        content: dict[str, Any] = json.loads(tokenizer.content)
        return {"tokenizer.json": content, "tokenizer_config.json": about}
    return _own_files(tokenizer)


def _own_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    specials = _specials(tokenizer)
    added = [
        {
            "id": index, "content": text, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for index, text in sorted(specials.items())
    ]  # fmt: skip
    if isinstance(tokenizer, CharacterTokenizer):
        vocabulary = {item: index for index, item in enumerate(tokenizer.alphabet)}
        pattern = {"Regex": r"[\s\S]"}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        model = {"type": "WordLevel", "unk_token": UNKNOWN}
        decoder: dict[str, Any] = {"type": "Fuse"}
        before: dict[str, Any] = split
    else:
        vocabulary = {letter: index for index, letter in enumerate(byte_alphabet())}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        model = {"type": "BPE", "merges": []}  # type: ignore[dict-item]
        before = decoder = {**level, "use_regex": False}
    vocabulary |= {text: index for index, text in specials.items()}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": before,
            "post_processor": None,
            "decoder": decoder,
            "model": {**model, "vocab": vocabulary},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            **({"unk_token": UNKNOWN} if UNKNOWN in specials.values() else {}),
        },
    }
