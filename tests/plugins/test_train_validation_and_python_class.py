"""Data of two sources, a network by its Python class, early stopping that waits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import (
    UseCallback,
    UseData,
    UseLoss,
    UseModel,
    UseOptimizer,
    UseValidator,
)
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError, PluginError

FORMS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3, classes=2):
        super().__init__()
        self.first = nn.Linear(width, 4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(4, classes)

    def forward(self, inputs):
        return self.second(self.drop(self.first(inputs)))

def number():
    return 7
"""


def write(file: Path, labels: list[int], width: int = 3) -> str:
    rows = [
        {"input": [float(i + j) for j in range(width)], "target": t} for i, t in enumerate(labels)
    ]
    file.write_text(json.dumps(rows))
    return str(file)


def pipeline(data: Any, model: Any, **further: Any) -> PipelineConfig:
    settings = {"max_steps": 4, "device": "cpu", "validate_every": 2, **further.pop("run", {})}
    return PipelineConfig(
        run=RunConfig(**settings),
        data=data,
        model=model,
        optimizer=UseOptimizer("sgd", {"lr": 0.1}),
        loss=UseLoss("cross_entropy", {}),
        validators=(UseValidator("classification", {}),),
        **further,
    )


def two(training: str, validation: str, cache: Path) -> UseData[Any]:
    common = {"validation_split": 0.0, "cache_dir": str(cache)}
    parts = {"training": {"path": training, "batch_size": 2, **common},
             "validation": {"path": validation, "shuffle": False, **common}}  # fmt: skip
    return UseData("train_validation", {k: {"use": "file", "with": v} for k, v in parts.items()})


def test_one_file_is_trained_on_and_the_other_validated_with(tmp_path: Path) -> None:
    """Red when the validation of the first source is taken."""
    seen: dict[bool, set[float]] = {True: set(), False: set()}

    class Watch(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen[self.training] |= set(inputs[:, 0].tolist())
            return super().forward(inputs)

    rows = [{"input": [100.0 + i, 0.0, 0.0], "target": 2} for i in range(3)]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    data = two(write(tmp_path / "a.json", [0, 1, 0, 1, 0]), str(tmp_path / "b.json"), tmp_path)
    result = run(pipeline(data, None), model=Watch(3, 3), output_dir=tmp_path / "run", quiet=True)
    assert result.outcome == "completed"
    assert seen == {True: {0.0, 1.0, 2.0, 3.0, 4.0}, False: {100.0, 101.0, 102.0}}


def test_sources_whose_samples_differ_in_form_are_refused(tmp_path: Path) -> None:
    data = two(
        write(tmp_path / "a.json", [0, 1]), write(tmp_path / "b.json", [0, 1], width=5), tmp_path
    )
    with pytest.raises(
        PluginError, match="features is 3 in the training samples, and 5 in the others"
    ):
        run(pipeline(data, None), model=nn.Linear(3, 2), output_dir=tmp_path / "run", quiet=True)


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of networks that can be imported."""
    name = f"forms_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FORMS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)  # what lies here is the user's own
    yield name  # type: ignore[misc]
    sys.modules.pop(name, None)


def test_a_class_with_weights_is_the_live_model_with_them(tmp_path: Path, forms: str) -> None:
    """Red when what the class draws for itself moves the run's random stream."""
    import importlib

    live = importlib.import_module(forms).Net()
    save_model(live, str(tmp_path / "start.safetensors"))
    data = two(write(tmp_path / "a.json", [0, 1, 1]), write(tmp_path / "b.json", [0, 1]), tmp_path)
    named = UseModel(
        "python_class", {"factory": f"{forms}:Net", "state": str(tmp_path / "start.safetensors")}
    )
    found = run(pipeline(data, named), output_dir=tmp_path / "one", quiet=True).model
    run(pipeline(data, None), model=live, output_dir=tmp_path / "two", quiet=True)
    assert found is not None
    for name, value in live.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "{forms}:Missing"}, "cannot be imported"),
        ({"factory": "no_such_module:Net"}, "PYTHONPATH"),
        ({"factory": "{forms}:number"}, "is not the class of a network"),
        ({"factory": "{forms}:Net", "arguments": {"widht": 3}}, "widht"),
        ({"factory": "{forms}:Net", "state": "nothing.safetensors"}, "there is no file"),
    ],
)
def test_what_is_no_network_is_refused(
    tmp_path: Path, forms: str, settings: dict[str, Any], message: str
) -> None:
    named = {**settings, "factory": settings["factory"].format(forms=forms)}
    data = two(write(tmp_path / "a.json", [0, 1]), write(tmp_path / "b.json", [0, 1]), tmp_path)
    with pytest.raises(PluginError, match=message):
        run(pipeline(data, UseModel("python_class", named)), output_dir=tmp_path / "r", quiet=True)


def test_weights_of_another_network_are_refused(tmp_path: Path, forms: str) -> None:
    save_model(nn.Linear(2, 2), str(tmp_path / "other.safetensors"))
    settings = {"factory": f"{forms}:Net", "state": str(tmp_path / "other.safetensors")}
    data = two(write(tmp_path / "a.json", [0, 1]), write(tmp_path / "b.json", [0, 1]), tmp_path)
    with pytest.raises(PluginError, match="do not fit"):
        run(
            pipeline(data, UseModel("python_class", settings)),
            output_dir=tmp_path / "r",
            quiet=True,
        )


def test_a_factory_that_is_no_name_is_refused_with_the_file(tmp_path: Path) -> None:
    data = two(write(tmp_path / "a.json", [0, 1]), write(tmp_path / "b.json", [0, 1]), tmp_path)
    with pytest.raises(ConfigError, match="factory"):
        run(pipeline(data, UseModel("python_class", {"factory": "os.system"})), quiet=True)


def test_early_stopping_counts_nothing_before_its_step(tmp_path: Path) -> None:
    """Red when patience is lost during a warm-up."""
    data = two(write(tmp_path / "a.json", [0, 1]), write(tmp_path / "b.json", [0, 1]), tmp_path)
    stops = {}
    for wait in (0, 7):
        policy = UseCallback(
            "early_stopping", {"patience": 2, "min_delta": 1e9, "not_before": wait}
        )
        declared = pipeline(
            data, None, callbacks=(policy,), run={"max_steps": 50, "validate_every": 1}
        )
        made = run(declared, model=nn.Linear(3, 2), output_dir=tmp_path / str(wait), quiet=True)
        stops[wait] = made.steps
    assert stops == {0: 3, 7: 9}
