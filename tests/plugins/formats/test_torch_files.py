"""Files of torch.save: known by what they hold, read by the safe loader, or told what to do."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table, sniff

INPUT, TARGET = torch.arange(6.0).reshape(3, 2), torch.arange(3)
COLUMNS = {"input": INPUT, "target": TARGET}


def opened(file: Path, form: str = "auto", **chosen: Any) -> Any:
    return open_table(file, form, Reading(**chosen), cache_dir=file.parent / "c")


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.npz", "x.pkl", "noname"])
def test_what_a_file_is_called_does_not_matter(name: str, tmp_path: Path) -> None:
    """Planted fault: by its first bytes it was an archive of numpy, and refused as a broken one."""
    torch.save(COLUMNS, tmp_path / name)
    assert opened(tmp_path / name).format == "torch"
    np.savez(tmp_path / "array.npz", **{key: column.numpy() for key, column in COLUMNS.items()})
    (tmp_path / name).write_bytes((tmp_path / "array.npz").read_bytes())
    if name not in ("x.pt", "x.pth"):
        assert sniff(tmp_path / name).name == "npz"
        assert opened(tmp_path / name).columns["input"].tolist() == INPUT.tolist()


FORMS: dict[str, Any] = {
    "columns": COLUMNS,
    "records": [{"input": x, "target": int(y)} for x, y in zip(INPUT, TARGET, strict=True)],
    "tensors in records": [{"input": x, "target": y} for x, y in zip(INPUT, TARGET, strict=True)],
    "lists": {"input": INPUT.tolist(), "target": TARGET.tolist()},
    "mixed": {"input": INPUT, "target": TARGET.tolist()},
    "pair": (INPUT, TARGET),
    "transposed": {"input": INPUT.T.contiguous().T, "target": TARGET},
    "a part": {"input": torch.cat([INPUT, INPUT])[3:], "target": torch.arange(9)[:3]},
    "bfloat16": {"input": INPUT.bfloat16(), "target": TARGET.to(torch.uint8)},
    "float8": {"input": INPUT.to(torch.float8_e4m3fn), "target": TARGET.to(torch.uint16)},
    "parameters": {"input": torch.nn.Parameter(INPUT), "target": TARGET},
    "with more": {**COLUMNS, "names": ["a"], "about": {"made": None}, "problem": torch.ones(9)},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_table(form: str, tmp_path: Path) -> None:
    torch.save(FORMS[form], tmp_path / "x.pt")
    for _ in range(2):  # converted, then from the cache
        table = opened(tmp_path / "x.pt")
        assert table.columns["input"].tolist() == INPUT.tolist()
        assert table.columns["target"].tolist() == TARGET.tolist()
        assert isinstance(table.columns["input"], np.memmap)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"input": INPUT.to_sparse()}, "a tensor that is no array of numbers"),
        ({"input": INPUT.to(torch.complex64)}, "'input': holds values of the type complex64"),
        ({"input": INPUT.numpy()}, r"it names numpy\S*_reconstruct; save tensors"),
        (torch.utils.data.TensorDataset(INPUT), r"it names torch\.utils\.data\.dataset\.TensorDataset"),
        (torch.nn.Linear(2, 2).state_dict(), r"no field 'input'; there are \['bias', 'weight'\]"),
        ([(x, 0) for x in INPUT], "record 0: the record is a tuple"),
        ((INPUT, TARGET, torch.ones(3)), "record 0: the record is a ndarray"),
        ({"input": INPUT, "target": TARGET[:2]}, "'target'.*2 records"),
        (3, "the whole is a int"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_by_what_it_is(value: Any, told: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(DataError, match=told) as caught:
        opened(tmp_path / "x.pt")
    assert "numpy.save" not in str(caught.value)
    assert caught.value.hint


def test_what_is_trusted_is_run(tmp_path: Path) -> None:
    torch.save({"input": INPUT.numpy(), "target": TARGET.numpy()}, tmp_path / "x.pt")
    table = opened(tmp_path / "x.pt", trust_pickle=True)
    assert table.columns["input"].tolist() == INPUT.tolist()
    with pytest.raises(DataError, match="is refused"):
        opened(tmp_path / "x.pt")


def test_no_cut_or_flipped_byte_raises_anything_else(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(COLUMNS, stream)
    whole, file = stream.getvalue(), tmp_path / "x.pt"
    generator = np.random.default_rng(0)
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:at] or b"x")
        with pytest.raises(DataError):
            opened(file)
        broken = bytearray(whole)
        broken[int(generator.integers(len(whole)))] ^= int(generator.integers(1, 256))
        file.write_bytes(broken)
        try:
            opened(file)
        except DataError:
            continue
