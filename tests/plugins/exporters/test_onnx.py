"""ONNX files of any network with quantized layers: what is in them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from llamas import distances
from onnx_networks import ENCODINGS, NETWORKS, answer_here, one_layer
from torch import Tensor, nn

from forge_plugins.clients.reading import ONNX_WEIGHTS
from forge_plugins.clients.verification import ONNXRUNTIME
from forge_plugins.interchange.onnx_layers import check_layers
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.scheme import Scheme


def exported(model: nn.Module, inputs: Tensor, encoding: Any, file: Path) -> Any:
    """The network that was written."""
    need("onnxruntime", "onnx", "onnxscript")
    from forge_plugins.interchange.onnx_export import export_network, write_network

    network = export_network(model, inputs[:2], encoding)
    write_network(network, file)
    return network


def apart(model: nn.Module, file: Path, inputs: Tensor) -> Tensor:
    """How far onnxruntime's outputs are from the model's in evaluation, by sample."""
    with torch.no_grad():
        reference = model.eval()(inputs)
    return distances(answer_here(ONNXRUNTIME, file, {"inputs": inputs})["logits"], reference)


def packed_size(layer: BitLayer) -> float:
    """Bytes of a weight's levels at their bits, and of its scales."""
    bits = {1.58: 2}.get(layer.scheme.weight_bits, layer.scheme.weight_bits)
    return layer.weight.numel() * bits / 8 + 4 * layer.scale().numel()


LONG = {
    ("showcase", "matmul_integer"), ("showcase", "matmul_nbits"), ("llama", "matmul_nbits"),
    ("llama", "int2"),
}  # fmt: skip
"""An export takes a second and more: others see these networks and encodings too."""


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [
        pytest.param(kind, encoding, marks=[pytest.mark.deep] * ((kind, encoding) in LONG))
        for kind in NETWORKS
        for encoding in ENCODINGS
    ],
)
def test_a_network_computes_the_same_in_onnxruntime(
    kind: str, encoding: Any, tmp_path: Path
) -> None:
    """Planted: a wrong scale, levels in another order, a zero point off by one."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[kind]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream, file = torch.get_rng_state(), tmp_path / "model.onnx"
    network = exported(model, inputs, encoding, file)

    # the model is what it was
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), stream)

    # other numbers of samples than those that it was followed with, and another length
    far = apart(model, file, inputs)
    assert float(far.median()) <= 1e-6
    assert float(far.max()) <= 1e-2  # a rounding that fell to the other side
    if inputs.dtype is torch.int64:
        assert float(apart(model, file, inputs[:1, :3]).max()) <= 1e-2

    # every number is in the file, and the packed ones at their size
    found = answer_here(ONNX_WEIGHTS, file, {"nothing": torch.empty(1)})
    for name, meant in network.numbers.items():
        assert torch.equal(found[name].view(meant.shape), meant), name
    layers = [layer for layer in model.modules() if isinstance(layer, BitLayer)]
    assert network.packed_weights == sum(layer.weight.numel() for layer in layers)
    tables = 256 * (8 + 4 + 2)
    assert network.packed_bytes <= 1.05 * sum(map(packed_size, layers)) + tables
    graph = 3_000 * len(list(model.modules()))
    assert file.stat().st_size <= network.packed_bytes + network.other_bytes + graph


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_valid_and_small_and_says_nothing_of_where_it_was_made(
    encoding: Any, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    exported(one_layer(1000, 1001), torch.randn(2, 1000), encoding, file)
    assert file.stat().st_size <= 1.05 * (1000 * 1001 / 4 + 4 + 4 * 1001)
    import onnx

    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    opset = 25 if encoding == "int2" else 23
    assert {one.domain: one.version for one in model.opset_import}[""] == opset
    assert model.ir_version == {23: 11, 25: 13}[opset]
    ends = (model.graph.input[0], model.graph.output[0])
    assert [end.name for end in ends] == ["inputs", "logits"]
    sizes = [end.type.tensor_type.shape.dim for end in ends]
    assert [[one.dim_param or one.dim_value for one in size] for size in sizes] == [
        ["batch", 1000], ["batch", 1001],
    ]  # fmt: skip
    del model.graph.initializer[:]
    assert b".py" not in model.SerializeToString()


class Tied(nn.Module):
    """Two quantized layers with one weight; an embedding that is also a plain head.

    The layers' inputs are one tensor, but not the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.right.weight = self.left.weight
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight
        convert_linears(self, lambda name: name != "head")

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden += self.left(hidden)
        return self.head(self.right(hidden))


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    model, file = Tied(), tmp_path / "model.onnx"
    inputs = torch.randint(50, (5, 3))
    network = exported(model, inputs, "matmul_nbits", file)
    assert network.packed_bytes == 64 * 64 / 4 + 4
    assert network.packed_weights == 64 * 64
    assert network.other_bytes < 4 * (50 * 64 + 64 + 64) + 200  # and a few constants
    assert float(apart(model, file, inputs).max()) <= 1e-2


def test_weights_in_half_precision_stay_so_also_tied_ones(tmp_path: Path) -> None:
    model = Tied().to(torch.bfloat16)
    inputs, file = torch.randint(50, (5, 3)), tmp_path / "model.onnx"
    network = exported(model, inputs, "matmul_nbits", file)
    assert network.other_bytes < 2 * (50 * 64 + 64 + 64) + 200
    assert float(apart(model.float(), file, inputs).max()) <= 1e-2
    found = answer_here(ONNX_WEIGHTS, file, {"nothing": torch.empty(1)})
    (table,) = [name for name in ("head.weight", "embedding.weight") if name in found]
    assert torch.equal(found[table], model.head.weight)


def test_a_layer_in_two_places_and_layers_with_equal_levels(tmp_path: Path) -> None:
    first, second = BitLinear(8, 8, bias=False), BitLinear(8, 8, bias=False)
    with torch.no_grad():
        second.weight.copy_(4 * first.weight)  # the same levels, another scale
    model = nn.Sequential(first, nn.Tanh(), nn.Sequential(first, nn.Tanh(), second))
    inputs = torch.randn(5, 8)
    for encoding in ("int2", "matmul_integer"):
        file = tmp_path / f"{encoding}.onnx"
        network = exported(model, inputs, encoding, file)
        assert float(apart(model, file, inputs).max()) <= 1e-2
        found = answer_here(ONNX_WEIGHTS, file, {"nothing": torch.empty(1)})
        assert len(network.numbers) == 2
        for name, meant in network.numbers.items():
            assert torch.equal(found[name].view(meant.shape), meant)


def test_a_compiled_network_that_fills_more_than_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnxruntime", "onnx", "onnxscript")
    from forge_plugins.interchange import onnx_export

    monkeypatch.setattr(onnx_export, "LARGEST", 1000)
    model, inputs, file = one_layer(40, 200), torch.randn(5, 40), tmp_path / "model.onnx"
    compiled: Any = torch.compile(model)  # never called: what was written is followed
    network = onnx_export.export_network(compiled, inputs, "int2")
    files = onnx_export.write_network(network, file)
    assert [one.name for one in files] == ["model.onnx", "model.onnx.data"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for one in files:
        one.rename(moved / one.name)
    assert float(apart(model, moved / "model.onnx", inputs).max()) <= 1e-2


# -- refusals --------------------------------------------------------------------------------------


class Decides(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum() > 0 else -inputs


class Unusual(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.linalg.svdvals(inputs.view(-1, 4, 4))


class Pair(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs.sum(-1)


class OneSize(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.view(2, 16)


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (Decides(), r"forward pass of 1 \(Decides\): .*data-dependent.*packed_ternary"),
        (OneSize(), r"forward pass of .*size.*constant \(2\)"),
        (Unusual(), r"cannot turn a part of the model \(1\) into ONNX .*svd.*packed_ternary"),
        (Pair(), "forward gives 2 tensors"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason_and_the_module(
    tail: nn.Module, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(BitLinear(16, 16), tail)
    with pytest.raises(ValueError, match=words):
        exported(model, torch.randn(2, 16), "int2", tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


class Own(BitLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "encoding", "words"),
    [
        (nn.Linear(4, 4), "int2", "no quantized layer"),
        (BitLinear(4, 4, scheme=Scheme(activation_bits=16)), "matmul_integer", "matmul_nbits"),
        (
            BitConv2d(4, 4, 3, scheme=Scheme(granularity="group", group_size=4)),
            "matmul_integer", "0: it is a convolution with a scale for each group of 4",
        ),
        (Own(4, 4), "int2", "0: its class Own has a forward of its own"),
    ],
)  # fmt: skip
def test_layers_that_an_encoding_cannot_hold_are_known_before_the_first_step(
    layer: nn.Module, encoding: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_layers(nn.Sequential(layer), encoding)


def test_a_warm_up_that_is_not_over_is_refused_at_the_end_alone(tmp_path: Path) -> None:
    need("onnx", "onnxscript")
    from forge_plugins.interchange.onnx_export import export_network

    model = nn.Sequential(BitLinear(16, 16, quantization=QuantizationState(warmup_lambda=0.5)))
    export_network(model, torch.randn(2, 16), "int2", finished=False)
    with pytest.raises(ValueError, match="50% of the levels"):
        exported(model, torch.randn(2, 16), "int2", tmp_path / "m.onnx")
