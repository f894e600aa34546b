"""Run folders that earlier versions wrote go on, and are exported, as they would have been."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forge_kernel import resume
from forge_kernel.errors import ConfigError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.runner import export, recorded_pipeline

GOLDEN = Path(__file__).parent.parent / "golden"
CONTINUED = {"run-0.1.0-a": 3.1603357791900635}
"""Validation losses after four more steps, by the version that wrote the folder."""


@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_of_an_earlier_version_is_resumed_and_exported(tmp_path: Path, name: str) -> None:
    """Its filters, averages, schedule and early stopping go on; settings are where they are today."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    assert export(folder, "state_dict")
    result = resume(folder, ["run.max_steps=8"], quiet=True)
    assert result.steps == 8
    assert result.final["validation_loss"] == pytest.approx(CONTINUED[name], rel=1e-6)
    assert "ignore_index: 3" in (folder / "config.yaml").read_text()


def index_of(folder: Path, of_loss: str, of_validator: str, *settings: str) -> int:
    """The `run.ignore_index` of a folder whose parts had an `ignore` of their own."""
    shutil.copytree(GOLDEN / "run-0.1.0-a", folder, dirs_exist_ok=True)
    first, then, last = (folder / "config.yaml").read_text().split("ignore: 3")
    text = f"{first}ignore: {of_loss}{then}ignore: {of_validator}{last}"
    (folder / "config.yaml").write_text(text)
    return recorded_pipeline(folder, settings, (), Catalog.installed(), ()).run.ignore_index


@pytest.mark.parametrize(
    ("of_loss", "of_validator", "expected"),
    [("5", "5", 5), ("5", "null", 5), ("null", "5", 5), ("null", "null", -100)],
)
def test_a_setting_that_moved_to_the_run_comes_from_whichever_part_had_it(
    tmp_path: Path, of_loss: str, of_validator: str, expected: int
) -> None:
    """Red when the parts after the first are not looked at, or a null is taken for a value."""
    assert index_of(tmp_path, of_loss, of_validator) == expected
    assert index_of(tmp_path, of_loss, of_validator, "run.ignore_index=7") == 7


def test_parts_that_had_different_values_are_told_and_one_can_be_chosen(tmp_path: Path) -> None:
    """Red when the run goes on with the first value, or the advice changes nothing."""
    with pytest.raises(
        ConfigError, match="values 3 and 5 of what is run.ignore_index today"
    ) as told:
        index_of(tmp_path, "3", "5")
    assert "--set run.ignore_index=" in str(told.value)
    assert index_of(tmp_path, "3", "5", "run.ignore_index=5") == 5
