"""Which packages' plugins a pipeline may use, the lock of their source, and what imports do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

SCHEDULE = """\
from dataclasses import dataclass
from pathlib import Path
from forge_kernel.api import Kind, PluginInfo, ScheduleFactors, hookimpl

{effect}

@dataclass(frozen=True, kw_only=True)
class Config:
    "No settings."

class Plugin:
    "A schedule by somebody."
    info = PluginInfo(name="{name}", kind=Kind.SCHEDULE, config=Config)
    def __init__(self, config):
        self.config = config
    @hookimpl
    def compute_schedule_factors(self):
        return ScheduleFactors(1.0)
"""
MARK = 'Path("imported").touch()'
PIPELINE = """\
forge: 1
run: {name: guest, device: cpu, max_steps: 2}
data: {use: modular_arithmetic, with: {modulus: 11, batch_size: 16}}
model: {use: mlp, with: {hidden: [16]}}
optimizer: {use: sgd, with: {lr: 0.5}}
loss: {use: cross_entropy}
schedule: {use: SCHEDULE}
"""
COMMAND = """
import sys
sys.path.insert(0, {site!r})
sys.argv = ["forge", *{arguments!r}]
from forge_kernel.cli import main
main()
"""


class Place:
    """A folder with packages of others that Python finds as installed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        self.site.mkdir()

    def install(self, name: str, version: str = "1.0", effect: str = MARK) -> None:
        """A distribution with one schedule of its own name, and one format."""
        module = name.replace("-", "_")
        package = self.site / module
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / "plugin.py").write_text(SCHEDULE.format(name=module, effect=effect))
        about = self.site / f"{module}.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (about / "entry_points.txt").write_text(
            f"[forge_kernel.plugins]\nschedule.{module} = {module}.plugin:Plugin\n"
            f"[forge_kernel.formats]\n{module} = {module}.plugin:Plugin\n"
        )

    def file(self, schedule: str, rules: str = "") -> None:
        text = PIPELINE.replace("SCHEDULE", schedule)
        (self.folder / "p.yaml").write_text(text + (f"plugins: {rules}\n" if rules else ""))

    def forge(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return forked.run(
            [sys.executable, "-c", COMMAND.format(site=str(self.site), arguments=arguments)],
            capture_output=True, text=True, cwd=self.folder, check=False,
        )  # fmt: skip

    @property
    def imported(self) -> bool:
        return (self.folder / "imported").exists()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ("", True), ("{allow: [acme-forge]}", True), ("{allow: [Acme_Forge]}", True),
        ("{allow: ['acme-*']}", True), ("{allow: []}", False), ("{allow: [forge-kernel]}", False),
        ("{allow: [acme]}", False),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_not_imported(place: Place, rules: str, allowed: bool) -> None:
    """Planted: a refusal after the import."""
    place.install("acme-forge")
    place.file("acme_forge", rules)
    done = place.forge("check", "p.yaml")
    assert done.returncode == (0 if allowed else 2), done.stderr
    assert place.imported == allowed
    if not allowed:
        assert "p.yaml:7:" in done.stderr
        assert (
            "'schedule.acme_forge' of acme-forge 1.0 is not allowed by plugins.allow" in done.stderr
        )


def test_no_command_imports_what_is_not_allowed(place: Place) -> None:
    place.install("acme-forge")
    place.file("acme_forge", "{allow: []}")
    for command in ("plan", "run", "lock"):
        assert place.forge(command, "p.yaml").returncode == 2
        assert not place.imported


def test_rules_that_are_wrong_allow_nothing_of_others(place: Place) -> None:
    place.install("acme-forge")
    place.file("acme_forge", "{allow: acme-forge}")
    done = place.forge("check", "p.yaml")
    assert done.returncode == 2
    assert "plugins.allow" in done.stderr
    assert not place.imported


def test_a_format_of_others_is_not_imported_either(place: Place) -> None:
    """Red when only kinds of plugins are asked: a file's format is found by asking them all."""
    import numpy as np

    place.install("acme-forge")
    np.savez(place.folder / "x.npz", input=np.zeros((8, 4), np.float32), target=np.zeros(8, int))
    place.file("constant", "{allow: []}")
    text = (place.folder / "p.yaml").read_text()
    text = text.replace(
        "{use: modular_arithmetic, with: {modulus: 11, batch_size: 16}}",
        "{use: file, with: {path: x.npz, batch_size: 4, cache_dir: cache}}",
    )
    (place.folder / "p.yaml").write_text(text.replace("schedule: {use: constant}\n", ""))
    done = place.forge("run", "p.yaml", "--quiet", "--output-dir", "out")
    assert done.returncode == 0, done.stderr
    assert not place.imported


def test_a_run_goes_on_under_its_rules(place: Place) -> None:
    place.install("acme-forge")
    place.file("acme_forge", "{allow: [acme-forge]}")
    assert place.forge("run", "p.yaml", "--quiet", "--output-dir", "out").returncode == 0
    assert "allow" in (place.folder / "out" / "config.yaml").read_text()
    (place.folder / "imported").unlink()
    done = place.forge("resume", "out", "--set", "plugins.allow=[]", "--set", "run.max_steps=3")
    assert done.returncode == 2
    assert not place.imported
    done = place.forge("resume", "out", "--set", "run.max_steps=3")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["nothing", "source", "file", "version", "package"])
def test_a_locked_plugin_is_what_it_was(place: Place, change: str) -> None:
    """Planted: versions compared alone; the source read after it was imported."""
    place.install("acme-forge")
    place.file("acme_forge", "{lock: plugins.lock}")
    done = place.forge("lock", "p.yaml")
    assert done.returncode == 0, done.stderr
    assert "5 plugins of acme-forge 1.0, forge-kernel" in done.stdout
    lock = json.loads((place.folder / "plugins.lock").read_text())["plugins"]
    assert lock["schedule.acme_forge"]["version"] == "1.0"
    (place.folder / "imported").unlink()
    if change == "source":
        place.install("acme-forge", effect=MARK + "\nX = 1")
    elif change == "file":
        (place.site / "acme_forge" / "more.py").touch()
    elif change == "version":
        place.install("acme-forge", version="1.1")
    elif change == "package":
        about = place.site / "acme_forge.dist-info" / "METADATA"
        about.write_text(about.read_text().replace("Name: acme-forge", "Name: acmf-forge"))
    done = place.forge("check", "p.yaml")
    assert done.returncode == (0 if change == "nothing" else 2), done.stderr
    assert place.imported == (change == "nothing")
    told = {
        "nothing": "", "source": "is not the one that was locked",
        "file": "is not the one that was locked",
        "version": "the version of 'schedule.acme_forge' is 1.1, locked is 1.0",
        "package": "the package of 'schedule.acme_forge' is acmf-forge, locked is acme-forge",
    }[change]  # fmt: skip
    assert told in done.stderr
    assert place.forge("lock", "p.yaml").returncode == 0
    assert place.forge("check", "p.yaml").returncode == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"), ("[]", "is no lock file of plugins"),
        ('{"forge-lock": 1, "plugins": {}}', "is not in the lock file"),
        ('{"forge-lock": 1, "plugins": {"loss.cross_entropy": 7}}', "is no lock file of plugins"),
    ],
)  # fmt: skip
def test_a_lock_that_is_none_is_refused(place: Place, content: str | None, told: str) -> None:
    place.file("linear_warmup, with: {warmup_steps: 2}", "{lock: l.lock}")
    if content is not None:
        (place.folder / "l.lock").write_text(content)
    done = place.forge("check", "p.yaml")
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


EFFECTS = {
    "files": 'Path("written").write_text("x")',
    "network": 'import socket; s = socket.socket(); s.connect_ex(("127.0.0.1", 9)); s.close()',
    "processes": 'import subprocess; subprocess.run(["true"])',
    "threads": 'import threading; threading.Thread(target=print, name="x").start(); '
    'import time; threading.Thread(target=time.sleep, args=(9,), name="sleeper", daemon=True).start()',
    "changes": 'import os; os.environ["OMP_NUM_THREADS"] = "7"',
    "prints": 'print("hello")',
    "error": "raise ImportError('libacme.so.3')",
    "exit": "import sys; sys.exit(3)",
    "death": "import os; os._exit(7)",
    "nothing": "X = 1",
}


def test_the_doctor_tells_what_an_import_does(place: Place) -> None:
    for name, effect in EFFECTS.items():
        place.install(f"acme-{name}", effect=effect)
    done = place.forge("doctor", "--plugins", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    seen = {name: result[f"schedule.acme_{name}"] for name in EFFECTS}
    assert seen["files"]["files"] == ["writes written"]
    assert "127.0.0.1" in seen["network"]["network"][0]
    assert "true" in seen["processes"]["processes"][0]
    assert seen["threads"]["threads"] == ["sleeper"]
    assert seen["changes"]["changes"] == ["environment (OMP_NUM_THREADS)"]
    assert seen["prints"]["prints"] == "hello"
    assert "libacme" in seen["error"]["error"]
    assert "SystemExit" in seen["exit"]["error"]
    assert "ended the process with 7" in seen["death"]["error"]
    kinds = ("files", "network", "processes", "threads", "changes", "prints", "error")
    ours = [row for row in result.values() if row["origin"].startswith("forge-kernel ")]
    assert len(ours) > 50
    for row in [seen["nothing"], *ours]:
        assert not any(row[kind] for kind in kinds), row
    told = place.forge("doctor", "--plugins").stdout
    assert f"{len(ours) + 1} of {len(result)} plugins do nothing but import" in told
    assert "schedule.acme_files (acme-files 1.0)\n  files: writes written" in told
