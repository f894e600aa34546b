"""Mistakes of foreign plugins are named, and stand in nobody's way."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from kernel_parts import make_plugin

from forge_kernel.api import Kind, PluginInfo, UseLoss, hookimpl
from forge_kernel.errors import PluginError
from forge_kernel.planning.catalog import GROUP, Catalog, Offer
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.training.bus import build, hook_table


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """None."""


@dataclass(frozen=True, kw_only=True)
class Odd:
    """Settings of a type that has no schema."""

    thing: complex = 1j


def plugin(**info: Any) -> type[Any]:
    class Found:
        """A plugin."""

        def __init__(self, config: Any) -> None:
            self.config = config

    values = {"name": "found", "kind": Kind.OBSERVERS, "config": NoSettings, **info}
    Found.info = PluginInfo(**values)  # type: ignore[attr-defined]
    return Found


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"config": dict}, "no dataclass"),
        ({"api": 1}, "pair of whole numbers"),
        ({"api": ("1", "2")}, "pair of whole numbers"),
        ({"name": "other"}, "its info says"),
        ({"api": (7, 9)}, "plugin interface 7 to 9"),
    ],
)
def test_a_wrong_card_is_told_in_one_line(info: dict[str, Any], words: str) -> None:
    catalog = Catalog()
    catalog.add(plugin(**info))
    name = "found" if "name" not in info else "other"
    if name == "other":  # offered under another name than its card says
        offer = Offer(Kind.OBSERVERS, "found", "x:y", "acme", "1")
        catalog = Catalog([offer])
        catalog._classes[Kind.OBSERVERS, "found"] = plugin(**info)
    with pytest.raises(PluginError, match=words) as caught:
        catalog.load(Kind.OBSERVERS, "found")
    assert len(caught.value.faults[0].message.splitlines()) == 1


@pytest.mark.parametrize(
    "statement", ["raise SystemExit(3)", "1 / 0", "import nothing_of_that_name"]
)
def test_a_module_that_ends_the_process_or_fails_is_a_broken_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    (tmp_path / "acme_broken.py").write_text(statement + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("acme_broken", None)
    entry = EntryPoint("loss.broken", "acme_broken:Broken", GROUP)
    catalog = Catalog([Offer(Kind.LOSS, "broken", entry.value, "acme", "1", entry)])
    with pytest.raises(PluginError, match=r"'loss.broken' of acme 1 cannot be loaded"):
        catalog.load(Kind.LOSS, "broken")


def test_a_part_may_take_a_subset_of_the_arguments_in_another_order() -> None:
    """The composite asks by position with all of them, and only for what the part answers."""

    class Short:
        """A loss that takes outputs and batch alone, and has no weights of its own."""

        info = PluginInfo(name="short", kind=Kind.LOSS, config=NoSettings)

        def __init__(self, config: NoSettings) -> None:
            self.config = config

        @hookimpl
        def compute_loss(self, outputs: Any, batch: Any) -> Any:
            return outputs - batch

    @dataclass(frozen=True, kw_only=True)
    class DoubleConfig:
        """Nests one."""

        inner: UseLoss[Any]

    class Double:
        """Twice the inner loss."""

        info = PluginInfo(name="double", kind=Kind.LOSS, config=DoubleConfig)

        def __init__(self, config: DoubleConfig) -> None:
            self.config = config

        @hookimpl
        def compute_loss(self, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
            inner: Any = self.config.inner
            return 2 * inner.compute_loss(run, step, batch, outputs)

    DoubleConfig.__annotations__["inner"] = UseLoss
    catalog = Catalog.installed()
    catalog.add(Short)
    catalog.add(Double)
    settings = ["loss={use: double, with: {inner: {use: short}}}"]
    decided = plan(load_pipeline("smoke", settings, catalog=catalog), catalog)
    built = build(decided)
    assert built[("loss",)].compute_loss(None, 0, 2, 5) == 6
    assert not hasattr(built["loss", "with", "inner"], "compute_loss_weights")


def test_the_hooks_of_a_class_are_told_in_the_order_of_a_run_with_all_arguments() -> None:
    found = hook_table(
        type(
            make_plugin(
                "several", Kind.CALLBACKS,
                on_step_end=lambda self, step: None, on_batch=lambda self: None,
            )
        )
    )  # fmt: skip
    assert list(found.items()) == [
        ("on_batch", ["run", "step", "batch"]), ("on_step_end", ["run", "step"]),
    ]  # fmt: skip
