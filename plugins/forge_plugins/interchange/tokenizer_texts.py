"""Texts that show whether two programs cut a text into the same tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

_WORDS: Final = (
    "the", "Hello", "WORLD", "iPhone", "naïve", "Straße", "café", "Ångström", "ſmall", "don't",
    "DON'T", "it's", "IT'S", "we'll", "I'VE", "they're", "o'clock", "'quoted'", "’tis",
    "rock'n'roll", "snake_case", "kebab-case", "CamelCase", "a.b.c", "x=1", "e-mail@host.org",
    "#tag", "C++", "...",
)  # fmt: skip
_NUMBERS: Final = (
    "0", "7", "42", "123", "1234", "12345", "1234567890", "3.14", "1,000,000", "2024-01-31",
    "v1.2.3", "0x1F", "1e-5", "50%", "$19.99", "x2y3", "٣٤٥", "१२३", "½", "²³", "Ⅻ", "①②",
)  # fmt: skip
_SCRIPTS: Final = (
    "你好世界", "汉字123混合", "こんにちは", "カタカナ", "日本語とEnglish",
    "안녕하세요", "한국어 문장", "Привет, мир!",
    "ёлка", "Ελληνικά", "שלום", "مرحبا بالعالم", "हिन्दी में", "ภาษาไทย",
    "Tiếng Việt", "ქართული", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "ǅungla", "İstanbul", "。、！？", "「引用」", "…—–", "¿Qué?", "€£¥", "±×÷", "→⇒∀∃", "©®™",
)  # fmt: skip
_EMOJI: Final = ("😀", "👍🏽", "👩‍👩‍👧‍👦", "🇩🇪", "❤️", "a😀b", "😀😀😀", "1️⃣")
_SPACE: Final = (
    " ", "  ", "   ", "     ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t", "\t\t", " \n",
    "\n ", " \n \n ", "\xa0", "\u3000", "\u2028", "\u200b", "\u200d", "\ufeff", "\x0b", "\x0c",
    "\x85",
)  # fmt: skip
_LINES: Final = (
    "def f(x):\n    return x + 1\n", "if (a && b) { c[0]++; }", "<p class=\"x\">text</p>",
    "| a | b |\n|---|---|\n", "https://example.org/a?b=c&d=1#e", "{\"key\": [1, 2, 3]}",
    "  leading", "trailing  ", " both ", "tab\tseparated\tvalues", "end of line \nnext", "a\n\nb",
    "word  two  spaces", "well...  \n\n  then", "100 % of 3 km/h", "A/B \\ C", "~!@#$%^&*()_+`-=",
    "[]{}|;':\",./<>?", "!!!", "?!?!", "--- --- ---", "a-b--c---d", "''''", "\"\"", "``code``",
    "Mr. Smith's 3rd 'test' isn't 99.9% done; he'd re-do it, we've 12 left.",
    "It's 98765 o'clock, DON'T say 1234!!\n\n  well...",
    "'S 'T 'RE 'VE 'M 'LL 'D 's't're've'm'll'd",
    "x'sy x'S x's. 's 'S", "1's 22's", "a\u0301e\u0301o\u0301", "\u1100\u1161\u11a8", "Å Å Å",
    "ﬁ ﬂ ﬃ",
)  # fmt: skip


def probe_texts(specials: Iterable[str] = ()) -> list[str]:
    """More than 200 texts, always the same ones, each once.

    Words, contractions, digits, scripts, emoji, spaces, lines, punctuation; in the composed and the
    decomposed form of Unicode; at the beginning, behind a space, and between others.

    Args:
        specials: tokens that stand for themselves in a text (an end of document, a tag).
    """
    pieces = (*_WORDS, *_NUMBERS, *_SCRIPTS, *_EMOJI)
    texts = [*pieces, *_SPACE, *_LINES]
    texts += [f" {piece}" for piece in pieces]
    texts += [f"a{space}b" for space in _SPACE] + [f"1{space}2{space}" for space in _SPACE]
    texts += [
        f"{item} {two}, {three}\n{four}"
        for item, two, three, four in zip(
            _WORDS, (*_NUMBERS, *_EMOJI), (*_SCRIPTS, "end", "end"), reversed(_WORDS), strict=False
        )
    ]
    texts += [unicodedata.normalize("NFD", text) for text in (*_WORDS, *_SCRIPTS)]
    texts += [unicodedata.normalize("NFC", text) for text in _LINES]
    for special in specials:
        texts += [
            special,
            f"a{special}b",
            f" {special} ",
            f"{special}{special}",
            f"x\n{special}\ny",
        ]
    return list(dict.fromkeys(texts))
