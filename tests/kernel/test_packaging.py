"""The wheel: what it holds, and that it works far from the checkout."""

from __future__ import annotations

import configparser
import json
import posixpath
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from scratch_venv import ROOT, ScratchVenv, build_wheels, call, copy_source


@pytest.fixture(scope="module")
def names(project_wheel: Path) -> set[str]:
    with zipfile.ZipFile(project_wheel) as wheel:
        return set(wheel.namelist())


def test_the_wheel_holds_every_module_of_its_packages_and_nothing_else(names: set[str]) -> None:
    packages = [ROOT / "forge_kernel", *(ROOT / "plugins").iterdir()]
    modules = {
        file.relative_to(package.parent).as_posix()
        for package in packages
        for file in package.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    tops = {name.partition("/")[0] for name in names}
    allowed = {package.name for package in packages if any(package.rglob("*.py"))}
    assert tops - {top for top in tops if top.endswith(".dist-info")} == allowed


def test_the_wheel_says_that_its_packages_are_typed(names: set[str]) -> None:
    assert {"forge_kernel/py.typed", "forge_plugins/py.typed"} <= names


def test_the_wheel_holds_the_pipelines(names: set[str], project_wheel: Path) -> None:
    files = sorted((ROOT / "pipelines").glob("*.yaml"))
    assert files
    with zipfile.ZipFile(project_wheel) as wheel:
        for file in files:
            assert wheel.read(f"forge_plugins/pipelines/{file.name}") == file.read_bytes()


def test_the_wheel_holds_the_schema_that_its_pipelines_name(
    names: set[str], project_wheel: Path
) -> None:
    """From forge_plugins/pipelines/ and forge_plugins/pipelines/grokking/ alike."""
    schema = "forge_plugins/schemas/pipeline.schema.json"
    with zipfile.ZipFile(project_wheel) as wheel:
        assert wheel.read(schema) == (ROOT / "schemas" / "pipeline.schema.json").read_bytes()
        for name in names:
            if name.startswith("forge_plugins/pipelines/") and name.endswith(".yaml"):
                way = wheel.read(name).decode().partition("$schema=")[2].split()[0]
                assert posixpath.normpath(f"{posixpath.dirname(name)}/{way}") == schema


def test_the_wheel_names_the_entry_points_of_the_project(
    names: set[str], project_wheel: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    found = configparser.ConfigParser(delimiters=("=",))
    found.optionxform = str  # type: ignore[assignment,method-assign]
    with zipfile.ZipFile(project_wheel) as wheel:
        found.read_string(wheel.read(name).decode())
    expected = {"console_scripts": project["scripts"], **project["entry-points"]}
    assert {section: dict(found[section]) for section in found.sections()} == expected


def test_a_wheel_made_from_the_source_archive_is_the_same(names: set[str], tmp_path: Path) -> None:
    source = copy_source(ROOT, tmp_path / "source")
    code = "from setuptools import build_meta; build_meta.build_sdist('..')"
    call([sys.executable, "-c", code], cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    (wheel,) = build_wheels(tmp_path, archive)
    with zipfile.ZipFile(wheel) as built:
        assert set(built.namelist()) == names


def test_a_shipped_pipeline_runs_by_its_name(installed: ScratchVenv, tmp_path: Path) -> None:
    done = installed.forge("run", "smoke", "-q", "--set", "run.max_steps=5", cwd=tmp_path)
    folder = tmp_path / done.stdout.splitlines()[0]
    result = json.loads((folder / "result.json").read_text())
    assert (result["outcome"], result["steps"]) == ("completed", 5)


def test_a_shipped_pipeline_is_checked_by_its_name(installed: ScratchVenv, tmp_path: Path) -> None:
    assert "bitnet_grokfast" in installed.forge("check", "bitnet_grokfast", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_code_is_not_that_of_the_checkout(
    installed: ScratchVenv, tmp_path: Path
) -> None:
    code = (
        "import forge_kernel, forge_plugins; print(forge_kernel.__file__, forge_plugins.__file__)"
    )
    for file in installed.run("-c", code, cwd=tmp_path).stdout.split():
        assert Path(file).is_relative_to(installed.folder)


def test_the_installed_schemas_are_those_of_the_checkout(
    installed: ScratchVenv, tmp_path: Path
) -> None:
    installed.forge("schema", "--write", "schemas", cwd=tmp_path)
    written = {
        file.relative_to(tmp_path).as_posix(): file.read_text()
        for file in (tmp_path / "schemas").rglob("*.json")
    }
    committed = {
        file.relative_to(ROOT).as_posix(): file.read_text()
        for file in (ROOT / "schemas").rglob("*.json")
    }
    assert written == committed


@pytest.mark.parametrize("name", ["tests", "plugins", "benchmarks", "pipelines"])
def test_a_folder_of_the_checkout_is_no_package(
    installed: ScratchVenv, tmp_path: Path, name: str
) -> None:
    done = installed.run("-c", f"import {name}", cwd=tmp_path, status=1)
    assert f"No module named '{name}'" in done.stderr
