"""Passwords and tokens in settings: no run folder keeps them, no message shows them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta

from forge_kernel import resume, run
from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from forge_kernel.errors import PlanError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline

TOKEN = "ghp_16C7e42F292c6912E7710c"
seen: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the sender."""

    token: Annotated[str, Meta(description="A token.", extra_json_schema={"writeOnly": True})] = ""
    address: Annotated[str, Meta(description="A server.")] = ""


class Sender:
    """Tells what it holds, and fails with it."""

    info = PluginInfo(name="sender", kind=Kind.CALLBACKS, config=Settings)

    def __init__(self, config: Settings) -> None:
        self.config = config

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        seen.append(self.config.token or self.config.address)
        run.emit_event("sent", f"Sent with {seen[-1]}.", token=seen[-1])

    @hookimpl
    def on_step_end(self, run: Run, step: Any) -> None:
        if step.number == 3:
            raise ValueError(f"refused: {self.config.token or self.config.address}")


@pytest.fixture
def catalog() -> Catalog:
    seen.clear()
    result = Catalog.installed()
    result.add(Sender)
    return result


def attempt(catalog: Catalog, folder: Path, setting: str, steps: int = 2) -> Any:
    chosen = [f"callbacks=[{{use: sender, with: {{{setting}}}}}]", f"run.max_steps={steps}"]
    pipeline = load_pipeline("smoke", [*chosen, "exporters=null"], catalog=catalog)
    return run(pipeline, catalog=catalog, output_dir=folder, quiet=True)


def kept(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


@pytest.mark.parametrize(
    ("setting", "held", "name"),
    [
        (f"token: {TOKEN}", TOKEN, "TOKEN"),
        (f"address: 'https://me:{TOKEN}@example.invalid/x'",
         f"https://me:{TOKEN}@example.invalid/x", "ADDRESS"),
    ],
)  # fmt: skip
def test_a_secret_is_kept_as_the_name_of_a_variable_that_resume_asks_for(
    catalog: Catalog, tmp_path: Path, monkeypatch: Any, setting: str, held: str, name: str
) -> None:
    """Red when the token stands in the run folder, or the plugin does not get it again."""
    variable = f"FORGE_SECRET_CALLBACKS_0_{name}"
    attempt(catalog, tmp_path / "r", setting)
    assert seen == [held]
    assert TOKEN not in kept(tmp_path / "r")
    assert f"env:{variable}" in (tmp_path / "r" / "config.yaml").read_text()
    assert "Sent with ***." in (tmp_path / "r" / "forge.log").read_text()
    before = kept(tmp_path / "r")
    with pytest.raises(PlanError, match=f"set the environment variable {variable}"):
        resume(tmp_path / "r", ["run.max_steps=2"], catalog=catalog, quiet=True)
    assert kept(tmp_path / "r") == before
    monkeypatch.setenv(variable, held)
    resume(tmp_path / "r", ["run.max_steps=2"], catalog=catalog, quiet=True)
    assert seen == [held, held]


def test_a_failure_does_not_show_it(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=TOKEN):  # the program itself is told all of it
        attempt(catalog, tmp_path / "r", f"token: {TOKEN}", steps=4)
    assert TOKEN not in kept(tmp_path / "r")
    assert json.loads((tmp_path / "r/result.json").read_text())["error"].endswith("refused: ***")


@pytest.mark.parametrize("name", ["HOME", "AWS_SECRET_ACCESS_KEY", "FORGE_ALLOW_CODE"])
def test_a_file_reaches_no_other_variable(
    catalog: Catalog, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    """Red when a file can have any variable sent to where it likes."""
    monkeypatch.setenv(name, TOKEN)
    attempt(catalog, tmp_path / "r", f"address: 'env:{name}'")
    assert seen == [f"env:{name}"]
