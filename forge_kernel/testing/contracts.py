"""The contract tests: import them into a test module of the distribution under test."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from forge_kernel.config.schema import bind_config, config_data, config_schema
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.result import RunResult
from forge_kernel.planning.catalog import Catalog
from forge_kernel.run_folder.folder import RunFolder
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.testing.counted import (
    faults_of_loss,
    faults_of_validator,
    traces_of_dropped_window,
)
from forge_kernel.testing.trial import Trial
from forge_kernel.training.bus import hook_table

__all__ = [
    "test_a_dropped_window_leaves_no_trace",
    "test_bad_settings_are_refused",
    "test_counts_what_counts",
    "test_is_constructed_without_any_effect",
    "test_its_card_is_complete",
    "test_resumes_bit_for_bit",
    "test_settings_survive_the_round_trip",
    "test_trains_ten_steps",
    "test_writes_only_what_it_owns",
]


def _plugin(key: str) -> tuple[Catalog, Kind, str, type[Any]]:
    kind, _, name = key.partition(".")
    catalog = Catalog.installed()
    return catalog, Kind(kind), name, catalog.load(Kind(kind), name)


def _trial(key: str, config: dict[str, Any]) -> Trial:
    catalog, kind, name, _ = _plugin(key)
    return Trial(catalog, kind, name, config)


_RUN: dict[str, tuple[RunResult, Path]] = {}


def _closed(config: type[Any], name: str) -> dict[str, Any]:
    schema, inner = config_schema(config, name)
    return {**schema, "$defs": inner}


def test_its_card_is_complete(forge_plugin: str) -> None:
    """A docstring, a description for every setting, and at least one hook that exists."""
    _, _, _, plugin = _plugin(forge_plugin)
    assert (plugin.__doc__ or "").strip(), "the class has no docstring"
    schema, _ = config_schema(plugin.info.config, forge_plugin)
    bare = [
        name for name, field in schema.get("properties", {}).items() if not field.get("description")
    ]
    assert not bare, f"settings without a description: {bare}"
    assert hook_table(plugin), "the plugin listens to no hook"


def test_settings_survive_the_round_trip(forge_plugin: str, forge_config: dict[str, Any]) -> None:
    """Plain data -> settings -> plain data -> settings gives the same, and the schema agrees."""
    _, _, _, plugin = _plugin(forge_plugin)
    schema = _closed(plugin.info.config, forge_plugin)
    jsonschema.Draft202012Validator.check_schema(schema)
    if not any("$ref" in str(part) for part in schema.get("properties", {}).values()):
        jsonschema.validate(forge_config, schema)
    config = bind_config(plugin.info.config, forge_config)
    data = config_data(config)
    assert config_data(bind_config(plugin.info.config, data)) == data


def test_bad_settings_are_refused(forge_plugin: str) -> None:
    """A setting that does not exist is no setting."""
    _, _, _, plugin = _plugin(forge_plugin)
    schema = _closed(plugin.info.config, forge_plugin)
    faults = list(
        jsonschema.Draft202012Validator(schema).iter_errors({"no_such_setting_at_all": 1})
    )
    assert any(fault.validator == "additionalProperties" for fault in faults)


def test_is_constructed_without_any_effect(
    forge_plugin: str, forge_config: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """The constructor stores the settings: no file, no change of the random streams."""
    from forge_kernel.storage.random_state import read_random_state

    monkeypatch.chdir(tmp_path)
    _, _, _, plugin = _plugin(forge_plugin)
    config = bind_config(plugin.info.config, forge_config)
    before = read_random_state()["torch"]
    instance = plugin(config)
    assert bool((read_random_state()["torch"] == before).all()), "random numbers were drawn"
    assert not list(tmp_path.iterdir()), "files were written"
    assert list(inspect.signature(plugin).parameters) == ["config"]
    assert instance.config == config


def _ten_steps(
    key: str, config: dict[str, Any], folders: pytest.TempPathFactory
) -> tuple[RunResult, Path]:
    """The run that two tests look at, and its folder; the last one is kept."""
    name = f"{key} {config!r}"
    if name not in _RUN:
        folder = folders.mktemp("straight") / "run"
        result = _trial(key, config).run(folder)
        _RUN.clear()
        _RUN[name] = result, folder
    return _RUN[name]


def test_trains_ten_steps(
    forge_plugin: str, forge_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ten steps end with finite metrics, each of which somebody has declared."""
    result, folder = _ten_steps(forge_plugin, forge_config, tmp_path_factory)
    assert result.outcome == "completed"
    assert result.steps > 0
    loss = result.final["loss"]
    assert loss is not None
    assert math.isfinite(loss)
    infos = RunFolder(folder).metric_infos()
    undeclared = [name for name in result.final if not infos.declares(name)]
    assert not undeclared, f"no PluginInfo.metrics names {undeclared}"


def test_resumes_bit_for_bit(
    forge_plugin: str,
    forge_config: dict[str, Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Ten steps, and seven steps, a new start and three more, are the same run."""
    trial = _trial(forge_plugin, forge_config)
    straight, folder = _ten_steps(forge_plugin, forge_config, tmp_path_factory)
    if straight.steps < 10:  # the plugin itself ends the run early
        return
    assert trial.run(tmp_path / "cut", stop_after=7).outcome == "stopped"
    trial.resume(tmp_path / "cut")
    left = CheckpointStore(folder / "checkpoints").path(10)
    right = CheckpointStore(tmp_path / "cut" / "checkpoints").path(10)
    assert differences(left, right) == []


def test_writes_only_what_it_owns(
    forge_plugin: str, forge_config: dict[str, Any], tmp_path: Path
) -> None:
    """The checked mode finds nothing."""
    assert _trial(forge_plugin, forge_config).run(tmp_path / "run", checked=True).steps > 0


def test_counts_what_counts(forge_plugin: str, forge_config: dict[str, Any]) -> None:
    """A loss and a validator weigh by what counts in the batch, and by nothing else.

    Rows of weight 0, ignored targets and how samples are cut into micro-batches or batches change
    no gradient and no metric; a batch in which nothing counts teaches nothing.
    """
    _, kind, _, plugin = _plugin(forge_plugin)
    trial = _trial(forge_plugin, forge_config)
    if kind is Kind.LOSS:
        assert faults_of_loss(trial, couples=plugin.info.couples_samples) == []
    elif kind is Kind.VALIDATORS:
        assert faults_of_validator(trial) == []


def test_a_dropped_window_leaves_no_trace(
    forge_plugin: str, forge_config: dict[str, Any], tmp_path: Path
) -> None:
    """A window that is dropped for a NaN leaves the memory of every part as it was."""
    if _plugin(forge_plugin)[1] is Kind.OBSERVERS:
        return  # they only watch: what they remember steers nothing
    assert traces_of_dropped_window(_trial(forge_plugin, forge_config), tmp_path) == []
