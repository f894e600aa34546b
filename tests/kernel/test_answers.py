"""An answer that cannot be used is refused with its plugin, hook and place; others are not blamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel import run
from forge_kernel.api import Kind, LossTerm, ScheduleFactors
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.plugin import RULES
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ForgeError, PluginError
from forge_kernel.planning.pipeline_file import load_pipeline

HERE = Path(__file__).name


def refused(tmp_path: Path, plugin: Any, *settings: str) -> str:
    """All that is said of a run that the plugin ends."""
    plain = ["exporters=null", "callbacks=null", "run.max_steps=3", "run.log_every=1"]
    plain += [f"{kind}=null" for kind in (plugin.info.kind,) if RULES[kind].at_most == 1]
    with pytest.raises(ForgeError) as caught:
        run(
            load_pipeline("smoke", [*plain, *settings], live={plugin.info.kind}),
            plugins=[plugin], output_dir=tmp_path / "r", quiet=True,
        )  # fmt: skip
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def nothing_learned(self: Any, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
    return torch.tensor(1.0)


def whole_numbers(self: Any, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
    return torch.tensor([1])


def no_number(self: Any, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
    return outputs.sum() * float("nan")


@pytest.mark.parametrize("compute_loss", [nothing_learned, whole_numbers, no_number])
def test_a_loss_that_cannot_be_differentiated_is_named(tmp_path: Path, compute_loss: Any) -> None:
    """Red when torch's own error is all that is said."""
    place = f"{HERE}:{compute_loss.__code__.co_firstlineno}"
    said = refused(tmp_path, make_plugin("culprit", Kind.LOSS, compute_loss=compute_loss))
    assert "culprit (handed in) in compute_loss" in said
    assert place in said


@pytest.mark.parametrize("value", [1.0, "text", torch.zeros(2), torch.tensor(1.0)])
def test_a_term_of_the_weights_that_cannot_be_added_is_named(tmp_path: Path, value: Any) -> None:
    def regularize(self: Any, run: Any, step: Any) -> Any:
        return value

    said = refused(tmp_path, make_plugin("culprit", Kind.REGULARIZERS, regularize=regularize))
    assert "culprit (handed in) in regularize" in said


def test_a_term_that_is_no_number_is_seen_though_it_has_no_gradient(tmp_path: Path) -> None:
    """Red when the gradients alone are looked at: they are finite."""

    def regularize(self: Any, run: Any, step: Any) -> Any:
        return next(iter(run.parameters.values())).sum() * 0.0 + float("nan")

    said = refused(tmp_path, make_plugin("culprit", Kind.REGULARIZERS, regularize=regularize))
    assert "not finite" in said
    assert "the term of live.regularizers[0] culprit (handed in) in regularize" in said


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0, 10**400, "1"])
def test_a_factor_of_the_rate_that_is_no_number_is_named(tmp_path: Path, factor: Any) -> None:
    def compute_schedule_factors(self: Any, run: Any, step: Any) -> Any:
        return ScheduleFactors(1.0 if step.number < 3 else factor)

    plugin = make_plugin(
        "culprit", Kind.SCHEDULE, compute_schedule_factors=compute_schedule_factors
    )
    said = refused(tmp_path, plugin)
    assert "culprit (handed in) in compute_schedule_factors" in said


def test_outputs_that_no_loss_can_read_are_their_givers(tmp_path: Path) -> None:
    """Red when the loss is blamed, which only read them."""

    def compute_outputs(self: Any, run: Any, step: Any, batch: Any) -> Any:
        return "no tensor"

    plugin = make_plugin("culprit", Kind.CALLBACKS, compute_outputs=compute_outputs)
    said = refused(tmp_path, plugin)
    assert said.startswith("live.callbacks[0] culprit (handed in) in compute_outputs")
    assert "raised by" not in said


@pytest.mark.parametrize("weights", [[float("inf"), 1.0], [1.0], [float("nan"), 1.0]])
def test_weights_that_do_not_fit_the_terms_are_named(tmp_path: Path, weights: list[float]) -> None:
    """Red when an infinite weight is taken: no gradient would be left."""

    def compute_loss(self: Any, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        values = logits.flatten(1).float().square().mean(1)
        return [LossTerm(values), LossTerm(values)]

    plugin = make_plugin(
        "culprit", Kind.LOSS, compute_loss=compute_loss,
        compute_loss_weights=lambda self, run, batch: weights,
    )  # fmt: skip
    said = refused(tmp_path, plugin, "run.accumulate=2")
    assert "in compute_loss_weights" in said


def test_a_class_in_the_place_of_an_object_is_told(tmp_path: Path) -> None:
    def make_optimizer(self: Any, run: Any, parameters: Any) -> Any:
        return torch.optim.SGD

    plugin = make_plugin("culprit", Kind.OPTIMIZER, make_optimizer=make_optimizer)
    said = refused(tmp_path, plugin)
    assert "returned the class SGD (not an instance of it)" in said


@pytest.mark.parametrize("guilty", [0, 1])
def test_of_two_of_one_class_the_one_that_failed_is_named(tmp_path: Path, guilty: int) -> None:
    """Both wrap the model, the second one what the first one gave."""

    def transform_model(self: Any, run: Any, model: Any) -> Any:
        self.model = torch.nn.Sequential(model)
        self.given = model
        return self.model

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if self is twins[guilty]:
            raise ArithmeticError("planned")

    first = make_plugin(
        "twin", Kind.WRAPPERS, transform_model=transform_model, on_step_end=on_step_end
    )
    twins = [first, type(first)()]
    plain = load_pipeline("smoke", ("exporters=null", "callbacks=null", "run.max_steps=3"))
    with pytest.raises(ArithmeticError) as caught:
        run(plain, plugins=twins, output_dir=tmp_path / "r", quiet=True)
    assert twins[1].given is twins[0].model
    said = "\n".join(caught.value.__notes__)
    assert f"live.wrappers[{guilty}] twin (handed in) in on_step_end" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [(ArithmeticError, "planned"), (PluginError, "Metric.compute returned a list of 1")],
)
def test_an_error_in_an_object_that_a_plugin_gave_is_that_plugins(
    tmp_path: Path, error: Any, words: str
) -> None:
    """Red when only frames of hooks are looked at: a metric's are none."""

    class Fine:
        def reset(self) -> None: ...

        def update(self, *_: Any) -> None: ...

        def compute(self, add: Any) -> Any:
            return {}

    class Metric(Fine):
        def update(self, *_: Any) -> None:
            if error is ArithmeticError:
                raise ArithmeticError("planned")

        def compute(self, add: Any) -> Any:
            return [0.5]

    plugin = make_plugin(
        "culprit", Kind.VALIDATORS, make_metrics=lambda self, run: [Fine(), Metric()]
    )
    plain = ("exporters=null", "callbacks=null", "run.max_steps=3")
    with pytest.raises(error) as caught:
        run(load_pipeline("smoke", plain), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert words in said
    assert "culprit (handed in) in make_metrics" in said
    assert HERE in said


def test_an_error_in_the_model_is_that_of_the_plugin_that_called_it() -> None:
    """Red when it is the model's giver's: a model is called by everyone."""

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        run.model("no batch")

    culprit = make_plugin("culprit", Kind.CALLBACKS, on_step_end=on_step_end)
    data = [Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))]
    session = make_session(nn.Linear(3, 3), data, plugins=[culprit])
    with pytest.raises(TypeError) as caught:
        session.train()
    blamed = session.bus.blame(caught.value.__traceback__)
    assert blamed == ("live.callbacks[0] culprit", "on_step_end")


def test_an_error_in_data_is_that_of_who_made_them() -> None:
    """Red when it is that of a plugin that has let them pass."""

    class Data:
        spec = DataSpec(classes=3)
        batches_per_epoch = 1

        def batches(self, epoch: int, place: int) -> Any:
            raise ArithmeticError("planned")

        def validation(self) -> list[Any]:
            return []

    passing = make_plugin("passing", Kind.CALLBACKS, transform_data=lambda self, run, data: data)
    session = make_session(nn.Linear(3, 3), Data(), plugins=[passing])
    with pytest.raises(ArithmeticError) as caught:
        session.train()
    assert session.bus.blame(caught.value.__traceback__) == ("live.data[0] live_data", "make_data")


def test_the_policy_counts_for_a_loss_that_is_no_number(tmp_path: Path) -> None:
    """Red when the answer is refused where the user wants such steps skipped."""

    def compute_loss(self: Any, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        factor = float("nan") if run.progress.skipped == 0 else 1.0
        return logits.float().square().mean() * factor

    plain = ["exporters=null", "callbacks=null", "run.max_steps=3", "run.non_finite=skip"]
    plain += ["loss=null"]
    result = run(
        load_pipeline("smoke", plain, live={Kind.LOSS}),
        plugins=[make_plugin("picky", Kind.LOSS, compute_loss=compute_loss)],
        output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert result.outcome == "completed"
    assert isinstance(result.model, nn.Module)
