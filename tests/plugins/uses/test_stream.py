"""What trained language models write: with keys and values kept, in chats, at the edges."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from clients import need
from llamas import ternary_llama
from model_folders import FAMILIES, PACKED, VOCABULARY, library, make_folder
from torch import Tensor, nn

from forge_kernel import TrainedRun, load_run, run
from forge_kernel.contract.data import DataSpec
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.fixed_linear import FixedLinear
from forge_plugins.mathematics.text.generation import (
    LlamaReader,
    Sampling,
    TransformersReader,
    WholeReader,
    greedy_continuation,
    written,
)
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer
from forge_plugins.uses.stream import reader_of

GREEDY = Sampling()
WARM = Sampling(temperature=0.8, top_k=20, top_p=0.9)
DECODERS = ("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "mixtral")


def prompt(length: int = 7, vocabulary: int = 257) -> Tensor:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", [{}, {"sub_norms": True}, {"groups": 4}, {"tied": True}], ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_kept_sequence_gives_the_same_text(shape: dict[str, Any], sampling: Sampling) -> None:
    """Planted: positions that begin at 0 again; a last token that does not see itself."""
    model = ternary_llama(**shape)
    whole = list(written(WholeReader(model, None), prompt(), 30, sampling, seed=3))
    kept = list(written(LlamaReader(model, 37), prompt(), 30, sampling, seed=3))
    assert whole == kept


def test_kept_keys_and_values_are_those_of_the_whole_sequence() -> None:
    """In full precision, where no level of an activation can tip over."""
    torch.manual_seed(2)
    shape = LlamaShape(vocabulary=257, context=64, width=64, heads=4, groups=2, hidden=96)
    model, tokens = Llama(shape).eval(), prompt(20)
    reader = LlamaReader(model, 20)
    with torch.no_grad():
        answers = [reader.read(tokens[None, :7])]
        answers += [reader.read(token.view(1, 1)) for token in tokens[7:]]
        whole = model(tokens[None])[0, 6:]
    torch.testing.assert_close(torch.cat(answers), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in DECODERS if name in FAMILIES])
def test_a_model_of_the_library_writes_what_the_library_writes(family: str, tmp_path: Path) -> None:
    transformers = library()
    folder = make_folder(tmp_path / "m", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = prompt(5, VOCABULARY)
    theirs = model.generate(
        tokens[None], attention_mask=torch.ones(1, 5), max_new_tokens=9, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, 5:].tolist()  # fmt: skip
    assert list(written(TransformersReader(model), tokens, 9, GREEDY)) == theirs
    assert list(written(WholeReader(model, None), tokens, 9, GREEDY)) == theirs


def test_choices_have_the_probabilities_of_transformers() -> None:
    transformers = library()
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * 3
    for temperature, top_k, top_p in [
        (0.7, None, 1.0),
        (1.3, 5, 1.0),
        (1.0, None, 0.6),
        (0.9, 9, 0.4),
    ]:
        chain = [transformers.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
        if top_k is not None:
            chain.append(transformers.TopKLogitsWarper(top_k))
        if top_p < 1.0:
            chain.append(transformers.TopPLogitsWarper(top_p))
        wanted = logits
        for step in chain:
            wanted = step(None, wanted)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        torch.testing.assert_close(
            sampling.probabilities(logits), wanted.softmax(-1), rtol=1e-5, atol=1e-7
        )


def test_a_seed_repeats_a_text_and_another_gives_another() -> None:
    model = ternary_llama()
    hot = Sampling(temperature=1.0)

    def text(seed: int) -> list[int]:
        return list(written(LlamaReader(model, 40), prompt(), 20, hot, seed=seed))

    state = torch.get_rng_state()
    assert text(1) == text(1)
    assert text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_text_ends_where_the_model_ends_it() -> None:
    class Counts(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.one_hot((tokens + 1) % 9, 9).float()

    reader = WholeReader(Counts(), None)
    assert list(written(reader, torch.tensor([2]), 20, GREEDY, ends=frozenset({6}))) == [3, 4, 5]


def test_beyond_the_context_older_tokens_are_forgotten() -> None:
    model = ternary_llama()  # of 64 tokens
    assert isinstance(reader_of(model, 64, None), LlamaReader)
    reader = reader_of(model, 65, None)
    assert isinstance(reader, WholeReader)
    tokens = prompt(60)
    expected = greedy_continuation(model, tokens[None], 12, 64)[0].tolist()
    assert list(written(reader, tokens, 12, GREEDY)) == expected


def of_model(model: nn.Module, tokenizer: Any, vocabulary: int | None = None) -> TrainedRun:
    spec = DataSpec(vocabulary=vocabulary)
    return TrainedRun(folder=Path("nowhere"), model=model, spec=spec, tokenizer=tokenizer)


class Says(nn.Module):
    """Writes the bytes of a text, whatever it is given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bytes = list(text.encode())
        self.weight = nn.Parameter(torch.zeros(1))
        self.count = 0

    def forward(self, tokens: Tensor) -> Tensor:
        token = self.bytes[self.count] if self.count < len(self.bytes) else 256
        self.count += 1
        result = torch.zeros(1, tokens.shape[1], 257)
        result[:, -1, token] = 1.0
        return result


def test_characters_come_whole() -> None:
    """Red when the bytes of a character are shown one by one."""
    text = "aé漢字🙂z"
    pieces = list(of_model(Says(text), ByteTokenizer(), 257).stream("x"))
    assert pieces == list(text)
    cut = list(of_model(Says("é"), ByteTokenizer(), 257).stream("x", max_tokens=1))
    assert cut == ["\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": ""}, "the prompt is empty"), ({"prompt": [300]}, "none of the model's 0 to 256"),
        ({"max_tokens": 0}, "max_tokens is 0"), ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"), ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 1.5}, "top_p"),
        ({"temperature": float("nan")}, "temperature is nan"), ({"chat": True}, "chat template"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    run = of_model(ternary_llama(), ByteTokenizer(), 257)
    with pytest.raises(ValueError, match=told):
        run.generate(**{"prompt": "x", **options})


def test_a_classifier_writes_no_text() -> None:
    run = of_model(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3)), None)
    with pytest.raises(ValueError, match="a language model gives logits"):
        run.generate([1, 2])


def test_a_run_without_a_tokenizer_writes_numbers() -> None:
    run = of_model(ternary_llama(), None, 257)
    expected = greedy_continuation(run.model, torch.tensor([[3, 17, 4]]), 5)[0].tolist()
    assert run.generate("3 17 4", max_tokens=5).split() == [str(token) for token in expected]
    with pytest.raises(ValueError, match="this run has no tokenizer"):
        run.generate("three")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("written") / "run"
    settings = [
        "run.max_steps=2", "run.validate_every=null", "observers=null", "callbacks=null",
        "validators=null", "exporters=[{use: transformers, with: {verify: false, layout: online}}]",
        "model.with.width=64", "model.with.layers=1", "data.with.batch_size=2",
    ]  # fmt: skip
    run(load_pipeline("char_llama_gguf", settings), output_dir=folder, quiet=True)
    return folder


def forge(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *map(str, arguments)], capture_output=True,
        text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_command_writes_what_python_writes(trained: Path) -> None:
    run = load_run(trained)
    assert isinstance(run.tokenizer, ByteTokenizer)
    assert run.step == 2
    assert run.data["use"] == "text"
    options = ("--max-tokens", "9", "--temperature", "1", "--seed", "4")
    done = forge("generate", trained, "--prompt", "The ", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run.generate("The ", max_tokens=9, temperature=1.0, seed=4) + "\n"


def test_an_export_writes_what_the_run_writes(trained: Path) -> None:
    need("transformers")
    library()
    folder = trained / "exports" / "transformers"
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 2}
    assert load_run(folder).generate("The ", **options) == load_run(trained).generate(
        "The ", **options
    )


def test_a_chat_goes_through_the_models_template(tmp_path: Path, trained: Path) -> None:
    need("transformers")
    library()
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in (trained / "exports" / "transformers").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["chat_template"] = (
        "{% for m in messages %}A {{ m.role }} has: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}It has: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    run = load_run(folder)
    chat = run.generate("the end", chat=True, max_tokens=9)
    assert chat == run.generate("A user has: the end It has: ", max_tokens=9)
    done = forge("generate", folder, "--prompt", "the end", "--chat", "--max-tokens", "9")
    assert done.stdout == chat + "\n", done.stderr


@pytest.mark.parametrize("what", ["nothing", "empty", "hub", "broken"])
def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "m"
    if what != "nothing":
        folder.mkdir()
    if what == "broken":
        (folder / "config.json").write_text("{")
    name = "gpt2" if what == "hub" else str(folder)
    with pytest.raises(ConfigError, match=r"no run folder|config\.json"):
        load_run(name)
    done = forge("generate", name, "--prompt", "x")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("family", PACKED)
def test_a_quantized_folder_is_opened_with_layers_that_give_what_the_library_gives(
    family: str, tmp_path: Path
) -> None:
    """Unpacked once, where the library unpacks in each call."""
    library()
    import transformers

    folder = make_folder(tmp_path / "model", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_run(folder).model
    compared = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, layer in ours.named_modules():
            if isinstance(layer, FixedLinear | BitLinear):
                inputs = torch.randn(5, layer.in_features)
                meant = theirs.get_submodule(name)(inputs)
                torch.testing.assert_close(layer(inputs), meant, rtol=1e-5, atol=1e-6)
                compared += 1
    packed = [name for name in theirs.state_dict() if name.endswith("_proj.weight")]
    assert compared == len(packed)
