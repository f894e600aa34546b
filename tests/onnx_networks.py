"""Small networks on every kind of levels, and onnxruntime in this process: an export costs a second."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import VOCABULARY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from forge_kernel.errors import PluginError
from forge_plugins.clients import (
    onnxruntime_logits,
    onnxruntime_weights,
    reading,
    verification,
)
from forge_plugins.clients.verification import Client
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.networks.transformer import Decoder
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import (
    convert_linears,
    convert_model_to_bitnet,
)
from forge_plugins.mathematics.quantization.scheme import Scheme

ENCODINGS = ["matmul_nbits", "int2", "matmul_integer"]
MODULES = {
    one.__name__.rpartition(".")[2]: one for one in (onnxruntime_logits, onnxruntime_weights)
}

# torch reads its table of 500 operators anew for each export, which is a third of a small one
_registration.ONNXRegistry.from_torchlib = staticmethod(  # type: ignore[method-assign]
    functools.cache(_registration.ONNXRegistry.from_torchlib)
)


def answer_here(client: Client, export: Path, request: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `answer_of` gives, without a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        asked, answer = f"{place}/request", f"{place}/answer"
        save_file({name: tensor.contiguous() for name, tensor in request.items()}, asked)
        try:
            MODULES[client.module].main(str(export), asked, answer)
        except Exception as error:
            raise PluginError(f"{client.packages[0]} cannot run {export.name}: {error}") from error
        return load_file(answer)


def ask_here(patch: pytest.MonkeyPatch) -> None:
    """Let exporters ask onnxruntime in this process."""
    for module in (verification, reading):
        patch.setattr(module, "answer_of", answer_here)


class Convolutions(nn.Module):
    """With running statistics, dropout, groups, and two ways to fill the margin."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding="same")
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(
            16, 32, (3, 5), stride=2, padding=(1, 2), groups=4, padding_mode="reflect", bias=False
        )
        self.third = nn.Conv2d(32, 64, 3, dilation=(2, 1), padding=(2, 1))
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(64, 10)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(inputs)))
        hidden = torch.relu(self.third(torch.relu(self.second(hidden))))
        return self.last(self.dropout(hidden).amax((2, 3)))


def on_levels(model: nn.Module, schemes: Iterator[Scheme], *skip: str) -> nn.Module:
    """Each quantized layer with the next scheme; biases and norms do something; in training."""
    convert_model_to_bitnet(model, Scheme(), convolutions=True, skip=skip)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    for layer in model.modules():
        if isinstance(layer, BitLayer):
            layer.configure(next(schemes))
    return model.train()


def perceptron() -> tuple[nn.Module, Tensor]:
    """Rows that fill no byte and no block, and each kind of levels by tensor, row and group."""
    kinds = [
        (129, 130, Scheme()), (130, 1, Scheme(weight_bits=1)), (1, 7, Scheme(weight_bits=1)),
        (7, 96, Scheme(weight_bits=2)),
        (96, 160, Scheme(weight_bits=1, granularity="group", group_size=32)),
        (160, 99, Scheme(weight_bits=4, granularity="group", group_size=10)),
        (99, 257, Scheme(weight_bits=8, granularity="row", activation_bits=4)),
        (257, 33, Scheme(granularity="row", activation_granularity="tensor")),
    ]  # fmt: skip
    layers = [BitLinear(rows, columns, scheme=scheme) for rows, columns, scheme in kinds]
    return nn.Sequential(*layers, nn.Dropout(0.5)).train(), torch.randn(7, 129)


def convolutions() -> tuple[nn.Module, Tensor]:
    schemes = [
        Scheme(), Scheme(weight_bits=1, granularity="row"),
        Scheme(weight_bits=8, activation_granularity="tensor"), Scheme(weight_bits=4),
    ]  # fmt: skip
    return on_levels(Convolutions(), iter(schemes)), torch.randn(7, 3, 12, 12)


def showcase() -> tuple[nn.Module, Tensor]:
    """`pipelines/bitnet_grokfast.yaml`, narrow and of one block."""
    model = Decoder(vocabulary=99, classes=97, length=8, width=64, layers=1, heads=4, dropout=0.1)
    schemes = [
        Scheme(weight_bits=bits, granularity="row" if bits == 8 else "tensor")
        for bits in (1.58, 1, 2, 8, 4, 8)
    ]
    return on_levels(model, iter(schemes), "head"), torch.randint(99, (7, 4))


def llama() -> tuple[nn.Module, Tensor]:
    """`pipelines/char_llama_gguf.yaml`, narrow and of one block, with all that a shape can have.

    The perceptron stays plain: an export takes time for each layer.
    """
    shape = LlamaShape(
        vocabulary=VOCABULARY, context=64, width=64, layers=1, heads=4, groups=2, hidden=96,
        sub_norms=True, activation="relu2", tied=True, attention_bias=True, feed_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    schemes = [Scheme(granularity="group", group_size=16), *[Scheme(granularity="row")] * 3]
    return on_levels(Llama(shape), iter(schemes), "head", "*feed.*"), torch.randint(
        VOCABULARY, (7, 5)
    )


NETWORKS: dict[str, Any] = {
    one.__name__: one for one in (perceptron, convolutions, showcase, llama)
}


def one_layer(columns: int = 8, rows: int = 16, **scheme: Any) -> nn.Module:
    """The smallest network."""
    torch.manual_seed(0)
    return convert_linears(nn.Linear(columns, rows), lambda name: True, Scheme(**scheme))[0]
