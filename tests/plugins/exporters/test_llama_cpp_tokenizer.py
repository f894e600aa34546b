"""The rule by which llama.cpp cuts texts is that of the tokenizer.json, or there is no file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need

from forge_kernel import load_pipeline, run
from forge_kernel.errors import PluginError
from forge_plugins.clients.reading import LLAMA_CPP_TOKENS, Texts, compared_texts
from forge_plugins.exporters.gguf import _texts
from forge_plugins.interchange.gguf import write_gguf
from forge_plugins.interchange.gguf_model import gguf_entries, gguf_tensors
from forge_plugins.interchange.tokenizer_files import gguf_vocabulary
from forge_plugins.interchange.tokenizer_texts import probe_texts
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.text.byte_alphabet import byte_alphabet
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer

END = "<|endoftext|>"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    + "\r\n"
    + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    + "\r\n"
    + r"""]*|\s*["""
    + "\r\n"
    + r"""]+|\s+(?!\S)|\s+""",
)  # fmt: skip
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def level(*, words: bool = False, space: bool = False) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=space, use_regex=words)


def split(pattern: str, how: str = "isolated") -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    return Split(Regex(pattern), how, invert=how == "removed")


def digits(*, each: bool = True) -> Any:
    from tokenizers.pre_tokenizers import Digits

    return Digits(each)


def contiguous() -> Any:
    from tokenizers.pre_tokenizers import Punctuation

    return Punctuation("contiguous")


RULES: dict[str, tuple[str, Callable[[], list[Any]]]] = {
    "GPT-2": ("gpt-2", lambda: [level(words=True)]),
    "GPT-2 as a pattern": ("gpt-2", lambda: [split(GPT2), level()]),
    "Llama 3": ("llama-bpe", lambda: [split(LLAMA3), level()]),
    "Llama 3, removed": ("llama-bpe", lambda: [split(LLAMA3, "removed"), level()]),
    "Qwen2": ("qwen2", lambda: [split(QWEN2), level()]),
    "Qwen3.5": ("qwen35", lambda: [split(QWEN35), level()]),
    "GPT-4o": ("granite-embed-multi-97m", lambda: [split(GPT4O), level()]),
    "SmolLM": ("smollm", lambda: [digits(), level(words=True)]),
    "SmolLM as a pattern": ("smollm", lambda: [split(r"\p{N}"), level(words=True)]),
    "DeepSeek-V3": ("deepseek-v3", lambda: [*map(split, DEEPSEEK), level()]),
    "DeepSeek-Coder": (
        "deepseek-coder",
        lambda: [
            split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-\ud7ff]+"), digits(), level(),
        ],
    ),
    "Bloom": ("bloom", lambda: [split(BLOOM), level()]),
    "Viking": ("viking", lambda: [split(BLOOM), digits(), level()]),
    "Falcon": (
        "falcon",
        lambda: [contiguous(), level(words=True), digits(each=False), split("[0-9][0-9][0-9]")],
    ),
}  # fmt: skip
UNKNOWN: dict[str, Callable[[], list[Any]]] = {
    "another count of digits": lambda: [split(LLAMA3.replace("{1,3}", "{1,2}")), level()],
    "runs of digits": lambda: [split(LLAMA3.replace("{1,3}", "+")), level()],
    "no rule": lambda: [level()],
    "digits after words": lambda: [level(words=True), digits()],
    "a space before each text": lambda: [level(words=True, space=True)],
    "whole lines": lambda: [split("\n"), level()],
    "merged with the piece before": lambda: [split(LLAMA3, "merged_with_previous"), level()],
    "two rules": lambda: [split(LLAMA3), level(words=True)],
}


def about(steps: list[Any]) -> dict[str, Any]:
    """A tokenizer.json that was trained on the texts of the comparison."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    made.train_from_iterator(probe_texts() * 2, trainer)
    found: dict[str, Any] = json.loads(made.to_str())
    return found


def tokenizer(content: dict[str, Any]) -> LibraryTokenizer:
    return LibraryTokenizer(json.dumps(content))


def written(which: Tokenizer, file: Path) -> Path:
    torch.manual_seed(0)
    shape = LlamaShape(
        vocabulary=which.vocabulary, context=16, width=256, layers=1, heads=4, groups=2, hidden=256
    )
    model = Llama(shape).eval()
    convert_linears(model, lambda name: name != "head")
    entries = gguf_entries(model, "tq2_0", which, "test")
    write_gguf(file, entries, gguf_tensors(model, "tq2_0"))
    return file


def texts(which: LibraryTokenizer) -> Texts:
    all_of_them = probe_texts(which.specials())
    return Texts(all_of_them, which.encode_all(all_of_them), specials=True)


def test_there_are_enough_texts_of_every_sort() -> None:
    found = probe_texts([END])
    assert len(found) >= 200
    assert len(set(found)) == len(found)
    whole = "".join(found)
    for piece in ("'ll", "\r\n", "1234567890", "\u0301", "é", "你", "👩‍👩‍👧‍👦", END):
        assert piece in whole
    assert any(text.startswith(" ") and text.strip() for text in found)


@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_cuts_every_text_as_the_tokenizer_of_the_training(
    name: str, tmp_path: Path
) -> None:
    need("tokenizers", "xllamacpp")
    rule, steps = RULES[name]
    which = tokenizer(about(steps()))
    assert gguf_vocabulary(which, which.vocabulary)["pre"] == rule
    found = compared_texts(LLAMA_CPP_TOKENS, written(which, tmp_path / "m.gguf"), texts(which))
    assert found["texts_compared"] >= 200


def without(content: dict[str, Any], *values: int) -> dict[str, Any]:
    """The same tokenizer without the tokens of some bytes, and without merges of them."""
    letters = {byte_alphabet()[value] for value in values}
    vocabulary = [token for token in content["model"]["vocab"] if letters.isdisjoint(token)]
    merges = [pair for pair in content["model"]["merges"] if letters.isdisjoint("".join(pair))]
    model = {**content["model"], "vocab": dict(zip(vocabulary, count())), "merges": merges}
    added = [
        {**token, "id": vocabulary.index(token["content"])} for token in content["added_tokens"]
    ]
    return {**content, "model": model, "added_tokens": added}


def test_a_vocabulary_without_bytes_that_texts_hardly_have_is_written_and_said(
    tmp_path: Path,
) -> None:
    """As those of SmolLM2: no token for six control characters and planes without letters."""
    need("tokenizers", "xllamacpp")
    which = tokenizer(without(about(RULES["SmolLM"][1]()), 0x04, 0x1D, 0xC0, 0xF1, 0xFF))
    asked = _texts(which)
    assert asked is not None
    assert asked.note is not None
    assert "0x04, 0x1D, 0xC0, 0xF1, 0xFF" in asked.note
    assert all("\x04" not in text for text in asked.texts)
    found = compared_texts(LLAMA_CPP_TOKENS, written(which, tmp_path / "m.gguf"), asked)
    assert found["texts_compared"] >= 200


def test_a_vocabulary_without_bytes_of_ordinary_text_is_refused() -> None:
    need("tokenizers")
    which = tokenizer(without(about(RULES["SmolLM"][1]()), 0x04, 0xF0, 0x7A))
    with pytest.raises(ValueError, match=r"lacks 2 bytes of ordinary text \(0x7A, 0xF0\)"):
        gguf_vocabulary(which, which.vocabulary)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_rule_that_llama_cpp_lacks_is_refused(name: str) -> None:
    need("tokenizers")
    which = tokenizer(about(UNKNOWN[name]()))
    with pytest.raises(ValueError, match="transformers takes any"):
        gguf_vocabulary(which, which.vocabulary)


def changed(key: str, value: Any, part: str | None = None) -> dict[str, Any]:
    content = about(RULES["Llama 3"][1]())
    (content if part is None else content[part])[key] = value
    return content


@pytest.mark.parametrize(
    ("key", "value", "part", "words"),
    [
        ("normalizer", {"type": "NFC"}, None, "normalizer NFC"),
        ("normalizer", {"type": "Lowercase"}, None, "normalizer Lowercase"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}, None, "NFKC"),
        ("dropout", 0.1, "model", "dropout"),
        ("continuing_subword_prefix", "##", "model", "continuing_subword_prefix"),
    ],
)
def test_what_changes_tokens_otherwise_is_refused(
    key: str, value: Any, part: str | None, words: str
) -> None:
    need("tokenizers")
    content = changed(key, value, part)
    if key == "continuing_subword_prefix":  # the library wants such a vocabulary too
        content["model"]["vocab"] = {
            **content["model"]["vocab"],
            **{f"##{k}": 2000 + n for n, k in enumerate(content["model"]["vocab"])},
        }
        content["model"]["merges"] = []
    which = tokenizer(content)
    with pytest.raises(ValueError, match=words):
        gguf_vocabulary(which, which.vocabulary)


def test_an_empty_normalizer_changes_nothing() -> None:
    need("tokenizers")
    which = tokenizer(changed("normalizer", {"type": "Sequence", "normalizers": []}))
    assert gguf_vocabulary(which, which.vocabulary)["pre"] == "llama-bpe"


def with_token(content: dict[str, Any], name: str, **flags: bool) -> dict[str, Any]:
    content = copy.deepcopy(content)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    number = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"].append(
        {"id": number, "content": name, "special": False, **plain, **flags}
    )
    return content


def test_added_tokens_stand_for_themselves_there_too(tmp_path: Path) -> None:
    """Planted: an added token that is not special written as a normal one."""
    need("tokenizers", "xllamacpp")
    which = tokenizer(with_token(about(RULES["GPT-2"][1]()), "<think>"))
    assert "<think>" in which.specials()
    found = compared_texts(LLAMA_CPP_TOKENS, written(which, tmp_path / "m.gguf"), texts(which))
    assert found["texts_compared"] >= 200


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_its_surroundings_is_refused(flag: str) -> None:
    need("tokenizers")
    which = tokenizer(with_token(about(RULES["GPT-2"][1]()), "<x>", **{flag: True}))
    with pytest.raises(ValueError, match=flag):
        gguf_vocabulary(which, which.vocabulary)


def with_whole_word(name: str, *, whole: bool) -> LibraryTokenizer:
    """A vocabulary with a word that no merges give."""
    content = about(RULES[name][1]())
    content["model"]["vocab"]["zqzqz"] = max(content["model"]["vocab"].values()) + 1
    content["model"]["ignore_merges"] = whole
    return tokenizer(content)


@pytest.mark.parametrize("whole", [False, True])
def test_a_word_that_no_merges_give_is_cut_alike(whole: bool, tmp_path: Path) -> None:
    need("tokenizers", "xllamacpp")
    which = with_whole_word("Llama 3", whole=whole)
    assert (len(which.encode_all(["zqzqz"])[0]) == 1) is whole
    wanted = Texts(["zqzqz", "a zqzqz"], which.encode_all(["zqzqz", "a zqzqz"]), specials=True)
    file = written(which, tmp_path / "m.gguf")
    assert compared_texts(LLAMA_CPP_TOKENS, file, wanted)["texts_compared"] == 2


@pytest.mark.parametrize("name", ["GPT-2", "Qwen2", "SmolLM"])
def test_whole_words_where_the_rule_has_none_are_refused(name: str) -> None:
    need("tokenizers")
    which = with_whole_word(name, whole=True)
    with pytest.raises(ValueError, match="ignore_merges"):
        gguf_vocabulary(which, which.vocabulary)
    plain = with_whole_word(name, whole=False)
    assert gguf_vocabulary(plain, plain.vocabulary)["pre"] == RULES[name][0]


def test_a_larger_model_has_tokens_that_no_text_gives_and_a_smaller_one_is_refused() -> None:
    found = gguf_vocabulary(ByteTokenizer(), 300)
    assert len(found["tokens"]) == len(found["token_type"]) == 300
    assert len(set(found["tokens"])) == 300
    with pytest.raises(ValueError, match="257 tokens"):
        gguf_vocabulary(ByteTokenizer(), 100)


@pytest.mark.parametrize(
    "which", [ByteTokenizer(), CharacterTokenizer.of("".join(sorted(set("".join(probe_texts())))))]
)
def test_our_own_tokenizers_are_cut_alike(which: Tokenizer, tmp_path: Path) -> None:
    need("xllamacpp")
    found = probe_texts()
    wanted = Texts(found, [which.encode(text).tolist() for text in found], specials=False)
    file = written(which, tmp_path / "m.gguf")
    assert compared_texts(LLAMA_CPP_TOKENS, file, wanted)["texts_compared"] == len(found)


def test_a_file_with_another_rule_is_found_by_its_texts(tmp_path: Path) -> None:
    need("tokenizers", "xllamacpp")
    which = tokenizer(about(RULES["Llama 3"][1]()))
    file = written(which, tmp_path / "m.gguf")
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"llama-bpe", b"codeshell"))
    with pytest.raises(PluginError, match="texts otherwise"):
        compared_texts(LLAMA_CPP_TOKENS, file, texts(which))


@pytest.mark.parametrize(("normalizer", "refused"), [(None, False), ({"type": "NFC"}, True)])
def test_a_run_is_refused_before_its_first_step_or_compares_its_texts(
    normalizer: Any, refused: bool, tmp_path: Path
) -> None:
    need("tokenizers", "xllamacpp", "gguf")
    content = about(RULES["Llama 3"][1]()) | {"normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "t.txt").write_text("it's 98765 o'clock, DON'T say 1234!!\n\n  well. " * 200)
    options = [
        "run.max_steps=1", "exporters=[{use: gguf}]", "observers=[{use: metrics_jsonl}]",
        "model.with={layers: 1, width: 256, heads: 2, hidden: 256}",
        f"data.with={{path: {tmp_path / 't.txt'}, tokenizer: library, sequence_length: 8, batch_size: 2, "
        f"tokenizer_file: {tmp_path / 'tokenizer.json'}, cache_dir: {tmp_path / 'cache'}}}",
    ]  # fmt: skip
    pipeline = load_pipeline("char_llama_gguf", options)
    if refused:
        with pytest.raises(PluginError, match="normalizer NFC"):
            run(pipeline, output_dir=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run/exports").exists()
        return
    done = run(pipeline, output_dir=tmp_path / "run", quiet=True)
    assert done.failed_exports == {}
    told = json.loads((tmp_path / "run/exports/gguf/manifest.json").read_text())["verified"]
    assert told["texts_compared"] >= 200
    assert told["weights_compared"] > 500_000
