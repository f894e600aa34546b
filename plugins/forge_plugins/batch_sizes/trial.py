"""Steps of a pipeline at one batch size, in this process: `python -m ...trial`.

Reads a JSON object from standard input (`file`, `settings`, `batch_size`, `seconds`) and writes one
to standard output. A process of its own, so that what runs out of memory here leaves nothing
behind.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import statistics
import sys
import time
from typing import Any

import torch

from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import check_document, read_document
from forge_kernel.planning.plan import plan
from forge_kernel.training.session import Session

WARM, LEAST, MOST = 2, 3, 50
"""Steps that are not counted; fewest and most that are."""


def opened(file: str, settings: list[str]) -> Session:
    """The pipeline without what only watches, decides or exports."""
    catalog = Catalog.installed()
    pipeline = check_document(read_document(file, settings), catalog)
    bare = dataclasses.replace(
        pipeline,
        run=dataclasses.replace(pipeline.run, non_finite="skip", checked=False),
        callbacks=(),
        exporters=(),
        observers=(),
    )
    return Session(plan(bare, catalog), quiet=True)


def measured(session: Session, size: int, seconds: float) -> dict[str, Any]:
    """The median step and the peak of memory, once the first steps are over."""
    run = session.run
    times: list[float] = []
    batches = itertools.chain.from_iterable(run.data.batches(epoch, 0) for epoch in range(1000))
    for number, batch in enumerate(batches):
        if len(batch.inputs) < size:
            if number == 0:
                return {"outcome": "data"}
            continue  # the last one of an epoch
        begin = time.perf_counter()
        _ = session.step(batch)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if number >= WARM:
            times.append(time.perf_counter() - begin)
        if len(times) >= MOST or (len(times) >= LEAST and sum(times) >= seconds):
            break
    step = statistics.median(times)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device)
    return {
        "outcome": "measured",
        "samples_per_second": size / step,
        "step_seconds": step,
        "peak_bytes": peak,
    }


def main() -> None:
    """One trial; running out of memory is an answer, not an error."""
    asked = json.load(sys.stdin)
    try:
        with opened(asked["file"], asked["settings"]) as session:
            result = measured(session, asked["batch_size"], asked["seconds"])
    except (MemoryError, torch.OutOfMemoryError):
        result = {"outcome": "memory"}
    except RuntimeError as error:
        if "memory" not in str(error):  # torch's CPU allocator raises a RuntimeError that says so
            raise
        result = {"outcome": "memory"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
