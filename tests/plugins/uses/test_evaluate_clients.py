"""A run measured by the programs that its exports are for, beside itself."""

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

from forge_kernel import evaluate_clients, evaluate_run, run
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline

ALL = ["torch", "transformers", "llama.cpp"]
TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of bytes, far from an even guess, with both exports, a classifier's sizes aside."""
    need("transformers", "xllamacpp", "tokenizers")
    folder = tmp_path_factory.mktemp("llama") / "run"
    (folder.parent / "text.txt").write_text(TEXT * 30)
    settings = [
        f"data.with.path={folder.parent / 'text.txt'}", "data.with.sequence_length=16",
        "model.with.width=64", "model.with.layers=1", "model.with.heads=2", "model.with.groups=1",
        "model.with.hidden=64", "run.max_steps=40", "run.validate_every=null", "schedule=null",
        "exporters=[{use: gguf, with: {type: q2_0, verify: false}}, "
        "{use: transformers, with: {verify: false}}]", "observers=null", "callbacks=null",
    ]  # fmt: skip
    run(load_pipeline("char_llama_gguf", settings), output_dir=folder, quiet=True)
    (folder.parent / "new.txt").write_text(TEXT[:120])
    return folder


def test_each_program_finds_the_targets_as_likely_as_the_run(llama: Path) -> None:
    """Bytes that are no whole text too, of which llama.cpp reports nothing by itself.

    Planted: the target's neighbour; the biased logits; the row before; a mean over texts.
    """
    file = llama.parent / "new.txt"
    found = evaluate_clients(llama, file, clients=ALL)
    own = evaluate_run(llama, file)
    assert own["loss"] < 4.5, "an even guess has 5.5"
    for name in ("loss", "perplexity", "bits_per_token", "bits_per_byte"):
        assert found["torch"][name] == pytest.approx(own[name], rel=1e-5), name
    assert found["torch"]["same_answer"] == 1
    for client in ALL[1:]:
        assert found[client]["loss"] == pytest.approx(own["loss"], rel=2e-3), client
        assert found[client]["same_answer"] > 0.95, client
        assert (
            found[client]["targets"]
            == found["torch"]["targets"]
            == len(file.read_bytes()) // 16 * 16
        )
        assert found[client]["step"] == 40


def test_the_first_targets_alone_are_asked_about_in_one_table(llama: Path) -> None:
    """Planted: the limit counts sequences; it is not applied to the run itself."""
    command = [sys.executable, "-m", "forge_kernel", "evaluate", str(llama), "--data",
               str(llama.parent / "new.txt"), "--with", "torch,llama.cpp", "--targets", "21"]  # fmt: skip
    done = forked.run(command, capture_output=True, text=True, check=False)
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert lines["metric"] == ["torch", "llama.cpp"], done.stderr
    assert lines["targets"] == ["21", "21"]
    assert lines["step"] == ["40", "40"]
    command[-3] = "torch"
    done = forked.run([*command, "--json"], capture_output=True, text=True, check=False)
    metrics = json.loads(done.stdout)
    assert metrics["torch"]["perplexity"] == pytest.approx(math.exp(metrics["torch"]["loss"]))
    model, tokens = _opened(llama)
    with torch.no_grad():
        scores = model(tokens[:32].view(2, 16)).log_softmax(-1).flatten(0, 1)[:21]
    nats = -scores[torch.arange(21), tokens[1:22]].mean()
    assert metrics["torch"]["loss"] == pytest.approx(float(nats), rel=1e-5)


def _opened(folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    from forge_kernel import load_run

    opened = load_run(folder)
    return opened.model, opened.tokenizer.encode((folder.parent / "new.txt").read_text())


def test_packed_conversations_are_asked_one_by_one(tmp_path: Path) -> None:
    """Planted: a packed sequence asked as one text; prompts that count."""
    need("transformers", "tokenizers", "jinja2")
    folder = make_chat_model(tmp_path / "model")
    chats = write_chats(tmp_path / "a.jsonl", 30)
    own = {
        "path": str(chats), "tokenizer": str(folder), "sequence_length": 96, "batch_size": 2,
        "cache_dir": str(tmp_path / "cache"), "too_long": "leave_out", "validation_split": 0.3,
    }  # fmt: skip
    settings = [
        f"data={{use: chat, with: {json.dumps(own)}}}", "run.max_steps=3",
        f"model={{use: transformers, with: {{path: {folder}}}}}", "callbacks=null",
        "loss={use: language_model}", "validators=[{use: language_model}]", "observers=null",
        "exporters=[{use: transformers, with: {layout: online, verify: false}}]",
        "run.validate_every=null",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    packed = evaluate_run(tmp_path / "run")
    found = evaluate_clients(tmp_path / "run", clients=["transformers", "torch"])
    for client, distance in (("torch", 1e-5), ("transformers", 1e-4)):
        assert found[client]["perplexity"] == pytest.approx(packed["perplexity"], rel=distance)


def test_a_classifier_is_compared_where_it_runs(tmp_path: Path) -> None:
    """Planted: samples that count for nothing are counted."""
    need("onnxruntime")
    settings = [
        "data={use: file, with: {cache_dir: null}}", "model={use: mlp, with: {hidden: [8]}}",
        "run.max_steps=4", "observers=null", "callbacks=null",
        "exporters=[{use: onnx, with: {verify: false}}]",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    draws = np.random.default_rng(1)
    targets = draws.integers(0, 10, 300)
    targets[::3] = -100
    inputs = draws.normal(size=(300, 64)).astype(np.float32)
    np.savez(tmp_path / "new.npz", input=inputs, target=targets)
    own = evaluate_run(tmp_path / "run", tmp_path / "new.npz")
    found = evaluate_clients(
        tmp_path / "run", tmp_path / "new.npz", clients=["onnxruntime", "torch"]
    )
    for metrics in found.values():
        assert metrics["loss"] == pytest.approx(own["loss"], rel=1e-3)
        assert metrics["targets"] == 200
        assert "perplexity" not in metrics


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        (["lama.cpp"], "--with lama.cpp: there is torch, transformers"),
        (["onnxruntime"], "has no export that onnxruntime reads.*forge export .* --use onnx"),
    ],
)
def test_a_program_that_cannot_be_asked_is_named(
    llama: Path, clients: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        evaluate_clients(llama, clients=clients)


def test_targets_that_are_numbers_are_refused(tmp_path: Path) -> None:
    draws = np.random.default_rng(1)
    np.savez(
        tmp_path / "x.npz", input=draws.normal(size=(60, 3)).astype(np.float32),
        target=draws.normal(size=60).astype(np.float32),
    )  # fmt: skip
    settings = [
        f"data={{use: file, with: {{path: {tmp_path / 'x.npz'}, cache_dir: {tmp_path / 'c'}, "
        "target: number}}", "model={use: mlp, with: {hidden: [4]}}", "loss={use: regression}",
        "validators=null", "run.max_steps=2", "observers=null", "callbacks=null", "exporters=null",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match=r"its targets are no classes or tokens"):
        evaluate_clients(tmp_path / "run", clients=["torch"])
