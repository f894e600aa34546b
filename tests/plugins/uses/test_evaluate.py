"""A trained run measured again: on its own validation data, and on all of a file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from torch.nn import functional

from forge_kernel import evaluate_run, load_run, run
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline

PLAIN = ("run.max_steps=4", "observers=null", "callbacks=null", "exporters=null")


def digits(folder: Path, *settings: str) -> Path:
    chosen = ["data={use: file}", "model={use: mlp, with: {hidden: [8]}}", *PLAIN, *settings]
    run(load_pipeline("smoke", chosen), output_dir=folder, quiet=True)
    return folder


def test_its_own_data_give_the_metrics_of_the_end(tmp_path: Path) -> None:
    folder = digits(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    metrics = evaluate_run(folder)
    final = json.loads((folder / "result.json").read_text())["final"]
    assert metrics == {
        name.removeprefix("validation_"): value
        for name, value in final.items()
        if name.startswith("validation_")
    }
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_all_samples_of_a_file_count_once(tmp_path: Path) -> None:
    """Planted: the last batch left out; the part for validation alone; a mean of means."""
    folder = digits(tmp_path / "run", "data.with.cache_dir=null")
    draws = np.random.default_rng(1)
    inputs = draws.normal(size=(777, 64)).astype(np.float32)
    targets = draws.integers(0, 10, 777)
    targets[::7] = -100
    np.savez(tmp_path / "new.npz", input=inputs, target=targets)
    metrics = evaluate_run(folder, tmp_path / "new.npz")
    with torch.no_grad():
        logits = load_run(folder).model(torch.from_numpy(inputs))
    wanted = torch.from_numpy(targets)
    assert metrics["loss"] == pytest.approx(
        float(functional.cross_entropy(logits, wanted)), rel=1e-5
    )
    counted = wanted >= 0
    right = (logits.argmax(-1) == wanted)[counted].double().mean()
    assert metrics["accuracy"] == pytest.approx(float(right))


def test_a_text_is_read_by_the_runs_tokenizer_to_its_last_sequence(tmp_path: Path) -> None:
    settings = [
        "model.with.width=32", "model.with.layers=1", "model.with.heads=2", "model.with.groups=1",
        "data.with.sequence_length=32", "data.with.batch_size=2", "run.validate_every=null", *PLAIN,
    ]  # fmt: skip
    folder = tmp_path / "run"
    run(
        load_pipeline("char_llama_gguf", [*settings, "run.max_steps=2"]),
        output_dir=folder,
        quiet=True,
    )
    text = "Some text that nobody has read before. " * 9
    (tmp_path / "new.txt").write_text(text)
    metrics = evaluate_run(folder, tmp_path / "new.txt")
    opened = load_run(folder)
    tokens = torch.cat([opened.tokenizer.encode(text), torch.tensor([opened.tokenizer.end])])
    count = (len(tokens) - 1) // 32
    rows = torch.stack([tokens[32 * row : 32 * row + 33] for row in range(count)])
    with torch.no_grad():
        logits = opened.model(rows[:, :-1])
    loss = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    done = forked.run(
        [sys.executable, "-m", "forge_kernel", "evaluate", str(folder), "--data",
         str(tmp_path / "new.txt"), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout) == metrics, done.stderr


@pytest.mark.parametrize("what", ["no run", "no file", "wrong columns", "other data"])
def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "new.npz"
    np.savez(file, input=np.zeros((4, 7), np.float32), target=np.zeros(4, np.int64))
    folder = tmp_path / "run"
    if what == "other data":
        run(load_pipeline("smoke", PLAIN), output_dir=folder, quiet=True)
    elif what != "no run":
        digits(folder)
    if what == "no file":
        file = tmp_path / "nowhere.npz"
    with pytest.raises(ConfigError, match="run folder|such file|in a sample|reads no file"):
        evaluate_run(folder, file)
