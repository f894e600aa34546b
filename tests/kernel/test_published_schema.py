"""What an editor is told of a pipeline file, whole or a layer over another."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.schemas import all_schemas

WHOLE = {
    "forge": 1,
    "run": {"max_steps": 3},
    "data": {"use": "modular_arithmetic"},
    "model": {"use": "mlp"},
    "optimizer": {"use": "adamw"},
    "loss": {"use": "cross_entropy"},
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return dict(all_schemas(Catalog.installed())["pipeline.schema.json"])


def faults(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    return [
        fault.message for fault in jsonschema.Draft202012Validator(schema).iter_errors(document)
    ]


def test_a_whole_file_and_a_layer_are_both_fine(schema: dict[str, Any]) -> None:
    """Planted fault: the schema of whole pipelines for every file."""
    assert faults(schema, WHOLE) == []
    assert faults(schema, {"extends": "base.yaml", "run": {"seed": 1}}) == []
    assert faults(schema, {"extends": "base.yaml", "optimizer": {"with": {"lr": 0.1}}}) == []


def test_without_extends_nothing_may_be_missing(schema: dict[str, Any]) -> None:
    assert faults(schema, {"run": {"seed": 1}})
    assert faults(schema, {**WHOLE, "optimizer": {"with": {"lr": 0.1}}}) == [
        "'use' is a required property"
    ]


@pytest.mark.parametrize("extends", [{}, {"extends": "base.yaml"}])
def test_settings_of_a_named_plugin_are_checked_in_both(
    schema: dict[str, Any], extends: dict[str, str]
) -> None:
    wrong = {**WHOLE, **extends, "optimizer": {"use": "adamw", "with": {"lr": -1}}}
    assert faults(schema, wrong) == ["-1 is less than the minimum of 0"]
    assert faults(schema, {**WHOLE, **extends, "optimizer": {"use": "adamw", "wiht": {}}})
