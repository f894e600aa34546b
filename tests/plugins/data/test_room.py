"""What the samples and the machine have no room for is refused before the first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from forge_kernel.errors import PluginError
from forge_plugins.data.file import open_file, to_batches
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.workers import too_many


def dealt(folder: Path, count: int, **chosen: Any) -> Any:
    np.savez(folder / "x.npz", input=np.arange(float(count)), target=np.arange(count) % 2)
    config = FileConfig(path=str(folder / "x.npz"), cache_dir=str(folder / "c"), **chosen)
    world = {"world": 2} if chosen.get("split_seed") == 9 else {}
    return to_batches(open_file(config), config, 0, **world)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("count", "chosen", "told"),
    [
        (3, {"batch_size": 4, "validation_split": 0.0}, "3 samples .* batch has 4 .* lower batch_size, or set drop_last"),
        (1797, {"batch_size": 64, "validation_split": 0.99999}, "1 samples .* lower batch_size or validation_split, or"),
        (9, {"batch_size": 8}, "8 samples|1 samples"),
        (9, {"batch_size": 5, "validation_split": 0.0, "split_seed": 9}, "9 samples .* has 10"),
    ],
)  # fmt: skip
def test_drop_last_that_leaves_no_batch_is_refused_with_both_settings(
    count: int, chosen: Any, told: str, streaming: bool, tmp_path: Path
) -> None:
    """Planted fault: the run began and ended in an error of the loop."""
    if told.startswith("8"):  # exactly one batch is left
        assert dealt(
            tmp_path, count, drop_last=True, streaming=streaming, **chosen
        ).batches_per_epoch
        return
    with pytest.raises(PluginError, match=told):
        dealt(tmp_path, count, drop_last=True, streaming=streaming, **chosen)
    assert dealt(tmp_path, count, streaming=streaming, **chosen).batches_per_epoch == 1


LIMITED = """
import resource, sys
from forge_plugins.data.file import FileConfig, to_batches, open_file
limit, workers, prefetch, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
config = FileConfig(path="shipped:digits.frec", workers=workers, prefetch=prefetch, batch_size=size)
data = to_batches(open_file(config), config, 0)
print(sum(len(batch.inputs) for batch in data.batches(0, 0)))
"""


def limited(*numbers: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, *map(str, numbers)]
    return forked.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
@pytest.mark.parametrize(("limit", "workers", "prefetch"), [(64, 31, 2), (1024, 31, 32)])
def test_more_workers_than_the_process_may_have_files_for_are_refused(
    limit: int, workers: int, prefetch: int
) -> None:
    """Planted fault: `[Errno 24]; was it killed, or is the memory full?` in the first epoch."""
    done = limited(limit, workers, prefetch, 1)
    told = done.stderr.strip().splitlines()[-1]
    assert f"workers: {workers} with prefetch: {prefetch} need about" in told
    assert f"this process may have {limit}: lower workers or prefetch, or allow more" in told


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_workers_that_fit_are_let_alone() -> None:
    done = limited(256, 2, 2, 64)
    assert done.stdout.split() == ["1617"], done.stderr


def test_an_epoch_of_few_batches_needs_few_files() -> None:
    assert too_many(0, None, 10**6) is None
    assert too_many(2, 64, 1) is None
    assert "workers: 1000000 with prefetch: 64" in (too_many(10**6, 64, 10**9) or "")


BEGUN = """
import sys
from forge_plugins.data import workers
from forge_plugins.data.file import FileConfig, to_batches, open_file
import resource, multiprocessing
config = FileConfig(path="shipped:digits.frec", workers=8)
data = to_batches(open_file(config), config, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
try:
    next(iter(data.batches(0, 0)))
except Exception as error:
    print(type(error).__name__, error)
print(len(multiprocessing.active_children()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_workers_that_cannot_be_begun_are_told_and_none_is_left_behind() -> None:
    command = [sys.executable, "-c", BEGUN]
    done = forked.run(command, capture_output=True, text=True, check=False, timeout=300)
    told, left = done.stdout.strip().splitlines()
    assert "RunError 8 workers cannot be begun: [Errno 24] Too many open files" in told
    assert "lower workers or prefetch" in told
    assert left == "0"
