"""What the loop is made of, each part by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from forge_kernel.contract.values import ScheduleFactors
from forge_kernel.errors import PluginError
from forge_kernel.training.exports import write_exports
from forge_kernel.training.guards.finite_check import FiniteCheck
from forge_kernel.training.loss_scale import LossScale
from forge_kernel.training.param_group_schedule import ParamGroupSchedule


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
    rates = ParamGroupSchedule(optimizer)
    rates.write(ScheduleFactors(0.25, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.4, 0.95)] * 2
    rates.write(ScheduleFactors((0.5, 2.0), (1.0, 0.25)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.8, 0.2]
    sgd = torch.optim.SGD(groups(), momentum=0.5)
    ParamGroupSchedule(sgd).write(ScheduleFactors(1.0, 0.5))
    assert [group["momentum"] for group in sgd.param_groups] == [0.25, 0.25]


def test_a_rate_that_someone_else_wrote_is_set_again_where_the_factor_stays() -> None:
    """Red when a factor that has not changed is taken for a rate that nobody has changed."""
    optimizer = torch.optim.SGD(groups())
    rates = ParamGroupSchedule(optimizer)
    rates.write(ScheduleFactors(0.5))
    optimizer.param_groups[0]["lr"] = 9.0
    rates.write(ScheduleFactors(0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]


def test_factors_that_do_not_fit_are_refused() -> None:
    rates = ParamGroupSchedule(torch.optim.Adam(groups()))
    with pytest.raises(PluginError, match="3 factors for 2 groups"):
        rates.write(ScheduleFactors((1.0, 1.0, 1.0)))
    with pytest.raises(PluginError, match="1 factors for 2 groups"):
        rates.write(ScheduleFactors(1.0, (1.0,)))
    with pytest.raises(PluginError, match="the optimizer has none"):
        ParamGroupSchedule(torch.optim.Adagrad(groups())).write(ScheduleFactors(1.0, 0.5))


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


def test_an_exporter_that_fails_takes_no_other_one_with_it(tmp_path: Path) -> None:
    """Red when those after it are not written, or its half-written folder stays."""

    def write(folder: Path) -> dict[str, str]:
        (folder / "weights.txt").write_text("whole")
        return {}

    def fail(folder: Path) -> dict[str, str]:
        (folder / "weights.txt").write_text("half")
        raise ZeroDivisionError

    written, failed = write_exports(tmp_path, [("gguf", fail), ("gguf", write), ("onnx", write)])
    assert written == {"gguf_": "exports/gguf_", "onnx": "exports/onnx"}
    assert [(name, type(error)) for name, error in failed.items()] == [("gguf", ZeroDivisionError)]
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["gguf_", "onnx"]


@pytest.mark.parametrize("spoilt", [False, True])
def test_as_many_gradients_as_before_may_be_of_another_kind(spoilt: bool) -> None:
    """Red when the quick way goes by their number alone: a sparse one ends the run."""
    check = FiniteCheck(torch.device("cpu"))
    assert float(check.scale_and_check([torch.ones(2), torch.ones(3)], 1.0)) == 0.0
    row = torch.tensor([1.0, torch.nan if spoilt else 2.0])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), row, (4,), check_invariants=True)
    assert (float(check.scale_and_check([torch.ones(2), sparse], 1.0)) > 0) is spoilt


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the second stands for another than theirs
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("spoilt", [None, 0, 1, 2, 3, 4])
def test_gradients_of_several_kinds_are_scaled_and_looked_at_each(
    device: str, factor: float, spoilt: int | None
) -> None:
    """Red when one kind is left out, or one that is finite takes back what another told."""

    def gradients() -> list[torch.Tensor]:
        values = [torch.tensor([1.0, -2.0]) for _ in range(5)]
        if spoilt is not None:
            values[spoilt][1] = torch.inf
        single, double, half, *rows = values
        sparse = [
            torch.sparse_coo_tensor(torch.tensor([[0, 2]]), row, (4,), check_invariants=True)
            for row in rows
        ]
        return [single, double.double(), half.bfloat16(), *sparse]

    check, given, wanted = FiniteCheck(torch.device(device)), gradients(), gradients()
    for _ in range(2):
        told = check.scale_and_check(given, factor)
        wanted = [one * factor for one in wanted]
        assert (float(told) > 0) == (spoilt is not None)
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())
    check.clear()
    assert float(check.scale_and_check([torch.ones(2)], factor)) == 0.0
