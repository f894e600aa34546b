"""A client unpacks every weight of an export: a wrong byte anywhere turns it red."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from live_exports import batches, live_run, manifest
from llamas import distances, ternary_llama
from safetensors.torch import load_file
from torch import nn

from forge_kernel.errors import PluginError
from forge_plugins.clients.reading import GGUF_WEIGHTS, ONNX_WEIGHTS, compared_weights
from forge_plugins.clients.verification import ONNXRUNTIME, Client, _ask, sample_inputs
from forge_plugins.interchange.gguf import write_gguf
from forge_plugins.interchange.gguf_llama import gguf_entries, gguf_numbers, gguf_tensors
from forge_plugins.interchange.onnx_graph import onnx_numbers, write_onnx
from forge_plugins.interchange.transformers_folder import folder_tensors, wrong_tensors
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.networks.mlp import Mlp
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.scheme import Scheme
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer

ENCODINGS = ["matmul_nbits", "int2", "matmul_integer"]


def perceptron(features: int, hidden: tuple[int, ...], bits: float = 1.58) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp(features=features, hidden=hidden, outputs=3).eval()
    convert_linears(model, lambda name: True, Scheme(weight_bits=bits))
    return model


def flipped(file: Path, place: int, folder: Path) -> Path:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 0b1
    other = folder / f"{place}{file.suffix}"
    other.write_bytes(raw)
    return other


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("features", "hidden"), [(4, (7,)), (1, (1,)), (129, (130,))])
def test_rows_that_fill_no_byte_are_read_as_they_were_meant(
    encoding: Any, features: int, hidden: tuple[int, ...], tmp_path: Path
) -> None:
    """Planted: rows of INT2 filled up to whole bytes."""
    need("onnxruntime", "onnx")
    model, file = perceptron(features, hidden), tmp_path / "m.onnx"
    write_onnx(model, encoding, file)
    found = compared_weights(ONNX_WEIGHTS, file, onnx_numbers(model, encoding))
    assert found["weights_compared"] == sum(
        one.numel() for one in onnx_numbers(model, encoding).values()
    )
    inputs = torch.randn(64, features)
    with torch.no_grad():
        apart = distances(_ask(ONNXRUNTIME, file, inputs), model(inputs))
    assert float(apart.median()) <= 1e-5


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_and_two_bits_stand_in_every_encoding(
    bits: float, encoding: Any, tmp_path: Path
) -> None:
    need("onnxruntime", "onnx")
    model, file = perceptron(5, (7,), bits), tmp_path / "m.onnx"
    write_onnx(model, encoding, file)
    assert compared_weights(ONNX_WEIGHTS, file, onnx_numbers(model, encoding))["weights_compared"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_flipped_bit_in_an_onnx_weight_is_found(encoding: Any, tmp_path: Path) -> None:
    need("onnxruntime", "onnx")
    import onnx

    model, file = perceptron(8, (16,)), tmp_path / "m.onnx"
    write_onnx(model, encoding, file)
    meant = onnx_numbers(model, encoding)
    raw = file.read_bytes()
    for one in onnx.load(file).graph.initializer:
        if not one.name.startswith("layers.0."):
            continue
        begin = raw.index(one.raw_data)
        with pytest.raises(PluginError, match=r"reads other weights|cannot run"):
            compared_weights(ONNX_WEIGHTS, flipped(file, begin, tmp_path), meant)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize("options", [{}, {"scale_tensors": True, "other": "f16"}])
def test_gguf_holds_every_weight_and_a_flipped_bit_is_found(
    kind: Any, options: Any, tmp_path: Path
) -> None:
    need("gguf")
    model, file = ternary_llama(attention_bias=True, layers=1, hidden=256), tmp_path / "m.gguf"
    tensors = gguf_tensors(model, kind, **options)
    write_gguf(file, gguf_entries(model, kind, ByteTokenizer(), "test"), tensors)
    meant = gguf_numbers(model, kind, **options)
    found = compared_weights(GGUF_WEIGHTS, file, meant)
    assert found["weights_compared"] == sum(one.numel() for one in meant.values())
    end = file.stat().st_size
    for place in (end - 2, end - 64 * 1024, end - 100_001):
        with pytest.raises(PluginError, match="reads other weights"):
            compared_weights(GGUF_WEIGHTS, flipped(file, place, tmp_path), meant)


@pytest.mark.parametrize("layout", ["bitlinear", "autobitlinear", "online"])
def test_a_transformers_folder_with_a_wrong_byte_is_found(layout: Any) -> None:
    model = ternary_llama(layers=1)
    tensors = folder_tensors(model, layout)
    assert wrong_tensors(model, layout, tensors, tensors) == []
    for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"):
        stored = {key: value.clone() for key, value in tensors.items()}
        stored[name].view(torch.uint8).view(-1)[-1] ^= 1
        assert wrong_tensors(model, layout, tensors, stored) == [name]


def test_levels_packed_in_another_order_are_found() -> None:
    model = ternary_llama(layers=1)
    tensors = folder_tensors(model, "bitlinear")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].flip(0)
    assert wrong_tensors(model, "bitlinear", tensors, tensors) == [name]


def test_a_reader_that_is_not_installed_is_no_claim(tmp_path: Path) -> None:
    found = compared_weights(Client("gguf_weights", ("no_such_reader",)), tmp_path, {})
    assert found["weights_compared"] is None
    assert "no_such_reader is not installed" in str(found["weights_note"])


def test_inputs_are_gathered_from_several_batches() -> None:
    found = sample_inputs(iter(_batches(10)), 25, None)
    assert found is not None
    assert len(found) == 25
    some = sample_inputs(iter(_batches(3)), 25, None)
    assert some is not None
    assert len(some) == 12


def _batches(size: int) -> list[Any]:
    from forge_kernel.api import Batch

    return [Batch(torch.randn(size, 4)) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_live_perceptron_in_half_precision_is_exported_and_read(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    need("onnxruntime", "onnx")
    data = batches(dtype)
    model = Mlp(features=4, hidden=(7,), outputs=3).to(dtype)
    done = live_run(
        model, (data, data), tmp_path / "run", "{use: onnx, with: {weights: int2}}",
        "quantizer.with.skip=[]",
    )  # fmt: skip
    assert done.failed_exports == {}
    told = manifest(tmp_path / "run", "onnx")["verified"]
    assert told["weights_compared"] == 4 * 7 + 7 + 7 * 3 + 3
    assert told["rows"] == 40
    assert told["relative_l2"] <= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_live_llama_in_half_precision_becomes_a_folder_with_its_own_numbers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Llama(
        LlamaShape(vocabulary=257, context=16, width=256, layers=1, heads=4, groups=2, hidden=256)
    ).to(dtype)
    tokens = torch.randint(257, (2, 8))
    done = live_run(
        model, [(tokens, tokens)], tmp_path / "run",
        "{use: transformers, with: {verify: false}}, {use: gguf, with: {verify: false}}",
    )  # fmt: skip
    assert done.failed_exports == {}
    found = load_file(tmp_path / "run/exports/transformers/model.safetensors")
    assert torch.equal(found["model.norm.weight"], model.norm.weight.float())
