"""The plugin is found and has its settings; add what it is to do."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from forge_kernel.cli.templates.observers import (
    NewPlugin,
    NewPluginConfig,
)

NAME = "observers.new_plugin"


def test_its_entry_point_leads_to_it() -> None:
    (entry,) = entry_points(group="forge_kernel.plugins", name=NAME)
    assert entry.load() is NewPlugin


def test_its_setting_has_a_default() -> None:
    assert NewPluginConfig().scale == pytest.approx(1.0)
