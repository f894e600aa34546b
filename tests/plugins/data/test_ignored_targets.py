"""Targets that count for nothing: read from every format, no label, never out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from table_files import write

from forge_kernel import load_pipeline, run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import PluginError
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File, open_file, to_batches
from forge_plugins.data.file_config import FileConfig

INPUTS = np.arange(12).reshape(4, 3)
TARGETS = np.array([[1, 2, -100], [-100, 5, 6], [7, 8, 9], [-100, -100, -100]])


def dealt(file: Path, ignore: dict[str, int] | None = None, **chosen: Any) -> Any:
    plain = {"validation_split": 0.0, "shuffle": False, "cache_dir": str(file.parent / "c")}
    config = FileConfig(path=str(file), **{**plain, **chosen})
    return to_batches(open_file(config), config, 0, **(ignore or {}))


@pytest.mark.parametrize("chosen", [{}, {"streaming": True}, {"quality_threshold": 0.5}])
@pytest.mark.parametrize(
    "suffix", ["jsonl", "pkl", "pt", "npz", "h5", "frec", "safetensors", "parquet"]
)
def test_padding_is_read_from_every_format(suffix: str, chosen: Any, tmp_path: Path) -> None:
    file = write(tmp_path / f"x.{suffix}", INPUTS, TARGETS)
    data = dealt(file, input="tokens", target="next", **chosen)
    assert data.left_out == {}
    assert (data.spec.vocabulary, data.spec.classes) == (12, 12)
    assert next(iter(data.batches(0, 0))).targets.tolist() == TARGETS.tolist()


def test_padding_is_no_class(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.arange(4.0), np.array([0, 2, -100, 1]))
    assert dealt(file).spec.classes == 3
    assert dealt(file, classes=3).left_out == {}
    with pytest.raises(PluginError, match="record 2, field 'target': cannot be used: label out of"):
        dealt(file, {"ignore_index": -1})
    file = write(tmp_path / "y.npz", np.arange(4.0), np.array([0, 2, 255, 1]))
    assert dealt(file).spec.classes == 256
    assert dealt(file, {"ignore_index": 255}).spec.classes == 3
    assert dealt(file, {"ignore_index": 255}, classes=3).left_out == {}
    assert dealt(file, {"ignore_index": 0}).spec.classes == 256
    with pytest.raises(PluginError, match="record 2"):
        dealt(file, classes=3)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float32])
def test_padding_of_any_type_of_labels_stays_as_it_is(kind: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.arange(3.0), np.array([1, -100, 0], kind))
    [batch] = dealt(file).batches(0, 0)
    assert batch.targets.tolist() == [1, -100, 0]
    assert batch.targets.dtype == torch.int64


def test_numbers_to_be_predicted_are_never_padding(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.arange(3.0), np.array([1.5, -100.0, -100.0]))
    [batch] = dealt(file, target="number").batches(0, 0)
    assert batch.targets.tolist() == [[1.5], [-100.0], [-100.0]]


def test_a_file_of_nothing_but_padding_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.arange(3.0), np.full(3, -100))
    with pytest.raises(
        PluginError, match=r"field 'target': every label is -100.*run\.ignore_index"
    ):
        dealt(file)
    file = write(tmp_path / "y.npz", INPUTS, np.full((4, 3), -100))
    with pytest.raises(PluginError, match="every label is -100"):
        dealt(file, input="tokens", target="next", vocabulary=20)


def test_other_labels_below_0_are_still_out_of_range(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.arange(4.0), np.array([0, -100, -1, 1]))
    with pytest.raises(PluginError, match="record 2, field 'target'"):
        dealt(file)
    assert dealt(file, quality_threshold=0.5).left_out == {"label out of range": 1}


def test_the_run_says_which_number_it_is(tmp_path: Path) -> None:
    class Here:
        seed, strategy = 0, OneProcess()
        settings = RunConfig(ignore_index=255)

        def emit_event(self, *_: Any, **__: Any) -> None: ...

    file = write(tmp_path / "x.npz", np.arange(9.0), np.array([0, 1, 255] * 3))
    config = FileConfig(path=str(file), cache_dir=str(tmp_path / "c"))
    data = File(config).make_data(Here())  # type: ignore[arg-type]
    assert data.spec.classes == 2


@pytest.mark.parametrize("ignored", [-100, 7])
def test_a_run_trains_on_a_file_with_padding(ignored: int, tmp_path: Path) -> None:
    rows = np.tile(np.array([[2, 3, ignored]]), (8, 1))
    file = write(tmp_path / "x.jsonl", np.tile(np.array([[1, 2, 3]]), (8, 1)), rows)
    (tmp_path / "p.yaml").write_text(
        f"""
forge: 1
run: {{name: padded, seed: 0, device: cpu, max_steps: 2, ignore_index: {ignored}}}
data: {{use: file, with: {{path: {file}, input: tokens, target: next, vocabulary: 8, batch_size: 2, validation_split: 0.5, cache_dir: {tmp_path / "c"}}}}}
model: {{use: llama_decoder, with: {{layers: 1, width: 16, heads: 2, hidden: 16}}}}
optimizer: {{use: sgd}}
loss: {{use: cross_entropy}}
"""
    )
    result = run(load_pipeline(tmp_path / "p.yaml"), output_dir=tmp_path / "out", quiet=True)
    assert result.outcome == "completed"
