"""What the loop is made of, each part by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from forge_kernel.errors import PluginError
from forge_kernel.exports import write_exports
from forge_kernel.group_rates import GroupRates
from forge_kernel.loss_scale import LossScale
from forge_kernel.state import Rates


def count(scale: LossScale, steps: int) -> float:
    for _ in range(steps):
        scale.count_finite()
    return scale.value


def test_the_loss_scale_doubles_after_2000_clean_steps_counted_from_its_last_change() -> None:
    scale = LossScale("fp16")
    assert count(scale, 1999) == 65536.0
    assert scale.back_off()
    assert scale.value == 32768.0
    assert count(scale, 1999) == 32768.0
    assert count(scale, 1) == 65536.0
    assert count(scale, 1999) == 65536.0
    assert count(scale, 1) == 131072.0


def test_the_loss_scale_ends_at_one_and_then_it_is_not_its_fault() -> None:
    scale = LossScale("fp16")
    halvings = 0
    while scale.back_off():
        halvings += 1
    assert (halvings, scale.value) == (16, 1.0)
    assert count(scale, 2000) == 2.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_scale(precision: str) -> None:
    scale = LossScale(precision)
    assert not scale.back_off()
    assert count(scale, 2000) == 1.0


def groups() -> list[dict[str, object]]:
    return [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1},
    ]


def test_factors_multiply_the_first_rates_and_momenta() -> None:
    optimizer = torch.optim.Adam(groups(), betas=(0.8, 0.95))
    rates = GroupRates(optimizer)
    rates.write(Rates(0.25, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.4, 0.95)] * 2
    rates.write(Rates((0.5, 2.0), (1.0, 0.25)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.8, 0.2]
    sgd = torch.optim.SGD(groups(), momentum=0.5)
    GroupRates(sgd).write(Rates(1.0, 0.5))
    assert [group["momentum"] for group in sgd.param_groups] == [0.25, 0.25]


def test_factors_that_do_not_fit_are_refused() -> None:
    rates = GroupRates(torch.optim.Adam(groups()))
    with pytest.raises(PluginError, match="3 factors for 2 groups"):
        rates.write(Rates((1.0, 1.0, 1.0)))
    with pytest.raises(PluginError, match="1 factors for 2 groups"):
        rates.write(Rates(1.0, (1.0,)))
    with pytest.raises(PluginError, match="the optimizer has none"):
        GroupRates(torch.optim.Adagrad(groups())).write(Rates(1.0, 0.5))


def test_two_exporters_of_one_name_get_a_folder_each(tmp_path: Path) -> None:
    def fill(text: str) -> object:
        def write(folder: Path) -> dict[str, str]:
            (folder / "weights.txt").write_text(text)
            return {"what": text}

        return write

    written, failed = write_exports(
        tmp_path, [("onnx", fill("a")), ("onnx", fill("b")), ("gguf", fill("c"))]
    )
    texts = {name: (tmp_path / at / "weights.txt").read_text() for name, at in written.items()}
    assert texts == {"onnx": "a", "onnx_": "b", "gguf": "c"}
    assert failed == {}
