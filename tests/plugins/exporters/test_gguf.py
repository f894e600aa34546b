from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from llamas import prompts, ternary_llama
from torch import Tensor
from torch.nn import functional

from forge_plugins.clients.verification import LLAMA_CPP, _ask, agreement
from forge_plugins.interchange.gguf import write_gguf
from forge_plugins.interchange.gguf_model import gguf_entries, gguf_tensors
from forge_plugins.interchange.gguf_parts import interleave
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer, CharacterTokenizer

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "feed_bias": True},
    "bitnet": {"sub_norms": True, "tied": True},
}


def write(model: Any, file: Path, kind: Any = "tq2_0", **options: Any) -> None:
    write_gguf(
        file,
        gguf_entries(model, kind, ByteTokenizer(), "test"),
        gguf_tensors(model, kind, **options),
    )


def by_blocks(layer: BitLinear, inputs: Tensor) -> Tensor:
    """What llama.cpp computes: one activation scale for each 256 values."""
    blocks = inputs.reshape(*inputs.shape[:-1], -1, 256)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    sign = torch.where(blocks.amax(-1, keepdim=True) > -blocks.amin(-1, keepdim=True), 1.0, -1.0)
    whole = torch.round(blocks / scale * -sign) * -sign
    return functional.linear((whole * scale).flatten(-2), layer.applied_weight(), layer.bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_tensors", [False, True])
def test_llama_cpp_gives_our_probabilities(
    form: str, scale_tensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("xllamacpp")
    model, inputs = ternary_llama(**FORMS[form]), prompts(4, 8)
    file = tmp_path / "model.gguf"
    write(model, file, "tq2_0" if form != "bitnet" else "tq1_0", scale_tensors=scale_tensors)
    found = _ask(LLAMA_CPP, file, inputs)
    with torch.no_grad():
        trained = agreement(found, model(inputs), up_to_constant=True)
        monkeypatch.setattr(BitLinear, "forward", by_blocks)
        reference = model(inputs)
    assert trained["relative_l2"] <= 5e-2
    assert trained["top1_agreement"] >= 0.9
    if scale_tensors:  # but where a rounding fell to the other side
        rows = zip(found, reference, strict=True)
        apart = [agreement(a, b, up_to_constant=True)["relative_l2"] for a, b in rows]
        assert sorted(apart)[1] <= 1e-5, apart


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
