"""The pytest plugin: which plugins the contract tests are about, and their settings."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The ini setting that names the distributions under test."""
    parser.addini(
        "forge_distributions",
        "distributions whose forge plugins the contract tests are about",
        type="linelist",
        default=[],
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run of each contract test for each plugin of the distributions."""
    if "forge_plugin" not in metafunc.fixturenames:
        return
    from forge_kernel.planning.catalog import Catalog

    wanted = {
        name.lower().replace("_", "-") for name in metafunc.config.getini("forge_distributions")
    }
    keys = [
        offer.key
        for offer in Catalog.installed().offers()
        if offer.distribution.lower().replace("_", "-") in wanted
    ]
    metafunc.parametrize("forge_plugin", keys, scope="session")


@pytest.fixture
def forge_config(forge_plugin: str) -> dict[str, Any]:
    """Settings for the plugin under test; override it where the examples are not enough.

    The default takes, for each required field, the first example of its schema.
    """
    from forge_kernel.config.schema import config_schema
    from forge_kernel.contract.plugin import Kind
    from forge_kernel.planning.catalog import Catalog

    kind, _, name = forge_plugin.partition(".")
    info = Catalog.installed().load(Kind(kind), name).info
    schema, _ = config_schema(info.config, info.key)
    result: dict[str, Any] = {}
    for field in schema.get("required", ()):
        examples = schema["properties"][field].get("examples")
        if not examples:
            pytest.fail(
                f"{forge_plugin}: the required setting '{field}' has no example; give it "
                "Meta(examples=[...]) or override the fixture forge_config"
            )
        result[field] = examples[0]
    return result
