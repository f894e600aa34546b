"""BLEU: sacrebleu's own score of the whole set, whichever batches and ranks it is cut into."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from ranks import computed
from torch import Tensor

from forge_kernel.config.schema import bind_config
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PlanError, PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.runner import run
from forge_kernel.testing.trial import TrialWords
from forge_plugins.mathematics.text.generation import greedy_continuation
from forge_plugins.validators.bleu import BleuConfig, BleuMetric

sacrebleu = pytest.importorskip("sacrebleu")

WORDS = 11
LENGTH = 24


def successor(tokens: Tensor) -> Tensor:
    """Logits of a model that answers the next number, seven times in eight."""
    following = (tokens + 1) % WORDS
    wrong = tokens % 8 == 3
    return torch.nn.functional.one_hot(torch.where(wrong, 0, following), WORDS).float()


def windows(count: int) -> Batch:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(WORDS, (count, LENGTH + 1), generator=generator)
    counted = (rows[:, :1] + torch.arange(LENGTH + 1)) % WORDS  # half of the text is foretold
    rows[::2] = counted[::2]
    return Batch(rows[:, :-1], rows[:, 1:])


def metric(**settings: Any) -> BleuMetric:
    data = SimpleNamespace(tokenizer=TrialWords(), spec=SimpleNamespace(sequence=LENGTH))
    pretended: Any = SimpleNamespace(data=data, active_model=successor, device="cpu")
    made = BleuMetric(bind_config(BleuConfig, {"prompt": 5, "tokens": 20, **settings}), pretended)
    made.reset()
    return made


def fed(made: BleuMetric, batch: Batch, cuts: list[tuple[int, int]]) -> BleuMetric:
    for begin, end in cuts:
        part = Batch(batch.inputs[begin:end], batch.targets[begin:end])
        made.update(part, None, torch.zeros(()), 1.0)
    return made


def reference(batch: Batch, prompt: int = 5, tokens: int = 20, **settings: Any) -> float:
    rows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    written = []
    for row in rows:
        known = row[:prompt].tolist()
        for _ in range(tokens):
            known.append(int(successor(torch.tensor([known]))[0, -1].argmax()))
        written.append(TrialWords.decode(known[prompt:]))
    there = [TrialWords.decode(row[prompt : prompt + tokens].tolist()) for row in rows]
    return float(sacrebleu.corpus_bleu(written, [there], **settings).score)


@pytest.mark.spec("H7")
def test_the_score_of_two_ranks_with_uneven_batches_is_that_of_the_whole_set() -> None:
    """Red when the scores of batches are averaged, or a rank without a window does not add up."""
    batch = windows(13)
    wanted = {"bleu": pytest.approx(reference(batch))}
    assert 10 < wanted["bleu"].expected < 90
    assert computed([fed(metric(), batch, [(0, 1), (1, 9)]), fed(metric(), batch, [(9, 13)])]) == (
        wanted
    )
    assert computed([metric(), fed(metric(), batch, [(0, 13)])]) == wanted
    assert computed([metric(), metric()]) == {}


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"prompt": 9}, {"prompt": 9}),
        ({"tokens": 7}, {"tokens": 7}),
        ({"words": "char"}, {"tokenize": "char"}),
        ({"smoothing": "none", "tokens": 3}, {"smooth_method": "none", "tokens": 3}),
    ],
)
def test_each_setting_means_what_sacrebleu_means_by_it(
    settings: dict[str, Any], same: dict[str, Any]
) -> None:
    batch = windows(6)
    found = computed([fed(metric(**settings), batch, [(0, 6)])])["bleu"]
    if "prompt" in same:
        same = {"tokens": LENGTH + 1 - same["prompt"], **same}
        same["tokens"] = min(20, same["tokens"])
    assert found == pytest.approx(reference(batch, **same))
    assert found != pytest.approx(reference(batch), abs=1e-3)


def test_only_so_many_sequences_are_written_as_are_asked_for() -> None:
    batch = windows(9)
    first = Batch(batch.inputs[:4], batch.targets[:4])
    found = computed([fed(metric(sequences=4), batch, [(0, 3), (3, 6), (6, 9)])])
    assert found["bleu"] == pytest.approx(reference(first))
    whole = computed([fed(metric(sequences=None), batch, [(0, 9)])])
    assert whole["bleu"] == pytest.approx(reference(batch))


def test_the_model_reads_no_more_than_its_context() -> None:
    seen: list[int] = []

    def answer(tokens: Tensor) -> Tensor:
        seen.append(tokens.shape[1])
        return successor(tokens)

    written = greedy_continuation(answer, torch.tensor([[4, 5, 6]]), 4, context=4)
    assert written.tolist() == [[7, 8, 9, 10]]
    assert seen == [3, 4, 4, 4]


SMALL = [
    "run.max_steps=2", "run.validate_every=1", "data.with.sequence_length=16", "data.with.batch_size=4",
    "data.with.validation_split=0.002", "model.with.layers=1", "model.with.width=32",
    "model.with.hidden=32", "exporters=[]", "gradients=[]", "observers=[]",
]  # fmt: skip


def test_a_language_model_is_scored_in_its_run(tmp_path: Path) -> None:
    settings = [*SMALL, "validators=[{use: bleu, with: {prompt: 9, tokens: 8, words: char}}]"]
    pipeline = load_pipeline("char_llama_gguf", settings)
    result = run(pipeline, output_dir=tmp_path / "run", quiet=True)
    assert 0 <= result.best["bleu"] <= 100


def test_windows_that_are_too_short_are_refused(tmp_path: Path) -> None:
    settings = [*SMALL, "validators=[{use: bleu, with: {prompt: 9, tokens: 9}}]"]
    with pytest.raises(PluginError, match="9 tokens to read and 9 to write are more than the 17"):
        run(load_pipeline("char_llama_gguf", settings), output_dir=tmp_path / "run", quiet=True)


def test_data_that_is_no_text_is_refused_at_plan_time() -> None:
    with pytest.raises(PlanError, match="bleu needs data whose tokens can be written as text"):
        plan(load_pipeline("smoke", ["validators=[{use: bleu}]"]))


@pytest.mark.spec("H7")
def test_without_sacrebleu_the_run_is_refused_when_it_is_planned(tmp_path: Path) -> None:
    """Red when the metric is 0.0, or the run begins and fails at its first validation."""
    code = (
        "import sys; sys.modules['sacrebleu'] = None\n"
        "from forge_kernel import load_pipeline, plan\n"
        "plan(load_pipeline('char_llama_gguf', ['validators=[{use: bleu}]']))"
    )
    done = forked.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "PlanError" in done.stderr
    assert "validators.bleu needs the package sacrebleu, which is not installed" in done.stderr
    assert "pip install 'forge-kernel[metrics]'" in done.stderr
