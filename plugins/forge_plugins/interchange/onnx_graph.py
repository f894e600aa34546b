"""Ternary networks as ONNX graphs, written by hand from the layers: no tracing.

Activations are rounded to int8 per token by plain nodes, as in training. The weight of a ternary
layer stands in one of three encodings:

- `matmul_nbits`: two bits, unpacked inside onnxruntime's `MatMulNBits` (accuracy level 0, which
  does not round activations a second time);
- `int2`: the standard's INT2 and `DequantizeLinear`;
- `matmul_integer`: int8 numbers in `MatMulInteger`, whose sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor, nn

from forge_plugins.interchange.grid_weight import applied_state, need_grid_layers
from forge_plugins.interchange.onnx_file import MICROSOFT, OnnxGraph
from forge_plugins.mathematics.networks.llama import Llama, RMSNorm, rotary_table
from forge_plugins.mathematics.networks.mlp import Mlp
from forge_plugins.mathematics.quantization.packing import check_levels
from forge_plugins.mathematics.quantization.quantizers import EPSILON
from forge_plugins.mathematics.quantization.ternary_layers import (
    TernaryLayer,
    check_layers,
    read_layers,
)

Encoding = Literal["matmul_nbits", "int2", "matmul_integer"]
BLOCK: Final = 128
OPSET: Final[dict[Encoding, int]] = {"matmul_nbits": 23, "int2": 25, "matmul_integer": 23}


def pack_rows(levels: Tensor, offset: int, block: int) -> Tensor:
    """`level + offset` in two bits, four neighbours of a row to a byte, lowest bits first.

    Args:
        levels: int8, shape (rows, columns).
        offset: added to each level; the sum modulo 4 is the code.
        block: rows are filled up to a multiple of it with zero levels.

    Returns:
        uint8, shape (rows, filled columns / 4).
    """
    check_levels(levels)
    missing = -levels.shape[1] % block
    codes = nn.functional.pad(levels, (0, missing)).add_(offset).bitwise_and_(3).view(torch.uint8)
    quads = codes.view(len(levels), -1, 4)
    packed = quads[..., 0].clone()
    for place in (1, 2, 3):
        packed |= quads[..., place] << (2 * place)
    return packed


class _Writer:
    """Adds layers to a graph."""

    def __init__(self, model: nn.Module, encoding: Encoding) -> None:
        self.graph = OnnxGraph()
        self.encoding = encoding
        self.layers = read_layers(model)
        self._number("epsilon", EPSILON)
        self._number("largest", 127.0)
        self.graph.constant("last_axis", torch.tensor([-1]))

    def _number(self, name: str, value: float | Tensor) -> str:
        return self.graph.constant(name, torch.as_tensor(value, dtype=torch.float32))

    def linear(self, name: str, layer: nn.Linear, inputs: str) -> str:
        """`x W^T + b`, ternary or not."""
        graph, ternary = self.graph, self.layers.get(name)
        if ternary is None:
            weight = graph.constant(f"{name}.weight", layer.weight.detach().float().t())
            result = graph.node("MatMul", [inputs, weight])
        else:
            result = self._ternary(name, ternary, inputs)
        if layer.bias is not None:
            bias = graph.constant(f"{name}.bias", layer.bias.detach().float())
            result = graph.node("Add", [result, bias])
        return result

    def _rounded(self, inputs: str) -> tuple[str, str]:
        """Activations as whole numbers in fp32, and their scale per token."""
        graph = self.graph
        size = graph.node("Abs", [inputs])
        size = graph.node("ReduceMax", [size, "last_axis"], keepdims=1)
        scale = graph.node("Div", ["largest", graph.node("Max", [size, "epsilon"])])
        return graph.node("Round", [graph.node("Mul", [inputs, scale])]), scale

    def _ternary(self, name: str, layer: TernaryLayer, inputs: str) -> str:
        graph = self.graph
        rows, columns = layer.levels.shape
        if self.encoding == "matmul_integer":
            whole, scale = self._rounded(inputs)
            weight = graph.constant(f"{name}.levels", layer.levels.t())
            sums = graph.node("MatMulInteger", [graph.node("Cast", [whole], to=3), weight])
            both = graph.node("Mul", [scale, self._number(f"{name}.scale", layer.scale)])
            return graph.node("Div", [graph.node("Cast", [sums], to=1), both])
        if layer.activation_bits == 8:
            whole, scale = self._rounded(inputs)
            inputs = graph.node("Div", [whole, scale])
        if self.encoding == "int2":
            # such numbers stand one after the other: a row may begin within a byte
            flat = pack_rows(layer.levels.reshape(1, -1), 0, 4)
            weight = graph.int2(f"{name}.levels", flat, (rows, columns))
            item = self._number(f"{name}.level", 1.0 / layer.scale)
            # the transposition keeps onnxruntime from fusing both into a kernel that rounds
            # activations once more
            result = graph.node("DequantizeLinear", [weight, item])
            return graph.node("MatMul", [inputs, graph.node("Transpose", [result])])
        packed = pack_rows(layer.levels, 2, BLOCK).view(rows, -1, BLOCK // 4)
        weight = graph.constant(f"{name}.levels", packed)
        count = rows * packed.shape[1]
        scales = graph.constant(f"{name}.scales", (1.0 / layer.scale).expand(count))
        sizes = {"K": columns, "N": rows, "bits": 2, "block_size": BLOCK, "accuracy_level": 0}
        return graph.node("MatMulNBits", [inputs, weight, scales], MICROSOFT, **sizes)

    def norm(self, name: str, layer: RMSNorm, inputs: str) -> str:
        """Root mean square norm."""
        weight = self.graph.constant(f"{name}.weight", layer.weight.detach().float())
        return self.graph.node(
            "RMSNormalization", [inputs, weight], axis=-1, epsilon=float(layer.epsilon)
        )


def _write_llama(model: Llama, writer: _Writer, file: Path) -> None:
    graph, shape = writer.graph, model.shape
    modules = dict(model.named_modules())

    def linear(name: str, inputs: str) -> str:
        layer = modules[name]
        assert isinstance(layer, nn.Linear)
        return writer.linear(name, layer, inputs)

    def norm(name: str, inputs: str) -> str:
        layer = modules[name]
        assert isinstance(layer, RMSNorm)
        return writer.norm(name, layer, inputs)

    cosines, sines = rotary_table(
        shape.context, shape.head_width, shape.rotary_base, torch.empty(0)
    )
    half = shape.head_width // 2
    graph.constant("cosines", cosines[:, :half])
    graph.constant("sines", sines[:, :half])
    sizes = graph.node("Shape", ["inputs"])
    length = graph.node("Gather", [sizes, graph.constant("one", torch.tensor(1))])
    zero = graph.constant("zero", torch.tensor(0))
    places = graph.node("Expand", [graph.node("Range", [zero, length, "one"]), sizes])
    table = graph.constant("token_embedding.weight", model.token_embedding.weight.detach().float())
    stream = graph.node("Gather", [table, "inputs"])
    for index in range(shape.layers):
        block = f"blocks.{index}"
        normed = norm(f"{block}.attention_norm", stream)
        turned = [
            graph.node(
                "RotaryEmbedding",
                [linear(f"{block}.attention.{part}", normed), "cosines", "sines", places],
                num_heads=heads,
            )
            for part, heads in (("query", shape.heads), ("key", shape.groups))
        ]
        value = linear(f"{block}.attention.value", normed)
        mixed = graph.node(
            "Attention", [*turned, value], is_causal=1,
            q_num_heads=shape.heads, kv_num_heads=shape.groups,
        )  # fmt: skip
        if shape.sub_norms:
            mixed = norm(f"{block}.attention.norm", mixed)
        stream = graph.node("Add", [stream, linear(f"{block}.attention.output", mixed)])
        normed = norm(f"{block}.feed_norm", stream)
        gate = linear(f"{block}.feed.gate", normed)
        if shape.activation == "silu":
            gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
        else:
            gate = graph.node("Relu", [gate])
            gate = graph.node("Mul", [gate, gate])
        hidden = graph.node("Mul", [gate, linear(f"{block}.feed.up", normed)])
        if shape.sub_norms:
            hidden = norm(f"{block}.feed.norm", hidden)
        stream = graph.node("Add", [stream, linear(f"{block}.feed.down", hidden)])
    logits = linear("head", norm("norm", stream))
    graph.write(
        file,
        {"inputs": (torch.int64, ("batch", "length"))},
        logits,
        ("batch", "length", shape.vocabulary),
        OPSET[writer.encoding],
    )


def _activation(graph: OnnxGraph, layer: nn.Module, inputs: str) -> str:
    if isinstance(layer, nn.SiLU):
        return graph.node("Mul", [inputs, graph.node("Sigmoid", [inputs])])
    operators = {nn.ReLU: "Relu", nn.GELU: "Gelu", nn.Tanh: "Tanh"}
    return graph.node(operators[type(layer)], [inputs])


def _write_mlp(model: Mlp, writer: _Writer, file: Path) -> None:
    graph, result = writer.graph, "inputs"
    first = model.layers[0]
    assert isinstance(first, nn.Linear)
    dtype, width = torch.float32, first.in_features
    if model.embedding is not None:
        dtype, width = torch.int64, first.in_features // model.embedding.embedding_dim
        table = graph.constant("embedding.weight", model.embedding.weight.detach().float())
        result = graph.node("Flatten", [graph.node("Gather", [table, result])], axis=1)
    outputs = 0
    for index, layer in enumerate(model.layers):
        if isinstance(layer, nn.Linear):
            result = writer.linear(f"layers.{index}", layer, result)
            outputs = layer.out_features
        elif not isinstance(layer, nn.Dropout):
            result = _activation(graph, layer, result)
    graph.write(
        file, {"inputs": (dtype, ("batch", width))}, result, ("batch", outputs),
        OPSET[writer.encoding],
    )  # fmt: skip


_WRITERS: Final[dict[type[nn.Module], Callable[..., None]]] = {
    Llama: _write_llama,
    Mlp: _write_mlp,
}


def check_onnx(model: nn.Module, encoding: Encoding) -> Callable[..., None]:
    """Refuse, before anything is trained, what cannot be written.

    Returns:
        What writes such a network.

    Raises:
        ValueError: another architecture, no ternary layer, or a layer that the encoding cannot
            hold.
    """
    write = _WRITERS.get(type(model))
    if write is None:
        known = " and ".join(sorted(kind.__name__ for kind in _WRITERS))
        raise ValueError(
            f"{type(model).__name__} is no architecture that this exporter knows: it writes "
            f"{known}; use model: {{use: llama_decoder}} or {{use: mlp}}, or export with "
            "packed_ternary"
        )
    _ = check_layers(model)
    for name, layer in need_grid_layers(model).items():
        bits = layer.scheme.activation_bits
        if bits != 8 and encoding == "matmul_integer":
            raise ValueError(
                f"{name} has {bits}-bit activations, which MatMulInteger cannot take: choose the "
                "weights matmul_nbits, or train with 8 bits"
            )
    return write


def write_onnx(model: nn.Module, encoding: Encoding, file: Path) -> int:
    """Write a network.

    Args:
        model: a `Llama` or an `Mlp` with ternary layers.
        encoding: of their weights.
        file: to write.

    Returns:
        The version of the standard operators that the file needs.

    Raises:
        ValueError: see `check_onnx`; or a layer that is not on its levels yet.
    """
    write = check_onnx(model, encoding)
    write(model, _Writer(model, encoding), file)
    return OPSET[encoding]


def onnx_numbers(model: nn.Module, encoding: Encoding) -> dict[str, Tensor]:
    """The numbers that the weights of a file stand for, fp32, by their names in the state.

    Raises:
        ValueError: see `write_onnx`.
    """
    result = {name: value.detach().float().cpu() for name, value in applied_state(model).items()}
    for name, layer in read_layers(model).items():
        if encoding == "matmul_integer":
            result[f"{name}.weight"], result[f"{name}.scale"] = layer.applied, layer.scale
        else:
            result[f"{name}.weight"] = layer.levels.float() * (1.0 / layer.scale)
    return result
