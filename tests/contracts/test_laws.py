"""The laws of the house that no linter knows."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import forked
import pytest

from forge_kernel.contract.plugin import Kind
from forge_kernel.planning.catalog import GROUP, Catalog
from forge_kernel.planning.schemas import all_schemas, schema_text

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy")

_FIRST_PARTY = [entry for entry in entry_points(group=GROUP) if entry.value.startswith("forge_")]


LIGHT = (
    "jsonschema", "yaml", "msgspec", "rich.console", "typer", "pluggy", "structlog",
)  # fmt: skip
"""What takes half of a start and is not ours: none of it imports what is HEAVY, or all are red."""


def light(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that knows LIGHT and nothing of ours."""
    return forked.run(
        [sys.executable, "-c", code, *arguments],
        modules=LIGHT, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def fresh(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


@pytest.mark.parametrize("entry", _FIRST_PARTY, ids=lambda entry: entry.name)
def test_a_first_party_plugin_loads_without_torch(entry: Any) -> None:
    module, _, name = entry.value.partition(":")
    code = (
        f"import sys, {module} as m; c = m.{name}; c(c.info.config())\n"
        f"found = [x for x in {HEAVY!r} if x in sys.modules]\n"
        "assert not found, found"
    )
    done = light(code)
    assert done.returncode == 0, done.stderr


COMMANDS = [
    ["--help"], ["--version"], ["check", "bitnet_grokfast"], ["plan", "bitnet_grokfast"],
    ["plugins"], ["plugins", "grokfast"], ["schema", "smoke"],
    ["explain", "smoke", "run.seed"], ["run", "--help"], ["status", "--help"], ["watch", "--help"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command))
def test_a_command_that_trains_nothing_imports_no_torch(command: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['forge', *sys.argv[1:]]\n"
        "from forge_kernel.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"found = [x for x in {HEAVY!r} if x in sys.modules]\n"
        "assert not found, found"
    )
    done = light(code, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_importing_the_kernel_imports_no_torch_and_touches_nothing() -> None:
    code = (
        "import sys, signal, logging, threading\n"
        "before = (signal.getsignal(2), signal.getsignal(15), list(logging.root.handlers))\n"
        "import forge_kernel, forge_kernel.api, forge_plugins\n"
        "assert before == (signal.getsignal(2), signal.getsignal(15), list(logging.root.handlers))\n"
        "assert threading.active_count() == 1\n"
        "assert 'torch' not in sys.modules"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr


def test_the_schemas_are_up_to_date() -> None:
    """Mend with: forge schema --write schemas."""
    catalog = Catalog(
        offer for offer in Catalog.installed().offers() if offer.distribution == "forge-kernel"
    )
    expected = {name: schema_text(schema) for name, schema in all_schemas(catalog).items()}
    present = {
        path.relative_to(ROOT / "schemas").as_posix(): path.read_text()
        for path in (ROOT / "schemas").rglob("*.json")
    }
    assert expected == present


def test_every_plugin_module_has_an_entry_point_and_a_schema() -> None:
    offers = [
        offer for offer in Catalog.installed().offers() if offer.distribution == "forge-kernel"
    ]
    targets = {offer.target.partition(":")[0] for offer in offers}
    assert len(targets) == len(offers), "one module, one plugin"
    for module in targets:
        catalog_name = next(offer.key for offer in offers if offer.target.startswith(f"{module}:"))
        assert (ROOT / "schemas" / f"{catalog_name.replace('.', '/')}.json").is_file()


def test_nothing_registers_at_import() -> None:
    """Modules of ours compute constants at their top level; none calls something for its effect."""
    # torch looks its operators up by name: they are there before traced code names them
    torch_operators = {
        (file, f"library.{call}")
        for file in ("device_kernels.py", "integer_gradients.py")
        for call in ("define", "impl", "register_fake")
    }
    allowed = {("__main__.py", "main")}
    allowed |= torch_operators
    found = set()
    for file in [*ROOT.glob("forge_kernel/**/*.py"), *ROOT.glob("plugins/forge_plugins/**/*.py")]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                found.add((file.name, ast.unparse(node.value.func)))
            elif isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
                found |= {(file.name, ast.unparse(call.func)) for call in calls}
    assert found <= allowed


def test_the_kernel_names_no_technique() -> None:
    words = ("grokfast", "bitnet", "ternary", "adamw", "transformer")
    for file in ROOT.glob("forge_kernel/**/*.py"):
        if file.parent.name in ("testing", "cli"):
            continue  # examples for people
        tree = ast.parse(file.read_text())
        names = {node.id.lower() for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr.lower() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        found = [word for word in words if any(word in name for name in names)]
        assert not found, f"{file.relative_to(ROOT)} names {found}"


def test_only_training_calls_hooks() -> None:
    """`bus.calls` / `bus.call` / `bus.transform` are used there, and for start and end of a run in
    the runner."""
    users = {
        file.relative_to(ROOT / "forge_kernel").as_posix()
        for file in ROOT.glob("forge_kernel/**/*.py")
        if any(f"bus.{verb}(" in file.read_text() for verb in ("calls", "call", "transform"))
    }
    elsewhere = {name for name in users if not name.startswith(("training/", "testing/"))}
    assert elsewhere == {"recorded_run.py"}
    assert len(users) > 5


def test_every_kind_has_a_rule_and_a_use() -> None:
    from forge_kernel.config.use import USE_OF_KIND
    from forge_kernel.contract.plugin import RULES

    assert set(RULES) == set(Kind) == set(USE_OF_KIND)


def test_the_tree_is_the_one_of_the_design() -> None:
    for name in (
        "forge_kernel",
        "plugins/forge_plugins",
        "pipelines",
        "schemas",
        "tests",
        "benchmarks",
    ):
        assert (ROOT / name).is_dir()
    assert not (ROOT / "plugins" / "__init__.py").exists()


def test_torch_is_pinned_in_one_place_and_named_by_every_install() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0" in pins
    for file in ("Makefile", "README.md", "CONTRIBUTING.md"):
        for line in (ROOT / file).read_text().splitlines():
            if "pip install" in line and "build" not in line:
                assert "-c constraints.txt" in line, f"{file}: {line}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=2.13" in project["dependencies"]  # no lower one is run


def test_every_pipeline_names_the_schema_and_checks() -> None:
    from forge_kernel.planning.pipeline_file import load_pipeline, shipped_pipelines
    from forge_kernel.planning.plan import plan

    shipped = shipped_pipelines()
    assert {"bitnet_grokfast", "smoke", "grokfast_paper"} <= set(shipped)
    for name, file in shipped.items():
        up = "../" * (1 + name.count("/"))
        assert f"$schema={up}schemas/pipeline.schema.json" in file.read_text(), name
        if name != "heal_llm":  # begins with another run's folder: tests/plugins/test_healing.py
            plan(load_pipeline(file))


def test_pipelines_validate_against_the_published_schema_too() -> None:
    """What an editor checks is what the kernel checks."""
    import jsonschema

    from forge_kernel.config.yaml_file import read_yaml

    schema = json.loads((ROOT / "schemas" / "pipeline.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for file in sorted((ROOT / "pipelines").rglob("*.yaml")):
        validator.validate(read_yaml(file).data)


@pytest.mark.parametrize("face", ["forge_kernel", "forge_kernel.embedding"])
def test_names_that_are_imported_when_first_used_are_there(face: str) -> None:
    """Red when a module moves and the table of homes, which no type checker reads, does not."""
    module = importlib.import_module(face)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
