"""One table of inputs and targets as a file of every format, by the suffix of its name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from forge_plugins.formats.readers.fixed_records import write_records


def write(file: Path, inputs: np.ndarray, targets: np.ndarray) -> Path:
    """The file, written."""
    columns = {"input": inputs, "target": targets}
    lists = [
        {"input": i, "target": t} for i, t in zip(inputs.tolist(), targets.tolist(), strict=True)
    ]
    if file.suffix == ".json":
        file.write_text(json.dumps(lists))
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, lists)))
    elif file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(lists))
    elif file.suffix == ".pickle":
        file.write_bytes(pickle.dumps(columns))
    elif file.suffix == ".pt":
        torch.save({name: torch.from_numpy(column) for name, column in columns.items()}, file)
    elif file.suffix == ".npz":
        np.savez(file, **columns)
    elif file.suffix == ".h5":
        with h5py.File(file, "w") as opened:
            for name, column in columns.items():
                opened[name] = column
    elif file.suffix == ".frec":
        write_records(file, columns)
    elif file.suffix == ".safetensors":
        save_file(columns, file)
    else:
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        table = pyarrow.table({name: column.tolist() for name, column in columns.items()})
        pyarrow.parquet.write_table(table, file)
    return file
