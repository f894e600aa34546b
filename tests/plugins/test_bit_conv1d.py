"""The transposed layer of GPT-2 on few levels: the same numbers as a plain layer, stored as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import library
from safetensors.torch import load_file
from torch import Tensor, nn

from forge_plugins.interchange.grid_weight import applied_state
from forge_plugins.interchange.packed_ternary import pack_model, read_packed, write_packed
from forge_plugins.mathematics.quantization.bit_conv1d import BitConv1D
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.scheme import Scheme

SCHEMES: dict[str, dict[str, Any]] = {
    "ternary": {},
    "binary": {"weight_bits": 1},
    "four bits": {"weight_bits": 4},
    "rows": {"granularity": "row"},
    "groups": {"granularity": "group", "group_size": 4},
    "median": {"scale_statistic": "absmedian"},
    "borders": {"rounding": "learned_threshold"},
    "clipped": {"ste": "clipped"},
    "integers": {"arithmetic": "int8"},
    "integers both ways": {"arithmetic": "int8_backward"},
    "torchao": {"parity": "torchao"},
}


def pair(**scheme: Any) -> tuple[Any, BitLinear]:
    """A converted transposed layer and a plain one with the same numbers."""
    library()
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    theirs = Conv1D(24, 16)
    nn.init.normal_(theirs.bias)
    plain = nn.Linear(16, 24)
    plain.load_state_dict({"weight": theirs.weight.t().contiguous(), "bias": theirs.bias})
    model, report = convert_model_to_bitnet(nn.Sequential(theirs), Scheme(**scheme))
    assert isinstance(model[0], BitConv1D)
    assert set(report.layers) == {"0"}
    return model[0], BitLinear.from_linear(plain, Scheme(**scheme))


def passed(
    layer: nn.Module, inputs: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    outputs.backward(upstream)
    assert inputs.grad is not None
    return outputs.detach(), inputs.grad, {name: one.grad for name, one in layer.named_parameters()}


@pytest.mark.parametrize("name", SCHEMES)
def test_forward_and_backward_are_those_of_a_plain_layer(name: str) -> None:
    """Planted: the gradient of the parameter left untransposed."""
    mine, plain = pair(**SCHEMES[name])
    inputs, upstream = torch.randn(5, 16), torch.randn(5, 24)
    outputs, to_inputs, gradients = passed(mine, inputs, upstream)
    wanted, wanted_to_inputs, wanted_gradients = passed(plain, inputs, upstream)
    torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_inputs, wanted_to_inputs, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted_gradients.keys()
    gradients["weight"] = gradients["weight"].t()
    for key, value in wanted_gradients.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(inputs), wanted, rtol=1e-5, atol=1e-6)


def test_the_kept_weight_of_evaluation_is_that_of_the_parameter_now() -> None:
    mine, _ = pair()
    inputs = torch.randn(5, 16)
    with torch.no_grad():
        before = mine.eval()(inputs)
        assert torch.equal(mine(inputs), before)
        assert mine.weight_cache.evaluated
        mine._parameters["weight"].mul_(-1.0)
        assert not torch.equal(mine(inputs), before)


def test_a_weight_on_its_levels_is_trained_on_from_there() -> None:
    mine, _ = pair()
    applied = mine.applied_weight()
    library()
    from transformers.pytorch_utils import Conv1D

    theirs = Conv1D(24, 16)
    theirs.weight.data.copy_(applied.t())
    model, report = convert_model_to_bitnet(nn.Sequential(theirs))
    assert report.origins == {"0": "grid"}
    assert torch.equal(model[0].applied_weight(), applied)


def test_copies_and_files_have_the_parameter_as_it_was(tmp_path: Path) -> None:
    mine, _ = pair()
    model = nn.Sequential(mine)
    assert model.state_dict()["0.weight"].shape == (16, 24)
    assert model.state_dict()["0.weight"].is_contiguous()
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again[0].applied_weight(), mine.applied_weight())
    state = applied_state(model)
    assert torch.equal(state["0.weight"], mine.applied_weight().t())
    tensors, contents = pack_model(model)
    write_packed(tmp_path / "packed.safetensors", tensors, contents)
    read = read_packed(tmp_path / "packed.safetensors")
    assert torch.equal(read["0.weight"], state["0.weight"])
    assert load_file(tmp_path / "packed.safetensors")["0.weight.levels"].numel() == 16 * 24 / 4


def test_another_layer_of_that_name_stays() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    _, report = convert_model_to_bitnet(nn.Sequential(Conv1D(), nn.Linear(4, 4)))
    assert set(report.layers) == {"1"}
    assert "Conv1D holds parameters of its own" in report.left["0"]


def test_scales_by_row_have_no_place_in_a_packed_file_of_transposed_weights() -> None:
    mine, _ = pair(granularity="row")
    with pytest.raises(
        ValueError, match="0.weight is stored transposed, and has a scale for each row"
    ):
        pack_model(nn.Sequential(mine))
