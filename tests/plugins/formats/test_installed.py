"""A format of a third party: found by its entry point, used as ours are; a broken one is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge_plugins.data.file_config import FileConfig
from forge_plugins.formats import registry
from forge_plugins.formats.format import Format

MODULE = """
import numpy as np
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format
from forge_plugins.formats.columns.layout import Layout

def read_numbers(file, columns, reading, names=None):
    rows = [line.split() for line in file.read_text().splitlines()[1:]]
    if not all(rows):
        raise DataError(file, "a line is empty", record=rows.index([]), hint="fill it")
    numbers = np.array(rows, np.float32)
    columns.append("input", numbers[:, 1:])
    columns.append("target", numbers[:, 0].astype(np.int64))

def layouts(file, reading):
    return {"input": Layout(dtype="<f4", shape=(file.stat().st_size // 8 - 1, 2), offset=8)}

NUMBERS = Format(name="numbers", suffixes=(".num",), magic=(b"NUMBERS",), read=read_numbers)
PLACED = Format(name="placed", magic=(b"PLACED!!",), layouts=layouts)
"""


@pytest.fixture
def third_party(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    about = folder / "acme_formats-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "acme_formats.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-formats\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[forge_kernel.formats]\nnumbers = acme_formats:NUMBERS\nplaced = acme_formats:PLACED\n"
        "broken = acme_formats:NOTHING\nwrong = acme_formats:layouts\n"
    )
    return folder


def forge(*words: str, cwd: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "forge_kernel", *words], cwd=cwd, env=environment, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


PIPELINE = """
forge: 1
run: {name: numbers, seed: 0, device: cpu, max_steps: 3}
data: {use: file, with: {path: x.num, format: numbers, batch_size: 4}}
model: {use: mlp}
optimizer: {use: sgd, with: {lr: 0.1}}
loss: {use: cross_entropy}
"""


def test_a_format_of_a_third_party_is_used_as_ours_are(third_party: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"{at % 3} {at}.5 {at + 1}" for at in range(30))
    (tmp_path / "x.num").write_text(f"NUMBERS\n{rows}\n")
    (tmp_path / "p.yaml").write_text(PIPELINE)
    told = forge("data", "x.num", "--json", cwd=tmp_path, site=third_party)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["format"], found["records"], found["labels"]) == (
        "numbers", 30, {"0": 10, "1": 10, "2": 10},
    )  # fmt: skip
    done = forge("run", "p.yaml", "--output-dir", "out", cwd=tmp_path, site=third_party)
    assert done.returncode == 0, done.stderr
    (tmp_path / "x.num").write_text(f"NUMBERS\n{rows}\n\n1 2 3\n")
    refused = forge("data", "x.num", cwd=tmp_path, site=third_party)
    assert refused.returncode == 2
    assert "x.num, record 30: a line is empty" in refused.stderr
    import numpy as np

    (tmp_path / "y.bin").write_bytes(b"PLACED!!" + np.arange(6, dtype="<f4").tobytes())
    told = forge("data", "y.bin", "--json", cwd=tmp_path, site=third_party)
    assert json.loads(told.stdout)["fields"]["input"]["largest"] == 5.0


def test_a_format_that_cannot_be_used_is_named_and_stands_in_nobodys_way(
    third_party: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text('[{"input": [1]}]')
    assert forge("data", "x.json", cwd=tmp_path, site=third_party).returncode == 0
    lines = forge("data", "--formats", cwd=tmp_path, site=third_party).stdout
    assert "the format broken of acme-formats cannot be loaded: AttributeError" in lines
    assert "the format wrong of acme-formats cannot be used" in lines
    done = forge("data", "x.json", "--format", "broken", cwd=tmp_path, site=third_party)
    assert done.returncode == 2
    assert "acme-formats" in done.stderr
    (tmp_path / "x.odd").write_text("?")
    done = forge("data", "x.odd", cwd=tmp_path, site=third_party)
    assert "the format broken of acme-formats" in done.stderr


def test_a_format_that_two_offer_is_refused(third_party: Path, tmp_path: Path) -> None:
    about = third_party / "acme_formats-1.0.dist-info" / "entry_points.txt"
    about.write_text("[forge_kernel.formats]\njson = acme_formats:NUMBERS\n")
    (tmp_path / "x.json").write_text('[{"input": [1]}]')
    done = forge("data", "x.json", "--format", "json", cwd=tmp_path, site=third_party)
    assert done.returncode == 2
    assert "offered twice" in done.stderr


def test_a_name_that_nobody_offers_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: jsn is not installed; did you mean json"):
        FileConfig(path="x", format="jsn")


def test_our_formats_are_what_their_entry_points_say() -> None:
    for name in registry.names():
        found = registry.load(name)
        assert isinstance(found, Format)
        assert found.name == name


def test_no_format_imports_its_library_before_it_is_used() -> None:
    """A file of one format needs no other's library: JSON reads without h5py and pyarrow."""
    program = (
        "import sys; sys.modules['h5py'] = sys.modules['pyarrow'] = None\n"
        "from forge_plugins.formats import registry\n"
        "assert not registry.known()[1]\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
