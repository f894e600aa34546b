"""The README is true: every command in it runs, every example works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
SHELL = [
    line.partition("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
    if line.strip()
]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
SET_UP = ("make ", "python3 -m venv", ".venv/bin/pip")  # run from a fresh clone, below


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines")
    return tmp_path


def environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    # one thread: the test workers share the cores, and waiting threads would spin on them
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def test_the_readme_has_commands_of_each_sort() -> None:
    assert {"make run", "make test"} <= set(SHELL)
    assert sum(line.startswith("forge ") for line in SHELL) >= 12


def test_every_forge_command_works_in_the_order_given(place: Path) -> None:
    for line in SHELL:
        if line.startswith(SET_UP):
            continue
        command = line.replace(".venv/bin/forge", "forge")
        if command == "forge run pipelines/bitnet_grokfast.yaml":
            continue  # the showcase has a test of its own
        assert command.startswith("forge ")
        done = forked.run(
            [sys.executable, "-m", "forge_kernel", *shlex.split(command)[1:]], cwd=place, env=environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.deep  # `.ci/run` makes it as `make run`
def test_the_showcase_learns_and_leaves_what_the_readme_says(place: Path) -> None:
    command = ["forge", "run", "pipelines/bitnet_grokfast.yaml"]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = place / done.stdout.splitlines()[0]
    result = json.loads((folder / "result.json").read_text())
    assert result["outcome"] == "completed"
    assert result["final"]["validation_accuracy"] >= 0.95
    assert result["stop_reason"].startswith("accuracy")
    for name in ("report.html", "metrics.jsonl", "config.yaml", "checkpoints/latest"):
        assert (folder / name).is_file()
    manifest = json.loads((folder / "exports/packed_ternary/manifest.json").read_text())
    assert manifest["verified"]["unpacked_bit_equal"] is True
    # ternary in all linear layers of the blocks, embeddings and head in full precision
    from safetensors import safe_open

    with safe_open(folder / "exports/packed_ternary/model.safetensors", "pt") as packed:
        names = set(packed.keys())
    layers = ("query", "key", "value", "output")
    expected = {f"blocks.{i}.attention.{layer}.weight.levels" for i in (0, 1) for layer in layers}
    expected |= {
        f"blocks.{i}.{layer}.weight.levels" for i in (0, 1) for layer in ("expand", "contract")
    }
    assert {name for name in names if name.endswith(".levels")} == expected
    assert {"head.weight", "token_embedding.weight", "position_embedding.weight"} <= names


def test_the_showcase_has_the_filter_on_in_every_step_with_a_lambda_of_at_least_one() -> None:
    from forge_kernel.planning.pipeline_file import load_pipeline

    pipeline = load_pipeline(ROOT / "pipelines/bitnet_grokfast.yaml")
    filters = [use.config for use in pipeline.gradients if use.name == "grokfast"]
    assert [found.lambda_reg >= 1 and found.filter == "ema" for found in filters] == [True]
    assert pipeline.quantizer is not None
    assert (pipeline.quantizer.config.weight_bits, pipeline.quantizer.config.activation_bits) == (
        1.58,
        8,
    )


@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_every_python_example_runs(place: Path, index: int) -> None:
    strict = "import warnings; warnings.simplefilter('error')\n"
    done = forked.run(
        [sys.executable, "-c", strict + PYTHON[index]],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_plugin_of_the_readme_passes_the_planner() -> None:
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import load_pipeline
    from forge_kernel.planning.plan import plan

    scope: dict[str, object] = {"__name__": "readme_example"}
    import types

    module = types.ModuleType("readme_example")
    sys.modules["readme_example"] = module  # dataclasses look their module up
    example = next(block for block in PYTHON if "class Scale" in block)
    exec(compile(example, "README.md", "exec"), module.__dict__, module.__dict__)
    del scope
    catalog = Catalog.installed()
    catalog.add(module.Scale)
    settings = ["gradients=[{use: scale, with: {factor: 2.0}}]"]
    decided = plan(load_pipeline("smoke", settings, catalog=catalog), catalog)
    assert "gradients[0] scale" in [entry.label for entry in decided.answering("on_gradients")]


def test_the_sample_fault_is_what_forge_prints(tmp_path: Path) -> None:
    text = (ROOT / "pipelines/bitnet_grokfast.yaml").read_text()
    file = tmp_path / "mine.yaml"
    line = "  - {use: grokfast, with: {alpha: 2.0, lambda_reg: 0.98}}"
    file.write_text(re.sub(r"  - \{use: grokfast.*", line, text))
    done = subprocess.run(
        [sys.executable, "-m", "forge_kernel", "check", "mine.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    sample = next(block for kind, block in BLOCKS if kind == "" and "gradients[0]" in block)
    shown = [part.strip() for part in sample.splitlines()[1:] if part.strip()]
    for part in shown:
        piece = part.removesuffix("...").strip().removeprefix("14 |").strip()
        assert piece in done.stderr, f"{piece!r} is not in\n{done.stderr}"


@pytest.mark.deep
def test_a_fresh_clone_is_set_up_and_run_by_the_commands_of_the_readme(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for command in [
        line for line in SHELL if line.startswith(("python3 -m venv", ".venv/bin/pip"))
    ]:
        subprocess.run(command, shell=True, cwd=clone, check=True)
    done = subprocess.run(["make", "run"], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.spec("K14")
def test_the_floors_that_the_readme_states_are_those_that_are_installed_by() -> None:
    # Planted: another version in the README.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    torch = next(one for one in project["dependencies"] if one.startswith("torch>="))
    text = (ROOT / "README.md").read_text()
    assert f"Python {python}" in text
    assert f"PyTorch {torch.removeprefix('torch>=')}" in text


@pytest.mark.spec("K16")
def test_nothing_is_praised_without_a_metric() -> None:
    # Planted: "production-ready" in the README.
    texts = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    for text in texts:
        words = text.read_text().lower()
        for praise in ("production-ready", "high accuracy", "state-of-the-art", "blazing"):
            rows = [line for line in words.splitlines() if praise in line]
            assert all(line.startswith("| k16 |") for line in rows), (text.name, praise)
