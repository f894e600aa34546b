"""A client unpacks every weight of an export: a wrong byte anywhere turns it red."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from live_exports import batches, live_run, manifest
from llamas import ternary_llama
from onnx_networks import ENCODINGS, ask_here, one_layer
from safetensors.torch import load_file

from forge_kernel.errors import PluginError
from forge_plugins.clients.reading import GGUF_WEIGHTS, ONNX_WEIGHTS, compared_weights
from forge_plugins.clients.verification import Client, sample_inputs
from forge_plugins.interchange.gguf import write_gguf
from forge_plugins.interchange.gguf_model import gguf_entries, gguf_numbers, gguf_tensors
from forge_plugins.interchange.transformers_folder import folder_tensors, wrong_tensors
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.networks.mlp import Mlp
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer


def flipped(file: Path, place: int, folder: Path) -> Path:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 0b1
    other = folder / f"{place}{file.suffix}"
    other.write_bytes(raw)
    return other


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_flipped_bit_in_an_onnx_weight_is_found(
    encoding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnxruntime", "onnx", "onnxscript")
    import onnx

    from forge_plugins.interchange.onnx_export import export_network, write_network

    ask_here(monkeypatch)
    network = export_network(one_layer(16, 16), torch.randn(2, 16), encoding)
    file = tmp_path / "m.onnx"
    write_network(network, file)
    told = compared_weights(ONNX_WEIGHTS, file, network.numbers)
    assert told["weights_compared"] == 16 * 16 + 16
    raw = file.read_bytes()
    for one in onnx.load(file).graph.initializer:
        if one.name not in {"packed.levels", "packed.steps", "bias"}:
            continue
        begin = raw.index(one.raw_data)
        with pytest.raises(PluginError, match="reads other weights"):
            compared_weights(ONNX_WEIGHTS, flipped(file, begin, tmp_path), network.numbers)


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
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnxruntime", "onnx", "onnxscript")
    ask_here(monkeypatch)
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
