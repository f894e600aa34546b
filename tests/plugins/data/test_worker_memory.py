"""What the processes that fetch hold of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# in a process of its own: a fork of one that has run other tests copies pages of theirs
FETCH = """
import json, sys
from pathlib import Path
import psutil
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File
from forge_plugins.data.file_config import FileConfig


class Run:
    seed, strategy, settings = 0, OneProcess(), RunConfig()

    def emit_event(self, *_, **__):
        pass


def private(process):  # megabytes that it has written to and shares with nobody
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    lines = [line.split() for line in text.splitlines() if line.startswith("Private_Dirty")]
    return sum(int(line[1]) for line in lines) / 1024


config = FileConfig(
    path=sys.argv[1] + "/x.npy", workers=2, streaming=sys.argv[2] == "True", batch_size=256,
    classes=1, validation_split=0.0, cache_dir=sys.argv[1] + "/c",
)
data = File(config).make_data(Run())
before = set(psutil.Process().children())
held = []
for epoch in range(4):
    assert sum(len(batch.inputs) for batch in data.batches(epoch, 0)) == 40_000
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    held.append(max(map(private, workers)))
print(json.dumps(held))
"""


@pytest.mark.spec("B4", "B7")
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.parametrize("streaming", [True, False])
def test_a_worker_holds_little_and_no_more_after_each_epoch(
    streaming: bool, tmp_path: Path
) -> None:
    """Planted fault: samples as Python lists made each worker 300 MB larger in an epoch."""
    rows = np.zeros(40_000, [("input", "<f4", (128,)), ("target", "<i8")])
    rows["input"] = np.arange(40_000)[:, None]
    np.save(tmp_path / "x.npy", rows)
    done = subprocess.run(
        [sys.executable, "-c", FETCH, str(tmp_path), str(streaming)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])
    assert max(held) <= 25, held
    assert max(held[1:]) - held[0] <= 2, held
