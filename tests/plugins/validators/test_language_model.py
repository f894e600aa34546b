"""Perplexity: of the plain cross-entropy, over uneven batches and ranks."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from clients import need
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import computed

from forge_kernel.contract.values import Batch
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_plugins.interchange.tokenizer_texts import probe_texts
from forge_plugins.mathematics.metrics.language_model import cross_entropy_sums, perplexity
from forge_plugins.mathematics.text.token_bytes import token_bytes
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer, CharacterTokenizer
from forge_plugins.validators.language_model import PerplexityMetric


def fed(
    logits: torch.Tensor, targets: torch.Tensor, cuts: list[int], ignored: int = -100
) -> PerplexityMetric:
    metric = PerplexityMetric()
    metric.reset()
    for begin, end in pairwise(cuts):
        batch = Batch(None, targets[begin:end], ignore_index=ignored)
        metric.update(batch, logits[begin:end], torch.zeros(()), 1.0)
    return metric


@pytest.mark.spec("H7")
@given(samples=st.integers(1, 30), seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_the_metrics_of_two_ranks_are_those_of_the_whole_set(
    samples: int, seed: int, share: float
) -> None:
    """Red when the perplexities of the batches are averaged."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, 5, generator=generator)
    targets = torch.randint(5, (samples,), generator=generator)
    targets[::4] = -7
    kept = targets != -7
    cut = round(samples * share)
    metrics = [
        fed(logits, targets, [0, cut // 2, cut], -7),
        fed(logits, targets, [cut, samples] if cut < samples else [], -7),
    ]
    found = computed(metrics)
    if not bool(kept.any()):
        assert found == {}
        return
    chances = logits[kept].double().log_softmax(-1)
    mean = -float(chances.gather(1, targets[kept].unsqueeze(1)).mean())
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    # the loss is a difference of fp32 logits of up to 10: no closer to zero than their rounding
    assert found["bits_per_token"] == pytest.approx(mean / math.log(2), rel=1e-5, abs=1e-6)


def test_a_perplexity_beyond_all_numbers_is_no_number() -> None:
    """Red when it is cut off at the largest one."""
    assert perplexity(5000.0) == math.inf
    logits = torch.tensor([[0.0, 5000.0]])
    assert computed([fed(logits, torch.tensor([0]), [0, 1])])["perplexity"] == math.inf


def test_no_target_is_passed_over_unless_it_is_named() -> None:
    logits, targets = torch.zeros(2, 3), torch.tensor([0, -100])
    with pytest.raises(IndexError):
        cross_entropy_sums(logits, targets, ignored=-1)
    kept = torch.tensor([1.0, 0.0])
    sums = cross_entropy_sums(logits, targets, kept, ignored=-100)
    assert sums.tolist() == pytest.approx([math.log(3), 1])


def test_a_run_measures_it_and_smoothing_does_not_change_it(tmp_path: Path) -> None:
    found = {}
    for name, smoothing in (("plain", 0.0), ("smooth", 0.2)):
        settings_ = [
            "run.max_steps=1", "run.validate_every=1", "validators=[{use: language_model}]",
            f"loss={{use: cross_entropy, with: {{label_smoothing: {smoothing}}}}}",
            "optimizer.with.lr=1e-12", "callbacks=[]", "observers=[{use: metrics_jsonl}]",
            "exporters=[]",
        ]  # fmt: skip
        run(load_pipeline("smoke", settings_), output_dir=tmp_path / name, quiet=True)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found[name] = next(line for line in lines if line["kind"] == "validation")
    plain, smooth = found["plain"], found["smooth"]
    assert plain["perplexity"] == pytest.approx(math.exp(plain["loss"]), rel=1e-5)
    assert smooth["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert smooth["loss"] != pytest.approx(plain["loss"])


def test_bits_by_the_byte_are_the_same_whatever_the_tokenizer(tmp_path: Path) -> None:
    """Planted: bytes of ignored targets counted; special tokens given their names' bytes."""
    need("tokenizers")
    texts = [text for text in probe_texts() if text]
    for tokenizer in (ByteTokenizer(), CharacterTokenizer.of("".join(texts)), byte_level(texts)):
        sizes = token_bytes(tokenizer)
        assert sizes is not None
        for text in texts:
            assert int(sizes[tokenizer.encode(text)].sum()) == len(text.encode()), text
        assert int(sizes[tokenizer.end]) == 0
    tokens = torch.cat([tokenizer.encode("naïve 😀"), torch.tensor([tokenizer.end, -100])])
    metric = PerplexityMetric(sizes=sizes)
    metric.reset()
    logits = torch.zeros(len(tokens), tokenizer.vocabulary)
    metric.update(Batch(None, tokens), logits, torch.zeros(()), 1.0)
    bits = (len(tokens) - 1) * math.log2(tokenizer.vocabulary)
    found = metric.compute(lambda value: value)
    assert found["bits_per_byte"] == pytest.approx(bits / len("naïve 😀".encode()))


def byte_level(texts: list[str]) -> LibraryTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return LibraryTokenizer(made.to_str())


def test_tokens_of_a_tokenizer_that_changes_texts_have_no_bytes() -> None:
    need("tokenizers")
    content = {"WordLevel": {"[SEP]": 0, "a": 1, "[UNK]": 2}}
    model = {"type": "WordLevel", "vocab": content["WordLevel"], "unk_token": "[UNK]"}
    lossy = LibraryTokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert token_bytes(lossy) is None
