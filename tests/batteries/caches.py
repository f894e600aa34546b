"""Damage to what data plugins keep: found and made anew, the data are the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import h5py
import numpy as np
import torch
from battery import Battery, Trial

from forge_kernel.contract.run_config import RunConfig
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.text import Text
from forge_plugins.data.text_config import TextConfig
from forge_plugins.formats.columns import cache, source_file

COUNT, GRAIN = 60, 0.02  # seconds in which a clock of files may stand still


class Run:
    """What a data plugin asks of a run."""

    seed, strategy, settings = 0, OneProcess(), RunConfig()

    def emit_event(self, *_: Any, **__: Any) -> None:
        """Nobody listens."""


def write_files(folder: Path) -> dict[str, Path]:
    """One file of each form that is kept converted, and of two whose places are remembered."""
    drawn = np.random.default_rng(0)
    columns = {
        "input": drawn.standard_normal((COUNT, 4)).astype(np.float32),
        "target": (np.arange(COUNT) % 3).astype(np.int64),
    }
    rows = zip(columns["input"].tolist(), columns["target"].tolist(), strict=True)
    lines = [json.dumps({"input": row, "target": target}) for row, target in rows]
    (folder / "a.jsonl").write_text("\n".join([*lines[:50], lines[3], lines[3], *lines[50:]]))
    (folder / "b.json").write_text(f"[{','.join(lines)}]")
    np.savez_compressed(folder / "c.npz", **columns)
    with h5py.File(folder / "d.h5", "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, chunks=True, compression="gzip")
    torch.save(
        {name: torch.from_numpy(column) for name, column in columns.items()}, folder / "e.pt"
    )
    texts = [{"text": " ".join(str(n * k) for k in range(30))} for n in range(20)]
    (folder / "f.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return {path.name: path for path in sorted(folder.iterdir())}


def digest(file: Path, folder: Path) -> str:
    """A hash of all that a run would be given of a file."""
    plugin: Any
    if file.name == "f.jsonl":
        plugin = Text(TextConfig(
            path=str(file), cache_dir=str(folder), sequence_length=16, batch_size=4,
            tokenizer="characters", validation_split=0.2,
        ))  # fmt: skip
    else:
        threshold = 0.5 if file.name == "a.jsonl" else 0.0  # which rows are kept, is kept too
        plugin = File(FileConfig(
            path=str(file), cache_dir=str(folder), batch_size=7, classes=3, validation_split=0.2,
            quality_threshold=threshold,
        ))  # fmt: skip
    data = plugin.make_data(Run())
    result = hashlib.sha256()
    for batch in [*data.batches(0, 0), *data.validation()]:
        for tensor in (batch.inputs, batch.targets):
            result.update(repr(tensor.tolist()).encode())
    return result.hexdigest()


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """A file of the cache is altered, taken away or exchanged; then the data are opened."""
    # memos are believed a moment after their files were written, so that they are tried too
    cache.SETTLED = source_file.SETTLED = 0.0  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        (place / "data").mkdir()
        files = write_files(place / "data")
        folders = {name: place / f"cache-{name}" for name in files}
        known = {name: digest(file, folders[name]) for name, file in files.items()}
        for number in range(count):
            name = draw.choice(list(files))
            folder = folders[name]
            if digest(files[name], folder) != known[name]:
                yield Trial(f"{name} undamaged", "other data")
                shutil.rmtree(folder)
                continue
            time.sleep(GRAIN)
            kept = sorted(path for path in folder.rglob("*") if path.is_file())
            what = damaged(draw.choice(kept), kept, draw)
            said = f"{name}: {what}"
            try:
                wrong = "" if digest(files[name], folder) == known[name] else "other data"
            except Exception as error:  # noqa: BLE001  what ends a run
                wrong = f"{type(error).__name__}: {error}"[:300]
            if wrong:
                shutil.rmtree(folder)
            yield Trial(f"{said} ({number})", wrong)


def damaged(file: Path, others: list[Path], draw: random.Random) -> str:
    """Do some damage; what it was."""
    content = file.read_bytes()
    kind = draw.choice(
        ["flip", "flip", "flip", *damage.ALTERATIONS, "missing", "exchanged", "empty"]
    )
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "exchanged":
        file.write_bytes(draw.choice(others).read_bytes())
    elif len(content) > 64:
        about = file.stat()
        file.write_bytes(damage.ALTERATIONS[kind](content, draw))
        if draw.random() < 0.3:
            os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    return f"{kind} of {file.parent.name[:8]}/{file.name[:12]}"


BATTERY = Battery(
    name="caches",
    promise="the data are the same, no error",
    ci=200,
    deep=2_000,
    trials=trials,
)
