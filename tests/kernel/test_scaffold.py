"""`forge new plugin`: what it writes is fit to be published, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scratch_venv import MYPY_CACHE, ScratchVenv, build_wheels, copy_source, once

from forge_kernel.cli.scaffold import KINDS

LONG = "acme-" + "x" * 35  # the longest name that is taken


def names() -> dict[str, str]:
    """The kind of each package that is generated, by its name."""
    return {**{f"acme-{kind}": kind for kind in KINDS}, LONG: "observers"}


@pytest.fixture(scope="module")
def packages(shared: Path, installed: ScratchVenv) -> Path:
    """A folder with a new package of each kind."""

    def make(folder: Path) -> None:
        for name, kind in names().items():
            done = installed.forge("new", "plugin", name, "--kind", kind, cwd=folder)
            assert name in done.stdout

    return once(shared / "packages", make)


@pytest.fixture(scope="module")
def with_packages(shared: Path, project_wheel: Path, packages: Path) -> ScratchVenv:
    """An environment in which all of them are installed."""

    def make(folder: Path) -> None:
        sources = [copy_source(packages / name, folder / "sources" / name) for name in names()]
        ScratchVenv.make(folder, [project_wheel, *build_wheels(folder / "sources", *sources)])

    return ScratchVenv(once(shared / "with_packages", make))


@pytest.fixture
def fresh(packages: Path, tmp_path: Path) -> Path:
    """The packages in a folder that the test may write to."""
    return copy_source(packages, tmp_path / "packages")


@pytest.mark.parametrize(
    "battery",
    [
        pytest.param(("exporters", "gradients", "loss"), id="some"),
        pytest.param(KINDS, id="all", marks=pytest.mark.deep),
    ],
)
def test_a_new_package_of_each_kind_passes_its_own_tests(
    with_packages: ScratchVenv, fresh: Path, battery: tuple[str, ...]
) -> None:
    """In one process. Plainly the battery runs for plugins of three kinds, which compute, change
    and write."""
    told = with_packages.pytest(
        "--import-mode=importlib",
        "-c", fresh / "acme-loss" / "pyproject.toml",
        "--rootdir", fresh,
        "-W", "error",
        "-o", "forge_distributions=" + "\n".join(f"acme-{kind}" for kind in battery),
        fresh / "acme-loss" / "tests" / "test_contracts.py",
        *[fresh / name / "tests" / "test_plugin.py" for name in names()],
        cwd=fresh,
    )  # fmt: skip
    passed = re.findall(r"^PASSED (\S+)", told, re.MULTILINE)
    done = "acme-loss/tests/test_contracts.py::test_resumes_bit_for_bit"
    assert {f"{done}[{kind}.acme_{kind}]" for kind in battery} <= set(passed)
    for name in names():
        assert f"{name}/tests/test_plugin.py::test_its_entry_point_leads_to_it" in passed
    assert not re.search(r"\d+ (skipped|xfailed|warning)", told), told


def test_the_commands_that_its_readme_names_work_in_its_folder(
    with_packages: ScratchVenv, fresh: Path
) -> None:
    some = ("-k", "entry_point or default or round_trip")  # all of it ran above
    told = with_packages.pytest(*some, cwd=fresh / "acme-regularizers")
    assert "test_settings_survive_the_round_trip[regularizers.acme_regularizers]" in told
    assert "acme_loss" not in told
    readme = (fresh / "acme-regularizers" / "README.md").read_text()
    assert "forge plugins acme_regularizers" in readme
    page = with_packages.forge("plugins", "acme_regularizers", cwd=fresh).stdout
    assert page.startswith("regularizers.acme_regularizers  (acme-regularizers 0.1.0")
    assert "scale: number > 0, default 1.0" in page


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_its_readme_has_a_place_in_a_pipeline(
    with_packages: ScratchVenv, fresh: Path, kind: str
) -> None:
    readme = (fresh / f"acme-{kind}" / "README.md").read_text()
    (example,) = re.findall(r"In a pipeline: `(.*)`", readme)
    key, _, use = example.partition(": ")
    done = with_packages.forge("plan", "smoke", "--set", f"{key}={use}", cwd=fresh)
    assert re.search(rf"{kind}\S* acme_{kind} +acme-{kind} 0\.1\.0", done.stdout), done.stdout


@pytest.mark.parametrize("name", names())
def test_a_new_package_keeps_to_its_own_style(
    with_packages: ScratchVenv, fresh: Path, name: str
) -> None:
    for command in (["check"], ["format", "--check"]):
        with_packages.run("-m", "ruff", *command, "--no-cache", ".", cwd=fresh / name)


def test_the_types_of_new_packages_are_right(
    with_packages: ScratchVenv, fresh: Path, shared: Path
) -> None:
    modules = [part for name in names() for part in ("-p", name.replace("-", "_"))]
    settings = fresh / "acme-loss" / "pyproject.toml"
    for arguments in (["--config-file", settings, *modules], []):  # all, and as its author calls it
        folder = fresh if arguments else fresh / "acme-loss"
        told = with_packages.mypy(*arguments, cwd=folder, cache=MYPY_CACHE)
        assert told.startswith("Success: no issues found")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["Acme"], "'Acme' makes no package name"),
        (["acme-"], "'acme-' makes no package name"),
        (["acme--loss"], "'acme--loss' makes no package name"),
        (["9lives"], "'9lives' makes no package name"),
        (["../acme"], "'../acme' makes no package name"),
        (["acme.loss"], "'acme.loss' makes no package name"),
        ([""], "'' makes no package name"),
        (["class"], "'class' makes no package name"),
        ([LONG + "x"], "makes no package name"),
        (["json"], "there is a module 'json' already"),
        (["torch"], "there is a module 'torch' already"),
        (["forge-kernel"], "there is a module 'forge_kernel' already"),
        (["clip-norm", "--kind", "gradients"], "there is a plugin 'gradients.clip_norm' already"),
        (["acme", "--kind", "observer"], "did you mean 'observers'"),
        (["acme", "--kind", "nonsense"], f"allowed: {', '.join(KINDS)}"),
        (["acme", "--directory", "taken.txt"], "cannot write taken.txt/acme"),
        (["taken"], "taken is there already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(
    installed: ScratchVenv, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.py").write_text("mine\n")
    (tmp_path / "taken.txt").write_text("a file\n")
    before = sorted(tmp_path.rglob("*"))
    told = installed.forge("new", "plugin", *arguments, cwd=tmp_path, status=2).stderr
    assert reason in told
    assert "Traceback" not in told
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken" / "mine.py").read_text() == "mine\n"
