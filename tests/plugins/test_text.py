from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_kernel import load_pipeline, run
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_plugins.data.text_batches import Sequences, TokenSequences
from forge_plugins.data.text_config import TextConfig
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.text.chunks import cut, sequence_count
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer, CharacterTokenizer
from forge_plugins.validators.language_model import PerplexityMetric


@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_both_tokenizers(text: str) -> None:
    for tokenizer in (ByteTokenizer(), CharacterTokenizer.of(text)):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode([*tokens.tolist(), tokenizer.end]) == text
        assert not len(tokens) or int(tokens.max()) < tokenizer.vocabulary
        assert len(tokenizer.pieces()) == tokenizer.vocabulary


def test_an_unknown_character_is_shown_as_such() -> None:
    tokenizer = CharacterTokenizer.of("ab")
    assert tokenizer.decode(tokenizer.encode("axb")) == "a\N{REPLACEMENT CHARACTER}b"
    with pytest.raises(ValueError, match="twice"):
        CharacterTokenizer("aa")


def data(length: int = 4, batch_size: int = 3, count: int = 50) -> TokenSequences:
    row, place = np.arange(count, dtype=np.int32), cut(count, 0.2)
    config = TextConfig(sequence_length=length, batch_size=batch_size)
    return TokenSequences(row[:place], row[place:], config, 7, ByteTokenizer())


def windows(batches: Any) -> list[list[int]]:
    found = []
    for batch in batches:
        assert torch.equal(batch.targets[:, :-1], batch.inputs[:, 1:])
        found += torch.cat([batch.inputs, batch.targets[:, -1:]], 1).tolist()
    return found


def test_training_and_validation_share_no_token() -> None:
    source = data()
    trained = {
        token for epoch in range(9) for row in windows(source.batches(epoch, 0)) for token in row
    }
    validation = {token for row in windows(source.validation()) for token in row}
    assert trained
    assert validation
    assert trained.isdisjoint(validation)


@given(epoch=st.integers(0, 20), start=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_any_place_is_taken_up_exactly(epoch: int, start: int) -> None:
    source = data()
    whole = windows(source.batches(epoch, 0))
    assert windows(source.batches(epoch, start)) == whole[start:]
    assert len(list(source.batches(epoch, 0))) == source.batches_per_epoch
    assert len({row[0] for row in whole}) == len(whole)


def test_epochs_differ_in_offset_and_order() -> None:
    starts = [tuple(row[0] for row in windows(data().batches(epoch, 0))) for epoch in range(6)]
    assert len(set(starts)) == 6
    assert len({min(found) for found in starts}) > 1


def test_every_token_but_the_first_is_a_target_once() -> None:
    row = Sequences(np.arange(21, dtype=np.uint16), 5)
    batch = row.batch(np.arange(sequence_count(21, 5)) * 5)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.targets.reshape(-1).tolist() == list(range(1, 21))
    assert batch.inputs.untyped_storage().data_ptr() == batch.targets.untyped_storage().data_ptr()


SMALL = [
    "run.max_steps=2", "model.with={layers: 1, width: 256, heads: 2, hidden: 256}", "exporters=[]",
    "data.with.sequence_length=8", "data.with.batch_size=2", "observers=[]", "run.validate_every=null",
]  # fmt: skip


def test_a_file_of_ones_own_is_read_with_the_tokenizer_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("naïve words\n" * 60, encoding="utf-8")
    options = [*SMALL, f"data.with.path={file}", "data.with.validation_split=0.5"]
    for name, vocabulary in (("bytes", 257), ("characters", len(set("naïve words\n")) + 2)):
        pipeline = load_pipeline("char_llama_gguf", [*options, f"data.with.tokenizer={name}"])
        result = run(pipeline, output_dir=tmp_path / name, quiet=True)
        assert result.model is not None
        assert result.model.head.weight.shape[0] == vocabulary
        perplexity, loss = (result.final[f"validation_{key}"] for key in ("perplexity", "loss"))
        assert perplexity == pytest.approx(math.exp(loss or 0), rel=1e-3)


@pytest.mark.parametrize(("text", "words"), [(None, "no such file"), ("short", "too few")])
def test_a_text_that_cannot_serve_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    pipeline = load_pipeline("char_llama_gguf", [*SMALL, f"data.with.path={file}"])
    with pytest.raises(PluginError, match=words):
        run(pipeline, output_dir=tmp_path / "run", quiet=True)


def test_perplexity_is_over_all_targets_not_over_batches() -> None:
    metric = PerplexityMetric()
    zero = torch.zeros(())
    assert metric.compute(lambda value: value) == {}
    metric.update(Batch(None, torch.zeros(1, 1).long()), torch.zeros(1, 1, 2), zero, 1)
    metric.update(Batch(None, torch.zeros(1, 3).long()), torch.zeros(1, 3, 16), zero, 1)
    found = metric.compute(lambda value: value)
    assert found["bits_per_token"] == pytest.approx((1 + 3 * 4) / 4)
    assert found["perplexity"] == pytest.approx(2 ** ((1 + 3 * 4) / 4))
    metric.reset()
    assert metric.compute(lambda value: value) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 2}, {"hidden": 24}, {"activation": "relu2"}, {"sub_norms": True}, {"tied": True},
        {"attention_bias": True}, {"feed_bias": True}, {"epsilon": 0.05}, {"rotary_base": 50.0},
        {"layers": 2}, {"heads": 2, "groups": 2}, {"width": 24},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_of_the_llama_changes_the_network(change: dict[str, Any]) -> None:
    def outputs(**shape: Any) -> torch.Tensor:
        torch.manual_seed(0)
        sizes = {"width": 16, "layers": 1, "heads": 4, "groups": 4, "hidden": 32, **shape}
        model = Llama(LlamaShape(vocabulary=11, context=8, **sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.ones_(parameter)
        return model(torch.arange(8)[None]).detach()

    assert not torch.equal(outputs(), outputs(**change))


def test_asked_positions_are_those_of_the_whole_and_the_past_alone_counts() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaShape(vocabulary=11, context=8, width=16, layers=2, hidden=32))
    tokens = torch.arange(8)[None]
    whole = model(tokens)
    assert torch.allclose(model(tokens, slice(-2, None)), whole[:, -2:])
    changed = tokens.clone()
    changed[0, 5] = 9
    assert torch.allclose(model(changed)[:, :5], whole[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], whole[:, 5:])
