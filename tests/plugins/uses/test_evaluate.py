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
from chats import make_chat_model, write_chats
from clients import need
from torch.nn import functional

from forge_kernel import evaluate_run, load_run, run
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_plugins.data.chat import evaluated
from forge_plugins.data.chat_config import ChatConfig

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


def test_all_conversations_of_a_file_are_evaluated_as_training_reads_them(tmp_path: Path) -> None:
    """Planted: the part for validation alone; prompts that count; the run's own conversations."""
    need("transformers", "tokenizers", "jinja2")
    folder = make_chat_model(tmp_path / "model")
    chats = [write_chats(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", 40), ("b", 9))]
    own = {
        "path": str(chats[0]), "tokenizer": str(folder), "sequence_length": 96, "batch_size": 2,
        "cache_dir": str(tmp_path / "cache"), "too_long": "leave_out", "validation_split": 0.3,
    }  # fmt: skip
    settings = [
        f"data={{use: chat, with: {json.dumps(own)}}}", "quantizer=null",
        f"model={{use: transformers, with: {{path: {folder}}}}}", *PLAIN,
        "loss={use: language_model}", "validators=[{use: language_model}]",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    packed = evaluate_run(tmp_path / "run", chats[1])
    unpacked = ChatConfig(**{**own, "path": str(chats[1]), "packing": False, "batch_size": 1,
                             "validation_batch_size": 1})  # fmt: skip
    model, nats, count = load_run(tmp_path / "run").model, 0.0, 0
    with torch.no_grad():
        for batch in evaluated(unpacked, -100):
            logits = model(batch.inputs).logits.flatten(0, 1)
            targets = batch.targets.flatten()
            nats += float(functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets >= 0).sum())
    assert packed["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    with pytest.raises(ConfigError, match="cannot be evaluated: .*no such"):
        evaluate_run(tmp_path / "run", tmp_path / "none.jsonl")


def test_the_agreement_with_a_teacher_is_of_the_targets_that_count(tmp_path: Path) -> None:
    """Planted: ignored targets counted; the mean of the batches' shares."""
    pupil = digits(
        tmp_path / "a", "data.with.cache_dir=null", "data.with.validation_batch_size=100"
    )
    teacher = digits(tmp_path / "b", "run.seed=9", "run.max_steps=60")
    draws = np.random.default_rng(1)
    inputs = draws.normal(size=(250, 64)).astype(np.float32)
    targets = draws.integers(0, 10, 250)
    targets[:90:2] = -100
    np.savez(tmp_path / "new.npz", input=inputs, target=targets)
    found = evaluate_run(pupil, tmp_path / "new.npz", teacher=teacher)
    with torch.no_grad():
        answers = [
            load_run(folder).model(torch.from_numpy(inputs)).argmax(-1)
            for folder in (pupil, teacher)
        ]
    same = (answers[0] == answers[1])[torch.from_numpy(targets) >= 0].double().mean()
    assert 0 < float(same) < 1
    assert found["teacher_agreement"] == pytest.approx(float(same))
    assert "teacher_agreement" not in evaluate_run(pupil, tmp_path / "new.npz")
    done = forked.run(
        [sys.executable, "-m", "forge_kernel", "evaluate", str(pupil), "--teacher", str(pupil)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "teacher_agreement: 1" in done.stdout


def test_a_teacher_with_other_classes_is_refused(tmp_path: Path) -> None:
    pupil = digits(tmp_path / "a")
    np.savez(
        tmp_path / "x.npz",
        input=np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32),
        target=np.arange(300) % 3,
    )
    other = digits(
        tmp_path / "b", f"data.with={{path: {tmp_path / 'x.npz'}, cache_dir: {tmp_path / 'c'}}}"
    )
    with pytest.raises(ConfigError, match=r"gives 3 logits for each target, and .* 10"):
        evaluate_run(pupil, teacher=other)
