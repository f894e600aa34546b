"""Documents that share a sequence and do not see each other."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from chats import make_chat_model
from clients import need
from live_exports import manifest
from torch.nn import functional

from forge_kernel import evaluate_run, load_pipeline, load_run, run
from forge_kernel.errors import PlanError
from forge_plugins.data.text_batches import TokenSequences
from forge_plugins.data.text_config import TextConfig
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer

END = ByteTokenizer().end
WORDS = ["one", "two", "three", "four", "é"]


def documents(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]


def rows(count: int = 60, length: int = 24, *, masked: bool = True) -> TokenSequences:
    tokenizer = ByteTokenizer()
    parts = [[*tokenizer.encode(text).tolist(), END] for text in documents(1, count)]
    tokens = torch.tensor([token for part in parts for token in part]).numpy()
    config = TextConfig(sequence_length=length, batch_size=4, document_mask=masked)
    return TokenSequences(tokens, tokens[:200], config, 0, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_document_is_answered_as_if_it_stood_alone(dtype: torch.dtype) -> None:
    """Gradients too. Planted: no mask; one that sees what follows; a text that begins a token too soon."""
    torch.manual_seed(0)
    shape = LlamaShape(vocabulary=257, context=24, width=32, layers=2, heads=4, groups=2, hidden=32)
    model = Llama(shape).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    batch = next(rows().batches(0, 0))
    inputs, places = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert int(((inputs == END) & (places == 0)).sum()) == int((inputs == END).sum()) > 2
    packed = model(**batch.inputs)
    loss = functional.cross_entropy(packed.flatten(0, 1).float(), batch.targets.flatten())
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    alone = torch.empty_like(packed)
    for row, tokens in enumerate(inputs):
        begins = [0, *(place for place in range(1, len(tokens)) if tokens[place] == END)]
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            alone[row, begin:end] = model(tokens[None, begin:end])[0]
    exact = dtype == torch.float32
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5 if exact else 0.1)
    loss = functional.cross_entropy(alone.flatten(0, 1).float(), batch.targets.flatten())
    loss.backward()
    if exact:
        for one, weight in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(one, weight.grad, rtol=1e-4, atol=1e-5)


def test_the_tokens_are_those_of_sequences_without_the_mask() -> None:
    for one, other in zip(rows().batches(2, 5), rows(masked=False).batches(2, 5), strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs)
        assert torch.equal(one.targets, other.targets)


def settings(folder: Path, *more: str) -> list[str]:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(2, 300)))
    return [
        f"data.with={{path: {path}, sequence_length: 32, batch_size: 4, document_mask: true, "
        f"cache_dir: {folder / 'cache'}}}",
        "model.with={width: 64, layers: 1, heads: 2, groups: 1, hidden: 64}", "schedule=null",
        "run.max_steps=6", "run.validate_every=null", "observers=null", "callbacks=null", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("loss", ["cross_entropy", "language_model"])
def test_a_run_trains_validates_and_is_evaluated_with_it(tmp_path: Path, loss: str) -> None:
    """Both losses alike; a file evaluated afterwards is read so too."""
    chosen = settings(tmp_path, f"loss={{use: {loss}}}", "exporters=null")
    folder = tmp_path / "run"
    result = run(load_pipeline("char_llama_gguf", chosen), output_dir=folder, quiet=True)
    final = {name: value for name, value in result.final.items() if "perplexity" in name}
    assert final["validation_perplexity"] == pytest.approx(
        evaluate_run(folder)["perplexity"], rel=1e-6
    )
    masked = evaluate_run(folder, tmp_path / "texts.jsonl")
    assert masked["perplexity"] < 260


def test_its_exports_are_compared_in_their_clients(tmp_path: Path) -> None:
    need("transformers", "xllamacpp")
    chosen = settings(tmp_path, "exporters=[{use: gguf, with: {type: q2_0}}, {use: transformers}]")
    result = run(load_pipeline("char_llama_gguf", chosen), output_dir=tmp_path / "run", quiet=True)
    assert not result.failed_exports
    for name in ("gguf", "transformers"):
        assert manifest(tmp_path / "run", name)["verified"]["rows"] > 0


def test_a_model_of_transformers_sees_the_documents_as_ours_does(tmp_path: Path) -> None:
    """Planted: position_ids that the library is not given."""
    need("transformers", "tokenizers")
    folder = make_chat_model(tmp_path / "model")
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(documents(3, 400)))
    chosen = [
        f"data={{use: text, with: {{path: {path}, tokenizer: library, tokenizer_file: {folder}, "
        "sequence_length: 16, batch_size: 2, document_mask: true, "
        f"cache_dir: {tmp_path / 'cache'}}}}}",
        f"model={{use: transformers, with: {{path: {folder}}}}}", "run.max_steps=2",
        "loss={use: language_model}", "validators=[{use: language_model}]", "observers=null",
        "callbacks=null", "exporters=null", "quantizer=null",
    ]  # fmt: skip
    result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert result.steps == 2
    opened = load_run(tmp_path / "run")
    tokens = opened.tokenizer.encode("one two three").tolist()
    other = opened.tokenizer.encode("four é").tolist()
    end = opened.tokenizer.end
    packed = torch.tensor([[*other, end, *tokens]])
    places = torch.tensor([[*range(len(other)), *range(len(tokens) + 1)]])
    with torch.no_grad():
        whole = opened.model(input_ids=packed, position_ids=places).logits[0, len(other) :]
        alone = opened.model(input_ids=packed[:, len(other) :]).logits[0]
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_hold_texts_apart_is_refused_with_what_to_change(
    tmp_path: Path,
) -> None:
    chosen = settings(tmp_path, "model={use: decoder_transformer}", "exporters=null")
    with pytest.raises(PlanError, match="document_mask: false"):
        run(load_pipeline("char_llama_gguf", chosen), output_dir=tmp_path / "run", quiet=True)
