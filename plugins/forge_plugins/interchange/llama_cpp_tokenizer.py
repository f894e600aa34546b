"""A `tokenizer.json` as llama.cpp's tokenizer `gpt2` (byte-level BPE), or why it cannot be one.

A GGUF file does not hold the rule by which a text is cut before pairs are merged: it names one of
those that llama.cpp was built with (`tokenizer.ggml.pre`, `llama-vocab.cpp`). So the rule of the
`tokenizer.json` is looked up among them, and everything else that decides the tokens (normalizers,
options of the model, added tokens) must be what llama.cpp does. A rule stands in the table when
both programs gave the same tokens for all texts of `tokenizer_texts`. Not there, for instance:
`gpt-4o` and `tekken`, which part a letter from the marks that follow it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from forge_plugins.mathematics.text.byte_alphabet import byte_alphabet
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer

Step = tuple[str, ...]
"""One cut: its kind and what it is made of."""

_CONTROL: Final = frozenset(range(32)) - frozenset(b"\t\n\r") | {0x7F}
_NEVER: Final = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that no text in UTF-8 has."""
_RARE_BYTES: Final = _CONTROL | _NEVER | {0xF1, 0xF2}  # the last: of planes 4 to 11, all unassigned
_CONTRACTIONS: Final = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SAME: Final = {"(?i:'s|'t|'re|'ve|'m|'ll|'d)": _CONTRACTIONS, "\r": r"\r", "\n": r"\n"}
"""Two ways to write one pattern."""
_END: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN: Final = "[一-龥ࠀ-一가-\ud7ff]+"
_KANA: Final = "[一-龥\u3040-ゟ゠-ヿ]+"
_PUNCTUATED: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM: Final = r" ?[^(\s|.,!?…。，、।۔،)]+"

_WORDS: Final[Step] = ("words of GPT-2",)
_DIGITS: Final[Step] = ("digits", "each")


def _split(pattern: str) -> Step:
    return ("split", pattern)


_RULES: Final[dict[tuple[Step, ...], str]] = {
    (_WORDS,): "gpt-2",
    (_split(rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_END}"),): "llama-bpe",
    (_split(rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_END}"),): "qwen2",
    (
        _split(
            rf"{_CONTRACTIONS}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}|"
            + _END.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}")
        ),
    ): "qwen35",
    (
        _split(
            rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
            rf"\p{{N}}{{1,3}}|" + _END.replace(r"[\r\n]*", r"[\r\n/]*")
        ),
    ): "granite-embed-multi-97m",  # the rule of GPT-4o with marks as parts of words
    (_DIGITS, _WORDS): "smollm",
    (_split(r"\p{N}{1,3}"), _split(_KANA), _split(_PUNCTUATED)): "deepseek-v3",
    (
        _split(r"[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(_HAN), _DIGITS,
    ): "deepseek-coder",
    (_split(_BLOOM),): "bloom",
    (_split(_BLOOM), _DIGITS): "viking",
    (
        ("punctuation", "contiguous"), _WORDS, ("digits", "runs"), _split("[0-9][0-9][0-9]"),
    ): "falcon",
}  # fmt: skip
_WITHOUT_WHOLE_WORDS: Final = {"llama-bpe": "chatglm-bpe"}
"""The same rule, but words that are tokens are not taken as they are."""

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
ELSEWHERE: Final = "the exporter transformers takes any tokenizer.json"


def pretrained_vocabulary(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    """The entries `tokenizer.ggml.*` of a GGUF file.

    Raises:
        ValueError: llama.cpp would cut some text otherwise; the message says why.
    """
    about = tokenizer.about
    model = about.get("model") or {}
    before = about.get("pre_tokenizer")
    if model.get("type") != "BPE" or "ByteLevel" not in {step["type"] for step in _flat(before)}:
        raise ValueError(
            "the tokenizer.json is no byte-level BPE, which is all that this exporter writes for "
            f"llama.cpp; {ELSEWHERE}"
        )
    _check_normalizer(about.get("normalizer"))
    _check_model(model)
    names = tokenizer.names()
    kinds = _kinds(about.get("added_tokens") or [])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    count = tokenizer.vocabulary
    return {
        "model": "gpt2",
        "pre": _whole_words(_rule(before), model, tokenizer, kinds),
        "tokens": [names.get(number, f"<|unused {number}|>") for number in range(count)],
        "token_type": [
            kinds.get(number, NORMAL if number in names else UNUSED) for number in range(count)
        ],
        "merges": merges,
        "bos_token_id": tokenizer.end,
        "eos_token_id": tokenizer.end,
        "add_bos_token": False,
    }


def _flat(part: Mapping[str, Any] | None, inner: str = "pretokenizers") -> list[Mapping[str, Any]]:
    """The steps of a part, sequences within sequences opened."""
    result: list[Mapping[str, Any]] = []
    waiting = [part] if part else []
    while waiting:
        step = waiting.pop(0)
        if step.get("type") == "Sequence":
            waiting = [*step.get(inner, []), *waiting]
        else:
            result.append(step)
    return result


def _step(step: Mapping[str, Any]) -> Step | None:
    """One pre-tokenizer in our words; None: it cuts nothing.

    Raises:
        ValueError: it adds a space.
    """
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space", True):
            raise ValueError(
                "the tokenizer.json puts a space before each text (add_prefix_space), which "
                f"llama.cpp does not: set it to false and make the tokens anew; {ELSEWHERE}"
            )
        return _WORDS if step.get("use_regex", True) else None
    if kind == "Digits":
        return ("digits", "each" if step.get("individual_digits") else "runs")
    if kind == "Punctuation":
        return ("punctuation", str(step.get("behavior", "Isolated")).lower())
    pattern = (step.get("pattern") or {}).get("Regex")
    how = (str(step.get("behavior")).lower(), bool(step.get("invert")))
    if kind != "Split" or pattern is None or how not in (("isolated", False), ("removed", True)):
        return (str(kind), str(step))
    for item, other in _SAME.items():
        pattern = pattern.replace(item, other)
    if pattern in (_GPT2, rf"{_GPT2}|\s+"):
        return _WORDS
    return _DIGITS if pattern == r"\p{N}" else ("split", pattern)


def _rule(before: Mapping[str, Any] | None) -> str:
    """llama.cpp's name of a rule.

    Raises:
        ValueError: it has none.
    """
    steps = tuple(result for step in _flat(before) if (result := _step(step)) is not None)
    name = _RULES.get(steps)
    if name is None:
        message = "; ".join(" ".join(step) for step in steps) or "nothing"
        raise ValueError(
            f"the tokenizer.json cuts texts by a rule that llama.cpp is not known to have "
            f"({message}), so that it would give other tokens; {ELSEWHERE}"
        )
    return name


def _check_normalizer(part: Mapping[str, Any] | None) -> None:
    steps = _flat(part, "normalizers")
    if steps:
        message = ", ".join(str(step.get("type")) for step in steps)
        raise ValueError(
            f"the tokenizer.json changes texts first (normalizer {message}), which llama.cpp does "
            "not for such a vocabulary: normalize the data and remove the normalizer from a copy "
            f"of the file; {ELSEWHERE}"
        )


def _check_model(model: Mapping[str, Any]) -> None:
    set_otherwise = [
        name
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(name)
    ]
    if set_otherwise:
        raise ValueError(
            f"the BPE of the tokenizer.json sets {', '.join(set_otherwise)}, which llama.cpp does "
            f"not know; {ELSEWHERE}"
        )
    lacking = [byte for byte in _lacking_bytes(model) if byte not in _RARE_BYTES]
    if lacking:
        raise ValueError(
            f"the vocabulary of the tokenizer.json lacks {len(lacking)} bytes of ordinary text "
            f"({_shown(lacking)}), which llama.cpp leaves out of texts in its own way: train it "
            f"with the whole initial_alphabet; {ELSEWHERE}"
        )


def _lacking_bytes(model: Mapping[str, Any]) -> list[int]:
    vocabulary = model.get("vocab", {})
    return [byte for byte, letter in enumerate(byte_alphabet()) if letter not in vocabulary]


def _shown(values: list[int]) -> str:
    shown = ", ".join(f"0x{byte:02X}" for byte in values[:8])
    return f"{shown} and others" if len(values) > 8 else shown


def rare_bytes(tokenizer: LibraryTokenizer) -> frozenset[int]:
    """The bytes that a vocabulary has no token for, all of them of control characters or of planes
    of Unicode without letters: texts with them may have other tokens in llama.cpp.

    Both programs leave such a byte out, the training before pairs are merged and llama.cpp after.
    """
    return frozenset(_lacking_bytes(json.loads(tokenizer.content)["model"]))


def rare_bytes_note(values: frozenset[int]) -> str:
    """What to say of a vocabulary that has no token for some bytes."""
    return (
        f"the tokenizer has no token for the bytes {_shown(sorted(values))}, which llama.cpp "
        "leaves out after it has merged the others and the training before: texts with such bytes "
        "are not compared"
    )


def _kinds(added: list[Mapping[str, Any]]) -> dict[int, int]:
    """The kinds of added tokens by number.

    Raises:
        ValueError: one takes spaces with it, or stands for itself between spaces only.
    """
    for token in added:
        odd = [name for name in ("single_word", "lstrip", "rstrip") if token.get(name)]
        if odd:
            raise ValueError(
                f"the added token {token['content']!r} has {', '.join(odd)} set, which llama.cpp "
                f"does not know; {ELSEWHERE}"
            )
    return {int(token["id"]): CONTROL if token.get("special") else USER for token in added}


def _whole_words(
    rule: str, model: Mapping[str, Any], tokenizer: LibraryTokenizer, kinds: Mapping[int, int]
) -> str:
    """The rule that agrees on words which are tokens but are not reached by merges.

    Raises:
        ValueError: there are such words, and llama.cpp has the rule without taking them.
    """
    whole = bool(model.get("ignore_merges"))
    if whole == (rule in _WITHOUT_WHOLE_WORDS) or tokenizer.reaches_all(kinds):
        return rule
    if not whole:
        return _WITHOUT_WHOLE_WORDS[rule]
    raise ValueError(
        "the tokenizer.json takes words that are tokens as they are (ignore_merges), also those "
        f"that no merges give, which llama.cpp does not with the rule {rule}; {ELSEWHERE}"
    )
