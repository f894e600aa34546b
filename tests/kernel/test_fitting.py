"""Training in one call: samples as a program holds them, and what the result shows of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from forge_kernel import as_data, fit, resume
from forge_kernel.errors import ConfigError, RunError

DRAWS = np.random.default_rng(0)
INPUTS = DRAWS.normal(size=(300, 6))
TARGETS = (INPUTS[:, 0] * INPUTS[:, 1] > 0).astype(int)
QUICK: dict[str, Any] = {"steps": 6, "quiet": True}


def model(out: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, out))


class Pairs(Dataset[Any]):
    """Counts what is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        self.asked.append(number)
        return torch.from_numpy(INPUTS[number]).float(), int(TARGETS[number])


class Frame:
    """As much of a data frame as is read: columns, a column, the rest, its types and numbers."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = {name: np.asarray(column) for name, column in columns.items()}
        self.columns = list(columns)
        self.dtypes = {name: column.dtype for name, column in self._columns.items()}

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def drop(self, *, columns: list[str]) -> Frame:
        return Frame({name: x for name, x in self._columns.items() if name not in columns})

    def to_numpy(self) -> Any:
        return np.stack(list(self._columns.values()), 1)

    __array__ = lambda self, *_, **__: self.to_numpy()  # noqa: E731


FRAME = {**{f"x{index}": INPUTS[:, index] for index in range(6)}, "y": TARGETS}


@pytest.mark.parametrize("form", ["arrays", "tensors", "frame", "dataset"])
def test_each_form_gives_the_same_run(form: str, tmp_path: Path) -> None:
    """Planted: another share, another order, a sample of the validation that is trained on."""
    data: Any = {
        "arrays": (INPUTS, TARGETS),
        "tensors": (torch.from_numpy(INPUTS), torch.from_numpy(TARGETS)),
        "frame": Frame(FRAME),
        "dataset": Pairs(),
    }[form]
    target = "y" if form == "frame" else None
    result = fit(model(), data, target=target, output_dir=tmp_path / "run", **QUICK)
    plain = fit(model(), (INPUTS, TARGETS), output_dir=tmp_path / "plain", **QUICK)
    assert result.final["validation_loss"] == pytest.approx(
        plain.final["validation_loss"], abs=1e-6
    )
    assert result.final["loss"] == pytest.approx(plain.final["loss"], abs=1e-6)
    made = as_data(data, target=target, batch_size=50)
    kept = torch.cat([batch.inputs for batch in made.batches(0, 0)])
    held_out = torch.cat([batch.inputs for batch in made.validation()])
    assert (len(kept), len(held_out)) == (240, 60)
    rows = {tuple(row) for row in torch.cat([kept, held_out]).tolist()}
    assert len(rows) == 300
    assert not {tuple(row) for row in kept.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_a_dataset_is_asked_for_no_more_than_is_needed_and_goes_on_exactly(tmp_path: Path) -> None:
    """Planted: a resume that draws the epoch from its beginning."""
    whole = fit(model(), Pairs(), output_dir=tmp_path / "whole", batch_size=32, **QUICK)
    part = fit(
        model(), Pairs(), output_dir=tmp_path / "part", batch_size=32, steps=4, quiet=True,
        settings=["run.validate_every=null"],
    )  # fmt: skip
    assert part.folder is not None
    pairs = Pairs()
    again = resume(
        part.folder, ["run.max_steps=6"], quiet=True,
        model=model(), data=as_data(pairs, batch_size=32),
    )  # fmt: skip
    assert len(pairs.asked) == 2 * 32 + 60
    assert whole.model is not None
    assert again.model is not None
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_samples_of_their_own_validate(tmp_path: Path) -> None:
    made = as_data((INPUTS, TARGETS), validation=(INPUTS[:7], TARGETS[:7]))
    assert sum(len(batch.inputs) for batch in made.validation()) == 7
    assert sum(len(batch.inputs) for batch in made.batches(0, 0)) == 300
    made = as_data(Pairs(), validation=Pairs(), batch_size=100)
    assert sum(len(batch.inputs) for batch in made.validation()) == 300
    assert not as_data((INPUTS, TARGETS), validation=None).has_validation  # type: ignore[attr-defined]
    loader = DataLoader(
        TensorDataset(torch.from_numpy(INPUTS).float(), torch.from_numpy(TARGETS)), batch_size=10
    )
    result = fit(model(), (loader, loader), output_dir=tmp_path / "run", **QUICK)
    assert result.steps == 6


def test_sections_are_named_as_briefly_as_can_be(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = fit(
        model(1), (INPUTS, INPUTS[:, :1]), loss="regression", validators="regression",
        optimizer={"use": "sgd", "with": {"lr": 0.05}}, quantizer="bitnet", gradients=["clip_norm"],
        epochs=2, output_dir=tmp_path / "run", quiet=True, settings=["run.log_every=1"],
    )  # fmt: skip
    assert result.epochs == 2
    assert "validation_r2" in result.final
    config = (tmp_path / "run/config.yaml").read_text()
    assert "use: sgd" in config
    assert "clip_norm" in config
    plain = fit(model(1), (INPUTS, INPUTS[:, :1]), loss="regression", **QUICK)
    assert {name for name in plain.final if "validation" in name} == {"validation_loss"}
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        fit(model(), (INPUTS, TARGETS), optimiser="sgd", **QUICK)


def test_the_result_has_its_history_and_draws_it(tmp_path: Path) -> None:
    """Planted: validations under the training's names; rows out of step."""
    result = fit(
        model(), (INPUTS, TARGETS), output_dir=tmp_path / "run", quiet=True, steps=8,
        settings=["run.log_every=2", "run.validate_every=4"],
    )  # fmt: skip
    history = result.history
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["loss"] for line in lines if line["kind"] == "log"}
    assert history["step"] == [2, 4, 6, 8]
    assert history["loss"] == [logged[step] for step in (2, 4, 6, 8)]
    assert [value is None for value in history["validation_accuracy"]] == [True, False, True, False]
    assert history["validation_accuracy"][-1] == result.final["validation_accuracy"]
    charts = result.plot("loss", "validation_accuracy")
    assert "<svg" in charts.page
    assert "grad_norm" not in charts.page
    assert "Gradient norm" not in charts.page
    assert "<script" not in charts._repr_html_()
    assert charts.save(tmp_path / "c.html").read_text() == charts.page
    assert "completed" in result._repr_html_()
    with pytest.raises(RunError, match="no metric 'acuracy'; there is .*validation_accuracy"):
        result.plot("acuracy")


def test_a_call_again_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {fit(model(), (INPUTS, TARGETS), **QUICK).folder for _ in range(2)}
    assert len(folders) == 2


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "other length": ((INPUTS, TARGETS[:5]), {}, "not as many samples"),
    "words": ((INPUTS, np.array(["a"] * 300)), {}, "not of numbers.*np.unique"),
    "an array alone": (INPUTS, {}, "a ndarray is no samples"),
    "a gap": ((np.full((3, 6), np.nan), TARGETS[:3]), {}, "3 of 3 inputs hold no finite number"),
    "nothing": ((INPUTS[:0], TARGETS[:0]), {}, "not as many samples"),
    "no target": (Frame(FRAME), {}, "give target=COLUMN"),
    "another target": (Frame(FRAME), {"target": "z"}, "there is no column 'z'.*x0, x1"),
    "a column of words": (
        Frame({**FRAME, "name": ["a"] * 300}), {"target": "y"}, "the columns name hold no numbers",
    ),
    "everything held out": ((INPUTS, TARGETS), {"validation": 1.0}, "from 0 to below 1"),
    "no batch": ((INPUTS, TARGETS), {"batch_size": 0}, "batch_size 0"),
    "empty dataset": (TensorDataset(torch.empty(0, 2)), {}, "the dataset is empty"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_samples_is_refused_with_the_mend(what: str, tmp_path: Path) -> None:
    data, options, said = WRONG[what]
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        fit(model(), data, output_dir=tmp_path / "run", **options, **QUICK)
    assert not (tmp_path / "run").exists()
