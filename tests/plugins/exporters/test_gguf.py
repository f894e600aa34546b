from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from llamas import prompts, ternary_llama

from forge_kernel.errors import PluginError
from forge_plugins.clients.llama_cpp_rounding import as_llama_cpp
from forge_plugins.clients.reading import LLAMA_CPP_WEIGHTS, compared_weights
from forge_plugins.clients.verification import LLAMA_CPP, _ask, agreement, rounding_noise
from forge_plugins.interchange.gguf import write_gguf
from forge_plugins.interchange.gguf_model import gguf_entries, gguf_numbers, gguf_tensors
from forge_plugins.interchange.gguf_parts import interleave
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.text.byte_alphabet import byte_alphabet
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer, CharacterTokenizer

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "feed_bias": True},
    "bitnet": {"sub_norms": True, "tied": True},
    "narrow": {"width": 192, "heads": 3, "groups": 3, "hidden": 320},
    "binary": {"bits": 1, "hidden": 384},
}


def write(model: Any, file: Path, kind: Any = "tq2_0", **options: Any) -> None:
    write_gguf(
        file,
        gguf_entries(model, kind, ByteTokenizer(), "test"),
        gguf_tensors(model, kind, **options),
    )


CASES = [
    ("llama", "tq2_0", False, "f32"),
    ("llama with biases", "tq1_0", True, "f32"),
    ("bitnet", "tq1_0", False, "f32"),
    ("llama", "q2_0", False, "f16"),
    ("narrow", "q2_0", True, "f32"),
    ("binary", "q1_0", False, "f32"),
    ("narrow", "q4_0", False, "f32"),
]


@pytest.mark.parametrize(("form", "kind", "scale_tensors", "other"), CASES)
def test_llama_cpp_gives_our_probabilities(
    form: str, kind: Any, scale_tensors: bool, other: Any, tmp_path: Path
) -> None:
    need("xllamacpp")
    model, inputs = ternary_llama(**FORMS[form]), prompts(4, 8)
    file = tmp_path / "model.gguf"
    write(model, file, kind, scale_tensors=scale_tensors, other=other)
    found = _ask(LLAMA_CPP, file, inputs)
    same = as_llama_cpp(model, kind, scale_tensors=scale_tensors, other=other)
    with torch.no_grad():
        trained = agreement(found, model(inputs), up_to_constant=True)
        close = agreement(found, same(inputs), up_to_constant=True)
    assert trained["relative_l2"] <= 5e-2
    assert trained["top1_agreement"] >= 0.9
    # equal but where a rounding fell to the other side, which the rest of that text shows
    assert close["median_relative_l2"] <= 1e-5
    assert close["relative_l2"] <= 5e-3
    assert close["top1_agreement"] >= 0.95


def test_another_rounding_than_that_of_the_client_is_seen(tmp_path: Path) -> None:
    need("xllamacpp")
    model, inputs, file = ternary_llama(**FORMS["narrow"]), prompts(2, 8), tmp_path / "model.gguf"
    write(model, file, "q2_0")
    found = _ask(LLAMA_CPP, file, inputs)
    with torch.no_grad():
        wrong = as_llama_cpp(model, "q2_0", scale_tensors=True, other="f32")(inputs)
    assert agreement(found, wrong, up_to_constant=True)["median_relative_l2"] > 5e-5


@pytest.mark.parametrize("kind", ["q2_0", "q1_0"])
def test_llama_cpp_reads_the_weights_of_recent_types(kind: Any, tmp_path: Path) -> None:
    need("xllamacpp")
    model = ternary_llama(**FORMS["binary" if kind == "q1_0" else "narrow"])
    file = tmp_path / "model.gguf"
    write(model, file, kind)
    meant = gguf_numbers(model, kind)
    assert compared_weights(LLAMA_CPP_WEIGHTS, file, meant)["weights_compared"] == sum(
        value.numel() for value in meant.values()
    )
    meant["blk.1.ffn_down.weight"][3, 5] *= -2
    with pytest.raises(PluginError, match=r"1 of \d+ in blk.1.ffn_down.weight"):
        compared_weights(LLAMA_CPP_WEIGHTS, file, meant)


def test_levels_that_a_type_does_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.58 bits, which have a level 0: .*set type: q2_0"):
        gguf_tensors(ternary_llama(), "q1_0")
    narrow = ternary_llama(**FORMS["narrow"])
    with pytest.raises(ValueError, match="set type: q2_0"):
        gguf_tensors(narrow, "tq2_0")


def test_the_package_gguf_reads_what_we_wrote(tmp_path: Path) -> None:
    need("gguf")
    import gguf

    model = ternary_llama()
    write(model, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    value = found["blk.0.attn_v.weight"]
    weight = gguf.quants.dequantize(value.data, value.tensor_type)
    layer = model.get_submodule("blocks.0.attention.value")
    assert isinstance(layer, BitLinear)
    assert torch.allclose(torch.tensor(weight), layer.applied_weight(), rtol=1e-3)
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"llama"
    assert reader.fields["llama.rope.freq_base"].parts[-1][0] == 10000.0
    norm = model.get_parameter("norm.weight")
    assert torch.equal(torch.tensor(found["output_norm.weight"].data), norm)


def test_queries_and_keys_are_interleaved_for_llama_and_not_for_bitnet() -> None:
    rows = torch.arange(8).float()  # two heads of four
    assert interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    model = ternary_llama(sub_norms=True, tied=True)
    turned = gguf_tensors(ternary_llama(), "tq2_0")["blk.0.attn_q.weight"]
    plain = gguf_tensors(model, "tq2_0")["blk.0.attn_q.weight"]
    model_llama = ternary_llama()
    from forge_plugins.interchange.ternary_blocks import unpack_blocks
    from forge_plugins.mathematics.quantization.ternary_layers import read_layers

    levels = read_layers(model_llama)["blocks.0.attention.query"].levels
    assert torch.equal(unpack_blocks(turned.values, 256, "tq2_0")[0], interleave(levels, 4))
    levels = read_layers(model)["blocks.0.attention.query"].levels
    assert torch.equal(unpack_blocks(plain.values, 256, "tq2_0")[0], levels)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"activation": "relu2"}, "activation: silu"),
        ({"sub_norms": True}, "tied: true"),
        ({"sub_norms": True, "tied": True, "attention_bias": True}, "attention_bias"),
        ({"width": 192, "heads": 3, "groups": 3}, "not a multiple of 256"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(shape: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gguf_tensors(ternary_llama(**shape), "tq2_0")


def test_the_character_vocabulary_reaches_each_character_by_merging_its_bytes() -> None:
    from forge_plugins.interchange.tokenizer_files import gguf_vocabulary

    found = gguf_vocabulary(CharacterTokenizer.of("aé▁"), 5)
    assert [len(token) for token in found["tokens"][:3]] == [1, 2, 3]
    assert len(found["merges"]) == 3
    assert found["eos_token_id"] == 4


def test_a_chat_template_goes_into_the_file_where_the_tokenizer_has_one() -> None:
    need("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    content = json.loads(made.to_str())
    content["model"]["vocab"] = {letter: place for place, letter in enumerate(byte_alphabet())}
    content["added_tokens"] = [
        {"id": 256, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
    ]  # fmt: skip
    tokenizer = LibraryTokenizer(json.dumps(content))
    model = ternary_llama()
    assert "tokenizer.chat_template" not in gguf_entries(model, "tq2_0", tokenizer, "x")
    tokenizer.settings["chat_template"] = "{{ messages }}"
    entries = gguf_entries(model, "tq2_0", tokenizer, "x")
    assert entries["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(("kind", "other"), [("tq2_0", "f16"), ("q2_0", "f16"), ("q2_0", "f32")])
def test_what_another_order_of_sums_moves_is_known_of_the_clients_rounding_too(
    kind: Any, other: Any
) -> None:
    """Planted: weights that stay in fp32 where the rest is doubled."""
    model = as_llama_cpp(ternary_llama(), kind, scale_tensors=False, other=other)
    assert 0 < rounding_noise(model, prompts(2, 8)) < 1e-2
