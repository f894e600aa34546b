"""The kernels of a GPU, run by Triton's interpreter: run by `tests/plugins/test_device_kernels.py`.

The interpreter rounds to bf16 by adding half, so ties differ; there the bits are compared on a
device (`tests/gpu`). Red when a kernel multiplies by 127 / x in one rounding, drops a NaN of a row,
reads beyond an edge as something else than zero, or takes one scale for all rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from forge_plugins.mathematics.quantization import (
    device_kernels,
    quantized_linear,
    quantizers,
    triton_kernels,
)
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.scheme import Scheme

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(7, 100), (33, 1), (3, 5, 257), (1, 64)]


def near(found: Any, wanted: Any, dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return torch.allclose(found, wanted, rtol=2.0**-7, atol=0)
    return torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("bits", "shape", "dtype"),
    [  # each pair of two choices; what is left of the product is deep
        pytest.param(bits, shape, dtype, marks=[pytest.mark.deep] * ((at + row + column) % 2))
        for at, bits in enumerate((4, 8))
        for row, shape in enumerate(SHAPES)
        for column, dtype in enumerate(TYPES)
    ],
)
def test_rows_go_on_the_grid_of_the_plain_form(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    torch.manual_seed(0)
    scheme = Scheme(activation_bits=bits)
    inputs = (torch.randn(shape) * 3).to(dtype)
    levels, scale, values = triton_kernels.quantized_rows(
        inputs, scheme.activation_qmax, as_int8=True, dtype=torch.float32
    )
    wanted, wanted_scale = quantizers.activation_levels(inputs, scheme)
    assert torch.equal(levels, wanted)
    assert torch.equal(scale, wanted_scale)
    assert near(values, quantizers.activation_values(inputs, scheme, torch.float32), dtype)
    alone = triton_kernels.quantized_rows(
        inputs, scheme.activation_qmax, as_int8=False, dtype=torch.float32
    )
    assert alone[:2] == (None, None)
    assert torch.equal(alone[2], values)


def test_rows_may_lie_apart_and_columns_too() -> None:
    whole = torch.randn(12, 40)
    for inputs in (whole[:, 3:20], whole.t(), whole[::2, ::2]):
        found = triton_kernels.quantized_rows(inputs, 127, as_int8=True, dtype=None)
        wanted = quantizers.activation_levels(inputs.contiguous(), Scheme())
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy stands for the device
def test_a_number_that_is_none_reaches_the_scale_of_its_row_alone() -> None:
    inputs = torch.randn(4, 50)
    inputs[1, 3], inputs[2, 4] = float("nan"), float("inf")
    scale = triton_kernels.quantized_rows(inputs, 127, as_int8=True, dtype=None)[1]
    wanted = quantizers.activation_scale(inputs)
    assert torch.equal(scale.isnan(), wanted.isnan())
    assert torch.equal(scale[[0, 2, 3]], wanted[[0, 2, 3]])
    lost = triton_kernels.weight_on_grid(inputs, None, 1, as_int8=False, dtype=torch.float32)
    assert lost[2].isnan()
    assert lost[0].isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [1.58, 2, 4, 8])
def test_a_weight_goes_on_the_grid_of_the_plain_form(dtype: torch.dtype, bits: float) -> None:
    torch.manual_seed(0)
    scheme = Scheme(weight_bits=bits)
    weight = (torch.randn(50, 70) * 0.02).to(dtype)
    scale = quantizers.weight_scale(weight, scheme)
    wanted = quantizers.nearest_levels(quantizers.in_levels(weight, scale, scheme), scheme)
    applied, levels, same = triton_kernels.weight_on_grid(
        weight, scale, scheme.qmax, as_int8=True, dtype=torch.float32
    )
    assert same is scale
    assert torch.equal(levels, wanted.to(torch.int8))
    assert near(applied, (wanted / scale).to(dtype).float(), dtype)
    if scheme.step_from == "absmean":
        own = triton_kernels.weight_on_grid(weight, None, scheme.qmax, as_int8=True, dtype=None)
        # the order of a sum is the device's own
        assert torch.allclose(own[2], scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("tiles", "shape"),
    [
        (False, (70, 112, 48)), (True, (70, 112, 48)), (False, (17, 16, 8)), (True, (17, 16, 8)),
        (False, (130, 144, 272)), (True, (300, 256, 304)),
        pytest.param(True, (130, 144, 272), marks=pytest.mark.deep),
        pytest.param(False, (300, 256, 304), marks=pytest.mark.deep),
    ],
)  # fmt: skip
def test_the_product_is_the_plain_one_to_the_bit(
    tiles: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "_fetches_tiles", lambda *_: tiles)
    torch.manual_seed(0)
    rows, width, out = shape
    values = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    levels = torch.randint(-1, 2, (out, width), dtype=torch.int8)
    each, bias = torch.rand(rows, 1) + 0.5, torch.randn(out)
    for scale in (torch.tensor(3.7), torch.rand(out, 1) + 0.5):
        for value_scale in (each, each[0, 0]):
            for added in (None, bias):
                arguments = (values, value_scale, levels, scale, added, torch.float32)
                found = triton_kernels.integer_linear(*arguments)
                assert torch.equal(found, device_kernels.scaled_product(*arguments))


def test_a_product_of_odd_shapes_needs_no_tiles() -> None:
    torch.manual_seed(0)
    values = torch.randint(-127, 128, (19, 33), dtype=torch.int8)
    levels = torch.randint(-1, 2, (7, 33), dtype=torch.int8)
    found = triton_kernels.integer_linear(
        values, torch.tensor(2.0), levels, torch.tensor(3.0), None, torch.float32
    )
    assert torch.equal(found, (values.int() @ levels.int().t()) * (1.0 / torch.tensor(6.0)))


def test_levels_become_values() -> None:
    levels = torch.randint(-127, 128, (9, 3000), dtype=torch.int8)
    for scale in (torch.rand(9, 1) + 0.5, torch.tensor(1.7)):
        found = triton_kernels.dequantized_rows(levels, scale, torch.float32)
        assert torch.equal(found, levels.float() / scale)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on the CPU take the kernels, as they do on a GPU."""
    monkeypatch.setattr(device_kernels, "_why_not", lambda _: "")
    device_kernels._of.cache_clear()
    assert device_kernels.has_kernels("cpu")
    yield
    monkeypatch.undo()
    device_kernels._of.cache_clear()
    assert not device_kernels.has_kernels("cpu")


def step(layer: Any, inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    wanted = torch.autograd.grad(outputs.square().sum(), [inputs, *layer.parameters()])
    return [outputs.detach(), *wanted]


@pytest.mark.parametrize(  # the first trace alone takes ten seconds
    "traced",
    [
        pytest.param(False, id="eager"),
        pytest.param(True, id="traced", marks=pytest.mark.deep),
    ],
)
@pytest.mark.parametrize(
    ("arithmetic", "distance"),
    [("exact", 1e-5), ("int8", 1e-5), ("int8_bf16_backward", 1e-2), ("int8_backward", 1e-4)],
)
def test_a_layer_by_kernels_is_the_plain_layer(
    arithmetic: Any, distance: float, traced: bool, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    layer = BitLinear(64, 48, scheme=Scheme(arithmetic=arithmetic))
    inputs = torch.randn(3, 40, 64)
    quantized_linear.lacks_int8("cpu")
    device_kernels._of("cpu")
    plain = step(layer, inputs)
    request.getfixturevalue("by_kernels")
    calls = []
    real = triton_kernels.integer_linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_kernels, "integer_linear", lambda *them: calls.append(them) or real(*them)
        )
        found = step(torch.compile(layer, fullgraph=True) if traced else layer, inputs)
    taken = arithmetic != "exact" and quantized_linear.multiplies_integers("cpu")
    assert bool(calls) is taken
    for one, other in zip(found, plain, strict=True):
        assert (one - other).norm() <= distance * other.norm()
