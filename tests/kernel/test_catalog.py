"""The catalogue: what is installed, what is doubled, what is broken, told apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forge_kernel.contract.plugin import API_VERSION, Kind, PluginInfo
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.training.loaders.in_memory import NoConfig

Install = Callable[..., None]

MODULE = '''
"""A plugin of another distribution."""
from __future__ import annotations
from dataclasses import dataclass
from forge_kernel.api import Kind, PluginInfo, hookimpl

@dataclass(frozen=True, kw_only=True)
class Config:
    """No settings."""

class ProgressObserver:
    """Watches."""
    info = PluginInfo(name="{name}", kind=Kind.{kind}, config=Config, api={api})
    def __init__(self, config): ...
    @hookimpl
    def on_step_end(self, run, step): ...
'''


def module(name: str, kind: str = "OBSERVERS", api: tuple[int, int] = (1, 1)) -> str:
    return MODULE.format(name=name, kind=kind, api=api)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts distributions onto the path: a name, entry points, and modules with their texts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def put(distribution: str, entries: dict[str, str], **modules: str) -> None:
        folder = tmp_path / f"{distribution}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n"
        )
        points = "".join(f"{name} = {target}\n" for name, target in entries.items())
        (folder / "entry_points.txt").write_text(f"[forge_kernel.plugins]\n{points}")
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)

    yield put
    for name in set(sys.modules) - before:
        if name.startswith("installed_"):
            del sys.modules[name]


def refusal(kind: Kind, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        Catalog.installed().load(kind, name)
    assert caught.value.exit_status == 2
    return str(caught.value)


PIPELINE = """forge: 1
run: {max_steps: 10}
data: {use: modular_arithmetic}
model: {use: mlp}
optimizer: {use: adamw}
loss: {use: cross_entropy}
"""


def test_a_plugin_of_another_distribution_is_found_as_ours_are(install: Install) -> None:
    install(
        "other",
        {"observers.watcher": "installed_a:ProgressObserver"},
        installed_a=module("watcher"),
    )
    catalog = Catalog.installed()
    assert "watcher" in catalog.names(Kind.OBSERVERS)
    assert "progress_bar" in catalog.names(Kind.OBSERVERS)
    assert catalog.offer(Kind.OBSERVERS, "watcher").origin == "other 1.5"
    assert "installed_a" not in sys.modules, "known by kind and name without an import"
    assert catalog.load(Kind.OBSERVERS, "watcher").info.name == "watcher"


def test_a_plugin_offered_twice_is_refused_and_both_distributions_are_named(
    install: Install,
) -> None:
    for name in ("first", "second"):
        text = module("watcher")
        install(name, {"observers.watcher": f"installed_{name}:ProgressObserver"},
                **{f"installed_{name}": text})  # fmt: skip
    message = refusal(Kind.OBSERVERS, "watcher")
    assert "'observers.watcher' is offered twice" in message
    assert "first 1.5 (installed_first:ProgressObserver)" in message
    assert "second 1.5 (installed_second:ProgressObserver)" in message


def test_a_name_of_ours_is_not_taken_over_by_another_distribution(install: Install) -> None:
    install(
        "thief", {"optimizer.adamw": "installed_t:ProgressObserver"}, installed_t=module("adamw")
    )
    message = refusal(Kind.OPTIMIZER, "adamw")
    assert "forge-kernel" in message
    assert "thief 1.5" in message


def test_the_same_name_in_another_kind_is_another_plugin(install: Install) -> None:
    install(
        "other", {"observers.adamw": "installed_b:ProgressObserver"}, installed_b=module("adamw")
    )
    catalog = Catalog.installed()
    assert catalog.load(Kind.OBSERVERS, "adamw").__module__ == "installed_b"
    assert catalog.load(Kind.OPTIMIZER, "adamw").info.kind is Kind.OPTIMIZER
    assert catalog.find("adamw") == [(Kind.OBSERVERS, "adamw"), (Kind.OPTIMIZER, "adamw")]
    assert catalog.find("optimizer.adamw") == [(Kind.OPTIMIZER, "adamw")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import a_module_that_nobody_has", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("Other = 3", "AttributeError"),
        ("ProgressObserver = 3", "is not a plugin class"),
        ("class ProgressObserver: pass", "is not a plugin class"),
        (module("watcher").replace("info = PluginInfo", "card = PluginInfo"), "is not a plugin"),
        (module("somebody_else"), "its info says 'observers.somebody_else'"),
        (module("watcher", "CALLBACKS"), "its info says 'callbacks.watcher'"),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_told_with_its_reason_and_is_not_in_the_way(
    install: Install, tmp_path: Path, text: str, why: str
) -> None:
    install("broken", {"observers.watcher": "installed_c:ProgressObserver"}, installed_c=text)
    message = refusal(Kind.OBSERVERS, "watcher")
    assert why in message
    assert "'observers.watcher' of broken 1.5" in message
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE)
    assert load_pipeline(file).run.max_steps == 10
    offered = {offer.key for offer in Catalog.installed().offers()}
    assert {"observers.watcher", "observers.progress_bar"} <= offered


def test_a_pipeline_that_names_a_broken_plugin_is_refused_at_its_place(
    install: Install, tmp_path: Path
) -> None:
    install("broken", {"observers.watcher": "installed_d:ProgressObserver"}, installed_d="1 / 0")
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"{PIPELINE}observers:\n  - {{use: progress_bar}}\n  - use: watcher\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError") as caught:
        load_pipeline(file)
    (fault,) = caught.value.faults
    assert fault.mark is not None
    assert (fault.mark.line, fault.mark.column, fault.path) == (9, 10, "observers[1].use")


def test_settings_without_a_schema_make_a_plugin_broken_at_its_place(
    install: Install, tmp_path: Path
) -> None:
    text = module("watcher").replace('"""No settings."""', "stream: ProgressObserver")
    install("broken", {"observers.watcher": "installed_e:ProgressObserver"}, installed_e=text)
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"{PIPELINE}observers: [{{use: watcher}}]\n")
    with pytest.raises(ConfigError, match="have no schema") as caught:
        load_pipeline(file)
    assert [fault.path for fault in caught.value.faults] == ["observers[0].use"]


@pytest.mark.parametrize(
    ("api", "loads"),
    [
        ((API_VERSION, API_VERSION), True),
        ((0, API_VERSION + 5), True),
        ((API_VERSION + 1, API_VERSION + 2), False),
        ((0, API_VERSION - 1), False),
    ],
)
def test_a_plugin_loads_where_its_range_of_interfaces_holds_ours(
    install: Install, api: tuple[int, int], loads: bool
) -> None:
    text = module("watcher", api=api)
    install("other", {"observers.watcher": "installed_f:ProgressObserver"}, installed_f=text)
    if loads:
        assert Catalog.installed().load(Kind.OBSERVERS, "watcher").info.api == api
    else:
        expected = f"written for plugin interface {api[0]} to {api[1]}, this kernel has"
        assert expected in refusal(Kind.OBSERVERS, "watcher")


@pytest.mark.parametrize("name", ["watcher", "observer.watcher", "observers.", ".x", "Data.x"])
def test_a_misnamed_entry_point_is_told_and_is_not_in_the_way(install: Install, name: str) -> None:
    install("careless", {name: "installed_g:ProgressObserver"}, installed_g=module("watcher"))
    catalog = Catalog.installed()
    (problem,) = [text for text in catalog.misnamed if "careless" in text]
    assert f"careless 1.5: the entry point '{name}'" in problem
    assert "observers" in problem, "the kinds are listed"
    assert "adamw" in catalog.names(Kind.OPTIMIZER)


def test_a_name_that_nobody_offers_is_told_with_the_nearest() -> None:
    message = refusal(Kind.OPTIMIZER, "admaw")
    assert "no plugin 'admaw' of the kind optimizer" in message
    assert "did you mean 'adamw'" in message


class Part:
    """A class of this process."""

    info = PluginInfo(name="part", kind=Kind.CALLBACKS, config=NoConfig)


def test_a_class_of_this_process_stands_beside_the_installed_ones() -> None:
    catalog = Catalog.installed()
    catalog.add(Part)
    assert catalog.load(Kind.CALLBACKS, "part") is Part
    assert "stop_at" in catalog.names(Kind.CALLBACKS)
    assert "part" not in Catalog.installed().names(Kind.CALLBACKS)
    catalog.add(Part)
    with pytest.raises(PluginError, match="offered twice: by this process"):
        catalog.load(Kind.CALLBACKS, "part")


def test_offers_come_by_kind_in_canonical_order_and_by_name() -> None:
    offers = list(Catalog.installed().offers())
    kinds = list(Kind)
    keys = [(kinds.index(offer.kind), offer.name) for offer in offers]
    assert keys == sorted(keys)
    assert len(offers) > 10


def test_an_empty_catalogue_says_that_nothing_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(file, catalog=Catalog())
    assert [fault.path for fault in caught.value.faults] == [
        "data.use", "model.use", "optimizer.use", "loss.use",
    ]  # fmt: skip
    assert all("nothing (none is installed)" in str(fault) for fault in caught.value.faults)
