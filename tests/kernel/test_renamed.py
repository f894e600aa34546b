"""Names of before: a user's file is told the new one, a run folder is read on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.yaml_file import parse_yaml
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import ConfigError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.migration import migrated
from forge_kernel.planning.pipeline_file import check_document
from forge_kernel.renamed import KINDS, PLUGINS, label_today, record_today

CATALOG = Catalog.installed()
HEAD = "forge: 1\nrun: {max_steps: 1}\n"
BASE = {
    "data": "{use: modular_arithmetic}", "model": "{use: mlp}", "optimizer": "{use: adamw}",
    "loss": "{use: cross_entropy}",
}  # fmt: skip
LISTS = {Kind.REGULARIZERS, Kind.GRADIENTS, Kind.VALIDATORS, Kind.CALLBACKS}
VALUES: dict[str, Any] = {"repeats": "leave_out", "straight_through": "off"}
"""Values of before that are no values of today."""
TODAY = {"deduplicate": True, "ste": "none"}


def pipeline(kind: str, entry: str) -> str:
    """A pipeline file with an entry of a kind."""
    parts = BASE | {kind: f"[{entry}]" if kind in LISTS else entry}
    return HEAD + "".join(f"{name}: {text}\n" for name, text in parts.items())


def moved() -> Iterator[Any]:
    """Every setting that a plugin has renamed: kind, plugin, old path, new name."""
    for offer in CATALOG.offers():
        kind, _, name = offer.key.partition(".")
        if offer.distribution != "forge-kernel":
            continue
        config = CATALOG.load(Kind(kind), name).info.config
        for old, new in getattr(config, "renamed", {}).items():
            if not new.startswith("run."):
                yield pytest.param(kind, name, old, new, id=f"{offer.key}.{old}")


def default(config: Any, old: str, new: str) -> Any:
    """A value for the old setting."""
    last = old.rpartition(".")[2]
    if last in VALUES:
        return VALUES[last]
    return "loss" if new == "metric" else getattr(config(), new)


@pytest.mark.parametrize(("kind", "name", "old", "new"), list(moved()))
def test_a_setting_of_before_is_refused_in_a_file_and_read_in_a_run_folder(
    kind: str, name: str, old: str, new: str
) -> None:
    """Planted faults: a plugin's table that the schema does not show; one that is not applied."""
    import json

    config = CATALOG.load(Kind(kind), name).info.config
    value: Any = default(config, old, new)
    if isinstance(value, tuple):
        value = list(value)
    inner = {"threshold": 0.5} if old.startswith("capabilities.") else {}
    for key in reversed(old.replace("*", "main").split(".")):
        value = {key: value} if not isinstance(value, dict) else {key: value | inner}
        inner = {}
    if old.startswith("capabilities."):
        value = {"capabilities": {"main": {"figure": "loss", "threshold": 0.5}}}
    if name == "delayed_compression":
        value |= {"threshold": 0.5}
    text = pipeline(kind, json.dumps({"use": name, "with": value}))
    last = old.rpartition(".")[2]
    with pytest.raises(ConfigError, match=f"'{last}' is renamed to {new}"):
        check_document(parse_yaml(text, "mine.yaml"), CATALOG)
    document = migrated(parse_yaml(text, "config.yaml"), CATALOG)
    assert not [key for key in keys(document.data[kind]) if key == last]
    if new in TODAY:
        assert TODAY[new] in list(values_of(document.data[kind], new))
    check_document(document, CATALOG)


def keys(tree: Any) -> Iterator[str]:
    """All keys of a tree."""
    for value in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from keys(value)
    if isinstance(tree, dict):
        yield from tree


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """What stands under a key, anywhere in a tree."""
    for value in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from values_of(value, key)
    if isinstance(tree, dict) and key in tree:
        yield tree[key]


@pytest.mark.parametrize(("old", "new"), list(KINDS.items()))
def test_a_section_of_before_is_refused_in_a_file_and_read_in_a_run_folder(
    old: str, new: str
) -> None:
    entry = {"regularizers": "{use: weight_size}", "callbacks": "{use: row_norm}"}[new]
    text = pipeline(new, entry).replace(f"{new}:", f"{old}:")
    with pytest.raises(ConfigError, match=f"'{old}' is renamed to {new}"):
        check_document(parse_yaml(text, "mine.yaml"), CATALOG)
    document = migrated(parse_yaml(text, "config.yaml"), CATALOG)
    assert len(getattr(check_document(document, CATALOG), new)) == 1


def test_what_was_laid_over_a_run_folder_under_the_new_name_stays() -> None:
    text = pipeline("callbacks", "{use: row_norm}") + "policies: [{use: short_validation}]\n"
    document = migrated(parse_yaml(text, "config.yaml"), CATALOG)
    assert [use["use"] for use in document.data["callbacks"]] == ["row_norm"]


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [(kind, old, new) for kind, names in PLUGINS.items() for old, new in names.items()],
)
def test_a_plugin_of_before_is_refused_in_a_file_and_read_in_a_run_folder(
    kind: str, old: str, new: str
) -> None:
    part = "{use: modular_arithmetic}"
    text = pipeline(kind, f"{{use: {old}, with: {{training: {part}, validation: {part}}}}}")
    with pytest.raises(ConfigError, match=f"'{old}' is renamed to {new}"):
        check_document(parse_yaml(text, "mine.yaml"), CATALOG)
    document = migrated(parse_yaml(text, "config.yaml"), CATALOG)
    assert document.data[kind]["use"] == new
    other = parse_yaml(pipeline("loss", f"{{use: {old}}}"), "config.yaml")
    assert migrated(other, CATALOG).data["loss"]["use"] == old  # of a kind that never had it


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("policies[1] stop_at", "callbacks[1] stop_at"), ("penalties[0] x", "regularizers[0] x"),
        ("data two_sources", "data train_validation"), ("data file", "data file"),
        ("schedule composite", "schedule composite"),
    ],
)  # fmt: skip
def test_labels_of_checkpoints_are_todays(old: str, new: str) -> None:
    assert label_today(old) == new


def test_records_of_before_have_todays_keys() -> None:
    assert record_today({"figures": {"loss": 1.0}, "figures_step": 3, "step": 4}) == {
        "metrics": {"loss": 1.0}, "metrics_step": 3, "step": 4,
    }  # fmt: skip


class Scaled(nn.Linear):
    def __init__(self, buffer: str) -> None:
        super().__init__(4, 3)
        self.register_buffer(buffer, torch.zeros(1))


@pytest.mark.parametrize(
    ("buffer", "kept"), [("reference_scale", "anchor"), ("reference_scale", "reference_scale"),
                         ("anchor", "anchor")],
)  # fmt: skip
def test_a_tensor_of_a_checkpoint_of_before_comes_to_its_place(buffer: str, kept: str) -> None:
    """A buffer that a user's own layer calls so stays his. Planted: names taken as they stand."""
    data = [{"inputs": torch.zeros(2, 4), "targets": torch.zeros(2, dtype=torch.long)}]
    session = make_session(nn.Sequential(Scaled(buffer)), data)
    run, strategy = session.run, session.run.strategy
    state = {name: value.clone() for name, value in strategy.model_state(run).items()}
    del state[f"0.{buffer}"]
    strategy.load_model_state(run, {**state, f"0.{kept}": torch.full((1,), 7.0)})
    assert dict(run.model.named_buffers())[f"0.{buffer}"].item() == 7.0
    session.__exit__(None, None, None)
