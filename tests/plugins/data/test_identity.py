"""A run is resumed on the data that it was begun with, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

MLP = """
forge: 1
run: {name: identity, seed: 0, device: cpu, max_steps: 4, log_every: 1}
data: {use: file, with: {path: rows.jsonl, cache_dir: cache, batch_size: 4}}
model: {use: mlp, with: {hidden: [4]}}
optimizer: {use: sgd, with: {lr: 0.1}}
loss: {use: cross_entropy}
"""
WORDS = """
forge: 1
run: {name: identity, seed: 0, device: cpu, max_steps: 4, log_every: 1}
data: {use: text, with: {path: words.txt, sequence_length: 4, batch_size: 2, validation_split: 0.2}}
model: {use: decoder_transformer, with: {layers: 1, width: 8, heads: 1}}
optimizer: {use: sgd, with: {lr: 0.1}}
loss: {use: cross_entropy}
"""


def forge(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_kernel", *words]
    return forked.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=120)


def rows(shift: float) -> str:
    lines = [{"input": [i + shift, 1.0], "target": i % 2} for i in range(40)]
    return "\n".join(map(json.dumps, lines))


@pytest.mark.parametrize(
    ("pipeline", "name", "first", "second"),
    [
        (MLP, "rows.jsonl", rows(0.5), rows(0.25)),
        (WORDS, "words.txt", "some words " * 40, "same words " * 40),
    ],
    ids=["file", "text"],
)
def test_a_changed_file_is_refused_until_it_is_meant(
    pipeline: str, name: str, first: str, second: str, tmp_path: Path
) -> None:
    """Planted fault: a comparison of the number of records alone went on with the other file."""
    (tmp_path / "p.yaml").write_text(pipeline)
    (tmp_path / name).write_text(first)
    ran = forge(tmp_path, "run", "p.yaml", "--output-dir", "out", "-q")
    assert ran.returncode == 0, ran.stderr
    more = ("--set", "run.max_steps=6", "-q")
    (tmp_path / name).write_text(second)
    refused = forge(tmp_path, "resume", "out", *more)
    assert refused.returncode == 2, refused.stderr
    assert name in refused.stderr
    assert "data.with.on_change=go_on" in refused.stderr
    assert "Traceback" not in refused.stderr
    (tmp_path / name).write_text(first)
    assert forge(tmp_path, "resume", "out", *more).returncode == 0
    (tmp_path / name).write_text(second)
    meant = forge(
        tmp_path, "resume", "out", "--set", "run.max_steps=8", "-q",
        "--set", "data.with.on_change=go_on",
    )  # fmt: skip
    assert meant.returncode == 0, meant.stderr
    assert "8 steps" in meant.stdout
