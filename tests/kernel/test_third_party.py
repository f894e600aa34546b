"""Distributions by others: one that is well made, and several that are not."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from scratch_venv import (
    MYPY_CACHE,
    ROOT,
    ScratchVenv,
    build_wheels,
    copy_source,
    once,
    write_distribution,
)

from forge_kernel.contract.plugin import API_VERSION

PIPELINE = """\
forge: 1
run: {name: guest, device: cpu, max_steps: 6, log_every: 2}
data: {use: modular_arithmetic, with: {modulus: 11, batch_size: 16}}
model: {use: mlp, with: {hidden: [16]}}
optimizer: {use: sgd, with: {lr: 0.5}}
loss: {use: acme_focal, with: {gamma: 0}}
schedule: {use: acme_half, with: {schedule: {use: linear_warmup, with: {warmup_steps: 4}}}}
observers: [{use: acme_csv, with: {file: guest.csv}}]
"""

_PLUGIN = """\
from dataclasses import dataclass
from forge_kernel.api import Kind, PluginInfo, ScheduleFactors, hookimpl

@dataclass(frozen=True, kw_only=True)
class Config:
    "No settings."

class Plugin:
    "A schedule by somebody."
    info = PluginInfo(name="NAME", kind=Kind.SCHEDULE, config=Config, api=API)
    def __init__(self, config):
        self.config = config
    @hookimpl
    def compute_schedule_factors(self):
        return ScheduleFactors(1.0)
"""
_BROKEN = "raise ImportError('libacme.so.3 is not on this machine')\n"


def _plugin(name: str, api: tuple[int, int] = (API_VERSION, API_VERSION)) -> str:
    return _PLUGIN.replace("NAME", name).replace("API", str(api))


@pytest.fixture(scope="module")
def acme_wheel(shared: Path) -> Path:
    def make(folder: Path) -> None:
        build_wheels(folder, copy_source(ROOT / "tests" / "acme_forge", folder / "acme_forge"))

    (wheel,) = once(shared / "acme_wheel", make).glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def acme(shared: Path, project_wheel: Path, acme_wheel: Path) -> ScratchVenv:
    """An environment with acme-forge."""
    wheels = [project_wheel, acme_wheel]
    return ScratchVenv(once(shared / "acme", lambda folder: ScratchVenv.make(folder, wheels)))


@pytest.fixture(scope="module")
def crowded(shared: Path, project_wheel: Path, acme_wheel: Path) -> ScratchVenv:
    """An environment with acme-forge and all that can be wrong with a distribution."""

    def make(folder: Path) -> None:
        sources = folder / "sources"
        sources.mkdir()
        future = _plugin("future", (API_VERSION + 1, API_VERSION + 2))
        wheels = build_wheels(
            sources,
            write_distribution(sources, "acme-broken", _BROKEN, ["schedule.broken"]),
            write_distribution(sources, "acme-twin", _plugin("twin"), ["schedule.twin"]),
            write_distribution(
                sources, "other-twin", _plugin("twin"), ["schedule.twin"], version="2.5"
            ),
            write_distribution(sources, "acme-future", future, ["schedule.future"]),
            write_distribution(sources, "acme-stranger", _plugin("stranger"), ["schedule.friend"]),
            write_distribution(sources, "acme-misnamed", _plugin("name"), ["scheduel.name"]),
        )
        ScratchVenv.make(folder, [project_wheel, acme_wheel, *wheels])

    return ScratchVenv(once(shared / "crowded", make))


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_list_names_a_third_party_as_the_origin_of_its_plugins(
    acme: ScratchVenv, tmp_path: Path
) -> None:
    shown = acme.forge("plugins", cwd=tmp_path).stdout
    for name in ("acme_focal", "acme_csv", "acme_half"):
        assert re.search(rf"^  {name} +\S.*  \(acme-forge 0\.3\.0\)$", shown, re.MULTILINE), shown
    assert re.search(r"^  cross_entropy +Cross-entropy over classes\.$", shown, re.MULTILINE), shown
    assert "BROKEN" not in shown


def test_the_page_of_a_third_partys_plugin_shows_its_settings(
    acme: ScratchVenv, tmp_path: Path
) -> None:
    page = acme.forge("plugins", "acme_focal", cwd=tmp_path).stdout
    assert page.startswith("loss.acme_focal  (acme-forge 0.3.0, acme_forge.focal:AcmeFocal)")
    assert "gamma: number >= 0, default 2.0" in page
    assert "exponent of (1 - p)" in page
    assert "compute_loss(" in page


@pytest.mark.spec("J8")
def test_its_loss_its_observer_and_its_nested_schedule_take_part_in_a_run(
    acme: ScratchVenv, tmp_path: Path
) -> None:
    (tmp_path / "guest.yaml").write_text(PIPELINE)
    acme.forge("run", "guest.yaml", "-q", "--output-dir", "focal", cwd=tmp_path)
    plain = ("--set", "loss={use: cross_entropy}")
    acme.forge("run", "guest.yaml", "-q", "--output-dir", "plain", *plain, cwd=tmp_path)
    rows, expected = table(tmp_path / "focal/guest.csv"), table(tmp_path / "plain/guest.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([0.125, 0.25, 0.25])  # half of 0.5 min(step / 4, 1)
    losses = [float(row["loss"]) for row in rows]
    assert losses == pytest.approx([float(row["loss"]) for row in expected], rel=1e-4)
    origins = json.loads((tmp_path / "focal/environment.json").read_text())["plugins"]
    assert "acme-forge 0.3.0" in origins.values()


def test_the_settings_of_its_plugins_are_checked_where_they_stand(
    acme: ScratchVenv, tmp_path: Path
) -> None:
    wrong = PIPELINE.replace("gamma: 0", "gamma: -1").replace("warmup_steps: 4", "warmup: 4")
    (tmp_path / "guest.yaml").write_text(wrong)
    told = acme.forge("run", "guest.yaml", cwd=tmp_path, status=2).stderr
    assert re.search(r"guest\.yaml:6:\d+  loss\.with\.gamma", told), told
    assert re.search(r"guest\.yaml:7:\d+  schedule\.with\.schedule\.with\.warmup", told), told
    assert "see: forge plugins acme_focal" in told
    assert [path.name for path in tmp_path.iterdir()] == ["guest.yaml"]


def test_its_pipeline_runs_by_its_name(acme: ScratchVenv, tmp_path: Path) -> None:
    short = ("--set", "run.max_steps=10")
    done = acme.forge("run", "acme_modular", "-q", *short, cwd=tmp_path)
    folder = tmp_path / done.stdout.splitlines()[0]
    assert json.loads((folder / "result.json").read_text())["outcome"] == "completed"
    assert [row["step"] for row in table(folder / "metrics.csv")] == ["5", "10"]


def test_its_own_suite_passes_with_the_battery_for_every_plugin(
    acme: ScratchVenv, tmp_path: Path
) -> None:
    suite = copy_source(ROOT / "tests" / "acme_forge", tmp_path / "acme_forge")
    told = acme.pytest(cwd=suite)
    passed = set(re.findall(r"^PASSED (\S+)", told, re.MULTILINE))
    for name in ("loss.acme_focal", "observers.acme_csv", "schedule.acme_half"):
        for test in ("test_resumes_bit_for_bit", "test_writes_only_what_it_owns"):
            assert f"tests/test_contracts.py::{test}[{name}]" in passed
    assert "skipped" not in told


def test_its_types_are_right_against_the_installed_kernel(
    acme: ScratchVenv, tmp_path: Path, shared: Path
) -> None:
    suite = copy_source(ROOT / "tests" / "acme_forge", tmp_path / "acme_forge")
    told = acme.mypy(cwd=suite, cache=MYPY_CACHE)
    assert told.startswith("Success: no issues found")


def test_a_third_party_imports_nothing_of_the_kernel_but_its_public_face() -> None:
    found = set()
    for file in (ROOT / "tests/acme_forge/src").rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) (forge_\S+)", file.read_text(), re.MULTILINE))
    assert found == {"forge_kernel.api"}


def test_the_list_shows_what_is_broken_with_the_reason(
    crowded: ScratchVenv, tmp_path: Path
) -> None:
    shown = crowded.forge("plugins", cwd=tmp_path).stdout
    broken = {
        line.split()[0]: line for line in shown.splitlines() if "BROKEN" in line and line[0] == " "
    }
    assert set(broken) == {"broken", "twin", "future", "friend"}
    rows = {
        row["name"]: row["broken"]
        for row in json.loads(crowded.forge("plugins", "--json", cwd=tmp_path).stdout)["plugins"]
    }
    assert "ImportError: libacme.so.3 is not on this machine" in rows["broken"]
    assert "ImportError: libacme.so.3 is not on this machine" in broken["broken"]
    assert "its info says 'schedule.stranger'" in rows["friend"]
    assert rows["acme_focal"] is None
    assert re.search(r"BROKEN: acme-misnamed 1\.0: the entry point 'scheduel\.name'", shown), shown


@pytest.mark.spec("J8")
def test_what_is_broken_does_not_stand_in_the_way_of_a_run_that_does_not_use_it(
    crowded: ScratchVenv, tmp_path: Path
) -> None:
    (tmp_path / "guest.yaml").write_text(PIPELINE)
    crowded.forge("run", "guest.yaml", "-q", "--output-dir", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run/result.json").read_text())["outcome"] == "completed"


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("broken", ["acme-broken 1.0", "ImportError: libacme.so.3 is not on this machine"]),
        ("twin", ["'schedule.twin' is offered twice", "acme-twin 1.0", "other-twin 2.5"]),
        (
            "future",
            [
                "acme-future 1.0",
                f"plugin interface {API_VERSION + 1} to {API_VERSION + 2}",
                f"this kernel has {API_VERSION}",
            ],
        ),
        ("friend", ["acme-stranger 1.0", "its info says 'schedule.stranger'"]),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["named", "nested"])
def test_a_pipeline_that_names_a_broken_plugin_is_refused_at_its_place(
    crowded: ScratchVenv, tmp_path: Path, name: str, reasons: list[str], nested: bool
) -> None:
    use = f"{{use: {name}}}"
    line = (
        f"schedule: {{use: acme_half, with: {{schedule: {use}}}}}" if nested else f"schedule: {use}"
    )
    text = re.sub(r"^schedule: .*$", line, PIPELINE, flags=re.MULTILINE)
    (tmp_path / "guest.yaml").write_text(text)
    told = crowded.forge("run", "guest.yaml", cwd=tmp_path, status=2).stderr
    path = "schedule.with.schedule.use" if nested else "schedule.use"
    place = f"guest.yaml:7:{line.rindex(name) + 1}  {path}"
    assert place in told, told
    for reason in reasons:
        assert reason in told, told
    assert "Traceback" not in told
    assert [file.name for file in tmp_path.iterdir()] == ["guest.yaml"]
