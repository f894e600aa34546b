from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from llamas import distances, prompts, ternary_llama
from torch import nn

from forge_plugins.clients.verification import ONNXRUNTIME, _ask
from forge_plugins.interchange.onnx_graph import write_onnx
from forge_plugins.mathematics.networks.mlp import Mlp
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.scheme import Scheme

ENCODINGS = ["matmul_nbits", "int2", "matmul_integer"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("widths", [(), (200,)])
def test_onnxruntime_gives_our_outputs(encoding: Any, widths: Any, tmp_path: Path) -> None:
    """With bias, and rows that fill no block."""
    need("onnxruntime", "onnx")
    import onnx

    torch.manual_seed(0)
    model = Mlp(features=300, hidden=widths, outputs=33, activation="gelu").eval()
    convert_linears(model, lambda name: True)
    inputs = torch.randn(8, 300)
    file = tmp_path / "model.onnx"
    write_onnx(model, encoding, file)
    onnx.checker.check_model(onnx.load(file), full_check=True)
    with torch.no_grad():
        apart = distances(_ask(ONNXRUNTIME, file, inputs), model(inputs))
    assert float(apart.median()) <= 1e-6
    assert float(apart.max()) <= 1e-2  # a rounding that fell to the other side


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "shape",
    [
        {"attention_bias": True, "feed_bias": True},
        {"sub_norms": True, "activation": "relu2", "tied": True},
    ],
)
def test_a_whole_llama_runs_in_onnxruntime(encoding: Any, shape: Any, tmp_path: Path) -> None:
    need("onnxruntime")
    model, inputs = ternary_llama(**shape), prompts(8, 6)
    write_onnx(model, encoding, tmp_path / "m.onnx")
    with torch.no_grad():
        apart = distances(_ask(ONNXRUNTIME, tmp_path / "m.onnx", inputs), model(inputs))
    assert float(apart.median()) <= 1e-5
    assert float(apart.max()) <= 1e-2


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    model, _ = convert_linears(nn.Sequential(nn.Linear(4, 4)), lambda name: True)
    with pytest.raises(ValueError, match="Sequential is no architecture"):
        write_onnx(model, "int2", tmp_path / "m.onnx")


def test_matmul_integer_refuses_sixteen_bit_activations(tmp_path: Path) -> None:
    model = Mlp(features=8, hidden=(), outputs=4)
    convert_linears(model, lambda name: True, Scheme(activation_bits=16))
    with pytest.raises(ValueError, match="matmul_nbits"):
        write_onnx(model, "matmul_integer", tmp_path / "m.onnx")
