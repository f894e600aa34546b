"""Chat data: the library's own text, loss on answers alone, packing that changes nothing."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chats import (
    CHATML,
    MARKED,
    TEMPLATES,
    add_tokenizer,
    conversations,
    make_chat_model,
    write_chats,
    write_rows,
)  # fmt: skip
from clients import need
from model_folders import library
from torch.nn import functional

from forge_kernel import load_pipeline, load_run, resume, run
from forge_kernel.api import Batch, call_model
from forge_kernel.errors import ForgeError
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_plugins.data.chat import Chat
from forge_plugins.data.chat_config import ChatConfig
from forge_plugins.interchange.chat_tokenizer import read_chat_tokenizer
from forge_plugins.interchange.model_folder import read_model_folder
from forge_plugins.interchange.transformers_model import load_model, prepare_inputs
from forge_plugins.mathematics.text.packing import best_fit
from forge_plugins.models.transformers import PACKS

IGNORED = -100


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return add_tokenizer(tmp_path / "tokenizer")


def made(
    path: Path | str, tokenizer: Path, tmp_path: Path, *, rank: int = 0, world: int = 1,
    **settings: Any,
) -> Any:  # fmt: skip
    """The data, and the events that its making emitted."""
    config = ChatConfig(
        path=str(path), tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache"), **settings
    )
    events: list[str] = []
    fake = SimpleNamespace(
        seed=3, settings=SimpleNamespace(ignore_index=IGNORED),
        strategy=SimpleNamespace(rank=rank, world_size=world),
        emit_event=lambda name, message, **facts: events.append(f"{name}: {message}"),
    )  # fmt: skip
    return Chat(config).make_data(fake), events  # type: ignore[arg-type]


def padded(path: Path, tokenizer: Path, tmp_path: Path, **settings: Any) -> list[Batch]:
    """One epoch of one conversation a batch, without a split."""
    data, _ = made(
        path, tokenizer, tmp_path, packing=False, batch_size=1, validation_split=0.0, **settings
    )
    return list(data.batches(0, 0))


def learned(batch: Batch) -> list[int]:
    return [token for token in batch.targets[0].tolist() if token != IGNORED]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_what_transformers_renders(name: str, tmp_path: Path) -> None:
    """Planted: trim_blocks off; Jinja's own tojson; bos_token not given."""
    library()
    from transformers import AutoTokenizer

    folder = add_tokenizer(tmp_path / "it", TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = read_chat_tokenizer(folder, None, None, None)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"é": "<b>"}}}]
    for number, said in enumerate(conversations(20)):
        messages = said
        if name == "rich" and number % 2:
            call = {"type": "function", "function": {"name": "look", "arguments": {"at": "'"}}}
            messages = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
            messages[-1] |= {"content": "so", "reasoning": "because"}
        given = tools if number % 3 == 0 else None
        for asks in (False, True):
            text = ours.template.render(messages, given, asks=asks).text
            assert text == theirs.apply_chat_template(
                messages, tools=given, tokenize=False, add_generation_prompt=asks
            )
        tokens = ours.tokenizer.encode_placed([ours.template.render(messages).text])[0][0]
        assert tokens == theirs.apply_chat_template(messages)["input_ids"]


def test_marked_answers_are_those_that_transformers_tells(tmp_path: Path) -> None:
    """Planted: a token that begins before a mark and ends in it is not learned."""
    library()
    from transformers import AutoTokenizer

    folder = add_tokenizer(tmp_path / "it", MARKED)
    theirs = AutoTokenizer.from_pretrained(folder)
    said = conversations(30)
    file = write_rows(tmp_path / "a.jsonl", [{"messages": item} for item in said])
    found = sorted(
        (batch.inputs[0].tolist(), batch.targets[0].tolist())
        for batch in padded(file, folder, tmp_path)
    )
    wanted = []
    for messages in said:
        result = theirs.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = result["input_ids"], result["assistant_masks"]
        kept = [token if one else IGNORED for token, one in zip(ids, mask, strict=True)]
        wanted.append((ids[:-1], kept[1:]))
    assert found == sorted(wanted)


@pytest.mark.parametrize("answers", ["all", "last"])
def test_without_marks_the_answers_are_what_each_adds(
    answers: str, tokenizer: Path, tmp_path: Path
) -> None:
    """Planted: the words that an answer begins with are learned too."""
    said = conversations(30)
    file = write_rows(tmp_path / "a.jsonl", [{"messages": item} for item in said])
    whole = read_chat_tokenizer(tokenizer, None, None, None).tokenizer
    names = whole.names()

    def told(batch: Batch) -> str:
        return "".join(names[token] for token in learned(batch))

    def wanted(messages: list[dict[str, Any]]) -> str:
        texts = [
            item["content"] + "<|im_end|>\n" for item in messages if item["role"] == "assistant"
        ]
        chosen = texts if answers == "all" else texts[-1:]
        return "".join(names[token] for text in chosen for token in whole.encode(text).tolist())

    found = [told(batch) for batch in padded(file, tokenizer, tmp_path, answers=answers)]
    assert sorted(found) == sorted(map(wanted, said))


def test_pairs_parquet_folders_and_patterns_give_the_same_sequences(
    tokenizer: Path, tmp_path: Path
) -> None:
    need("pyarrow")
    import pyarrow as arrow
    import pyarrow.parquet

    rows = [{"prompt": f"ask {n}", "completion": f"answer {n}"} for n in range(8)]
    messages = [
        {"messages": [{"role": "user", "content": row["prompt"], "name": None},
                      {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "a.jsonl", rows[:3])
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(messages[3:5]).encode()))
    arrow.parquet.write_table(arrow.Table.from_pylist(messages[5:]), folder / "c.parquet")
    (folder / "README.md").write_text("no data")
    whole = write_rows(tmp_path / "whole.jsonl", rows)
    wanted = [batch.targets.tolist() for batch in padded(whole, tokenizer, tmp_path)]
    for path in (folder, folder / "[abc].*", tmp_path / "**" / "[abc].*"):
        found = [batch.targets.tolist() for batch in padded(path, tokenizer, tmp_path)]
        assert found == wanted
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))


def hand_loss(model: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """The mean over the answers' tokens, one conversation and one token at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        logits = model(input_ids=batch.inputs).logits
        for place, target in enumerate(batch.targets[0].tolist()):
            if target != IGNORED:
                total = total - functional.log_softmax(logits[0, place], -1)[target]
                count += 1
    return total / count


def chat_model(folder: Path) -> torch.nn.Module:
    looked_at = read_model_folder(str(folder))
    model = load_model(looked_at, seed=1).model
    prepare_inputs(model, looked_at)
    return model


FAMILIES = [
    pytest.param(name, marks=[] if name in ("llama", "gpt2", "gemma3") else pytest.mark.deep)
    for name in (
        "llama",
        "qwen2",
        "qwen3",
        "gemma3",
        "mistral",
        "phi3",
        "gpt2",
        "bitnet",
        "mixtral",
    )
]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_give_the_loss_and_the_gradients_of_single_ones(
    family: str, tmp_path: Path
) -> None:
    """Planted: positions that go on through a sequence; an answer's mask one token off."""
    library()
    folder = make_chat_model(tmp_path / "model", family)
    assert json.loads((folder / "config.json").read_text())["model_type"] in PACKS
    file = write_chats(tmp_path / "a.jsonl", 12)
    singles = padded(file, folder, tmp_path, sequence_length=256)
    data, _ = made(file, folder, tmp_path, sequence_length=256, batch_size=64, validation_split=0.0)
    (packed,) = data.batches(0, 0)
    assert packed.samples < len(singles)
    model = chat_model(folder)
    if family != "mixtral":  # whose grouped products have no double precision
        model = model.double()  # so that the order of sums is no question
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    wanted = hand_loss(model, singles)
    wanted.backward()
    expected = {name: item.grad.clone() for name, item in model.named_parameters()}
    model.zero_grad()
    logits = call_model(model, packed).logits
    values = functional.cross_entropy(
        logits.flatten(0, 1), packed.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    loss, _ = packed.counted.mean(values)
    loss.backward()
    assert abs(loss.item() - wanted.item()) < 1e-6
    for name, item in model.named_parameters():
        assert item.grad is not None
        assert float((item.grad - expected[name]).abs().max()) < 1e-5, name


def test_sequences_are_nearly_full_and_hold_each_conversation_once(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = write_chats(tmp_path / "a.jsonl", 600)
    settings: dict[str, Any] = {"sequence_length": 512, "validation_split": 0.0}
    data, events = made(file, tokenizer, tmp_path, **settings)
    used = room = 0
    kept: list[tuple[int, ...]] = []
    for batch in data.batches(0, 0):
        tokens, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
        room += tokens.numel()
        for row, places, targets in zip(tokens, positions, batch.targets, strict=True):
            begins = [*torch.nonzero(places == 0).flatten().tolist(), len(row)]
            for begin, end in pairwise(begins):
                if bool((targets[begin:end] != IGNORED).any()):
                    kept.append(tuple(row[begin:end].tolist()))
                    used += end - begin
    singles = padded(file, tokenizer, tmp_path)
    assert sorted(kept) == sorted(tuple(batch.inputs[0].tolist()) for batch in singles)
    assert used / room >= 0.95
    assert events == [f"conversations_packed: data.chat: 600 conversations in "
                      f"{data.spec.samples} sequences, {used / room:.1%} full"]  # fmt: skip


def test_best_fit_needs_few_packs_and_overfills_none() -> None:
    generator = np.random.default_rng(0)
    for room in (1, 7, 100, 4096):
        lengths = generator.integers(1, room + 1, 500)
        packs = best_fit(lengths, room)
        assert sorted(number for pack in packs for number in pack) == list(range(500))
        assert all(lengths[pack].sum() <= room for pack in packs)
        assert len(packs) <= 11 / 9 * -(-lengths.sum() // room) + 2 or lengths.min() * 2 > room


def test_any_place_is_where_an_epoch_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "a.jsonl", 80)
    data, _ = made(file, tokenizer, tmp_path, sequence_length=256, batch_size=3)
    whole = [row for batch in data.batches(2, 0) for row in batch.targets.tolist()]
    assert len(whole) == data.spec.samples
    for place in (0, 1, 4, len(whole) - 1):
        rest = [row for batch in data.batches(2, place) for row in batch.targets.tolist()]
        assert rest == whole[place:]
        assert data.take(2, range(place, place + 1)).targets.tolist() == [whole[place]]
    other = [row for batch in data.batches(3, 0) for row in batch.targets.tolist()]
    assert other != whole
    assert sorted(other) == sorted(whole)
    held = [row for batch in data.validation() for row in batch.targets.tolist()]
    assert held
    assert not any(row in whole for row in held)


@pytest.mark.parametrize("packing", [False, True])
def test_all_processes_together_read_what_one_reads(
    packing: bool, tokenizer: Path, tmp_path: Path
) -> None:
    file = write_chats(tmp_path / "a.jsonl", 60)
    sizes: dict[str, Any] = {"sequence_length": 256, "packing": packing, "batch_size": 2}
    alone, _ = made(file, tokenizer, tmp_path, **{**sizes, "batch_size": 6})
    parts = [made(file, tokenizer, tmp_path, rank=rank, world=3, **sizes)[0] for rank in range(3)]

    def learned_rows(batches: Any) -> list[list[int]]:
        rows = [row for batch in batches for row in batch.targets if batch.weights is None]
        return [row[row != IGNORED].tolist() for row in rows]

    steps = [list(part.batches(1, 1)) for part in parts]
    assert {len(batches) for batches in steps} == {len(list(alone.batches(1, 1)))}
    together = [row for batches in steps for row in learned_rows(batches)]
    assert sorted(together) == sorted(learned_rows(alone.batches(1, 1)))
    held = [row for part in parts for row in learned_rows(part.validation())]
    assert sorted(held) == sorted(learned_rows(alone.validation()))


def test_the_messages_field_and_the_end_token_are_those_that_are_named(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"talk": [USER, ANSWER]}])
    data, _ = made(file, tokenizer, tmp_path, field="talk", end_token="</s>")
    assert data.spec.samples == 1
    assert data.tokenizer.end_name == "</s>"
    with pytest.raises(ForgeError, match="no token <none>"):
        made(file, tokenizer, tmp_path, field="talk", end_token="<none>")


def pipeline(folder: Path, file: Path, cache: Path, *more: str, **settings: Any) -> list[str]:
    chosen = {
        "path": str(file), "tokenizer": str(folder), "sequence_length": 256, "batch_size": 2,
        "cache_dir": str(cache), **settings,
    }  # fmt: skip
    return [
        "run={name: chat, seed: 3, device: cpu, max_steps: 8, log_every: 2, save_every: 4}",
        f"data={{use: chat, with: {json.dumps(chosen)}}}",
        f"model={{use: transformers, with: {{path: {folder}}}}}",
        "quantizer={use: bitnet}", "optimizer={use: adamw, with: {lr: 0.003}}",
        "loss={use: language_model}", "validators=[{use: language_model}]",
        *(f"{section}=null" for section in ("schedule", "gradients", "callbacks", "observers",
                                            "exporters")),
        *more,
    ]  # fmt: skip


def test_a_ternary_model_learns_to_answer_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    library()
    folder = make_chat_model(tmp_path / "model")
    file = write_chats(tmp_path / "a.jsonl", 60)
    chosen = pipeline(folder, file, tmp_path / "cache")
    exported = [
        *chosen,
        "exporters=[{use: transformers}, {use: transformers, with: {layout: online}}]",
    ]
    straight = run(load_pipeline("smoke", exported), output_dir=tmp_path / "straight", quiet=True)
    assert straight.outcome == "completed"
    run(
        load_pipeline("smoke", [*chosen, "run.max_steps=4"]),
        output_dir=tmp_path / "cut",
        quiet=True,
    )
    assert resume(tmp_path / "cut", ["run.max_steps=8"], quiet=True).steps == 8
    left, right = (
        CheckpointStore(tmp_path / name / "checkpoints").path(8) for name in ("straight", "cut")
    )
    assert differences(left, right) == []
    write_chats(file, 61)
    with pytest.raises(ForgeError, match="is not what this run was trained on"):
        resume(tmp_path / "cut", ["run.max_steps=9"], quiet=True)


def test_any_language_model_takes_padded_conversations_and_some_packed_ones(
    tmp_path: Path,
) -> None:
    folder = add_tokenizer(tmp_path / "tokenizer")
    file = write_chats(tmp_path / "a.jsonl", 30, words=3)
    model = "model={use: llama_decoder, with: {layers: 1, width: 32, heads: 2, hidden: 32}}"
    chosen = pipeline(folder, file, tmp_path / "cache", model)
    packed = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "packed", quiet=True)
    assert packed.outcome == "completed"
    chosen = pipeline(folder, file, tmp_path / "cache", "model={use: decoder_transformer}")
    with pytest.raises(ForgeError, match="chat needs a network that keeps several texts") as told:
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / "refused", quiet=True)
    assert "data.with.packing: false" in str(told.value)
    chosen = pipeline(folder, file, tmp_path / "cache", model, packing=False)
    chosen.append("exporters=[{use: transformers}]")
    result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "padded", quiet=True)
    assert result.outcome == "completed"
    library()
    from transformers import AutoTokenizer

    (exported,) = (tmp_path / "padded").rglob("tokenizer_config.json")
    chats = AutoTokenizer.from_pretrained(exported.parent)
    asked = [{"role": "user", "content": "ask"}]
    told = AutoTokenizer.from_pretrained(folder).apply_chat_template(asked)["input_ids"]
    assert chats.apply_chat_template(asked)["input_ids"] == told
    answers = load_run(tmp_path / "padded")
    written = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    drawn: dict[str, Any] = {"max_tokens": 40, "temperature": 3.0}  # as the logits are, exactly
    assert answers.generate("ask", chat=True, **drawn) == answers.generate(written, **drawn)
    assert answers.generate("ask", chat=True, **drawn) != answers.generate("ask", **drawn)


USER = {"role": "user", "content": "ask"}
ANSWER = {"role": "assistant", "content": "so"}
BAD = {
    "no object": ([1], "line 2, record 1, field 'messages': the row is a list, not an object"),
    "no messages": ({"text": "a"}, "record 1, field 'messages': is missing; there are ['text']"),
    "unknown role": (
        {"messages": [USER, {"role": "human", "content": "a"}]},
        "line 2, record 1, field 'messages[1]': the role 'human' is not known; roles are system",
    ),
    "empty answer": (
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        "line 2, record 1, field 'messages[1]': the answer is empty",
    ),
    "no answer": ({"messages": [USER]}, "line 2, record 1, field 'messages': there is no answer"),
    "no messages in it": ({"messages": []}, "line 2, record 1, field 'messages': holds an empty"),
    "no text": ({"messages": [{"role": "user", "content": 1}, ANSWER]}, "its content is a int"),
    "no completion": ({"prompt": "a"}, "field 'messages': is missing; there are ['prompt']"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion[0]': the answer is empty"),
    "tools": ({"messages": [USER, ANSWER], "tools": "x"}, "field 'tools': holds a str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_conversation_is_placed_or_left_out(
    name: str, tokenizer: Path, tmp_path: Path
) -> None:
    row, message = BAD[name]
    good = {"messages": [USER, ANSWER]}
    file = write_rows(tmp_path / "a.jsonl", [good, row, good])
    with pytest.raises(ForgeError) as told:
        made(file, tokenizer, tmp_path)
    assert message in str(told.value)
    assert str(told.value).startswith(f"chat: {file}, ")
    assert len(str(told.value).splitlines()) == 1
    data, events = made(file, tokenizer, tmp_path, unreadable="leave_out", validation_split=0.0)
    assert sum(batch.samples for batch in data.batches(0, 0)) == 1
    assert events[0].startswith("conversations_left_out: data.chat: 1 rows")


DROPS = "{% for message in messages if message.role != 'assistant' %}{{ message.content }}\n{% endfor %}"
TURNS = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
ENDLESS = "{% for a in range(10 ** 9) %}x{% endfor %}"
REFUSED = {
    DROPS: "the template writes nothing of its answers: everything in it is masked",
    TURNS: "does not tell where the answers lie; set data.with.answers: last, or mark",
    "{{ raise_exception('roles must alternate') }}": "refuses it: roles must alternate",
    "{{ messages.append(1) }}": "the chat template refuses it: ",
    "{% set ns = namespace(_hidden=1) %}": "refuses it: a namespace cannot hold '_hidden'",
    "{{ ''.__class__.__mro__ }}": "the chat template refuses it: ",
    ENDLESS: "the chat template refuses it: Range too big",
    "{% for %}": "the chat template is broken: ",
}


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_with_its_place(
    template: str, tmp_path: Path
) -> None:
    folder = add_tokenizer(tmp_path / "it", template)
    file = write_chats(tmp_path / "a.jsonl", 3)
    with pytest.raises(ForgeError) as told:
        made(file, folder, tmp_path)
    assert REFUSED[template] in str(told.value)
    broken = template == "{% for %}"
    where = folder / "tokenizer_config.json" if broken else f"{file}, line 1, record 0"
    assert str(told.value).startswith(f"chat: {where}")


def test_the_day_that_a_template_tells_can_be_set(tmp_path: Path) -> None:
    """Planted: the cache's key without the day."""
    folder = add_tokenizer(tmp_path / "it", TEMPLATES["rich"])
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}])
    names = read_chat_tokenizer(folder, None, None, None).tokenizer
    for day in ("2020-02-29", "1999-12-31"):
        (batch,) = padded(file, folder, tmp_path, today=day)
        assert f"it is {day[:4]}" in names.decode(batch.inputs[0].tolist())
    with pytest.raises(ValueError, match="today: 2021-02-29 is no day"):
        ChatConfig(today="2021-02-29")


def test_what_is_not_there_is_named(tokenizer: Path, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "a.jsonl", 3)
    (tmp_path / "empty").mkdir()
    plain = add_tokenizer(tmp_path / "plain", None)
    for path, folder, message in (
        (tmp_path / "b.jsonl", tokenizer, "b.jsonl: there is no such file"),
        (tmp_path / "empty", tokenizer, "empty: the folder has no such file; files of .json"),
        (tmp_path / "*.parquet", tokenizer, "parquet: no file has a name like this"),
        (plain / "tokenizer.json", tokenizer, "line 1 column 2, record 0: is not JSON"),
        (file, tmp_path / "empty", "tokenizer.json: there is no such file"),
        (file, plain, "tokenizer_config.json: the tokenizer has no chat template"),
        (file, file, "a.jsonl: it is no tokenizer.json"),
    ):
        with pytest.raises(ForgeError) as told:
            if folder is file:
                made(path, folder, tmp_path, template=str(write_template(tmp_path)))
            else:
                made(path, folder, tmp_path)
        assert message in str(told.value)
    data, _ = made(file, plain, tmp_path, template=str(write_template(tmp_path)))
    assert data.spec.samples == 1


def write_template(folder: Path) -> Path:
    file = folder / "given.jinja"
    file.write_text(CHATML, encoding="utf-8")
    return file


def test_conversations_beyond_a_sequence_are_refused_cut_or_left_out(
    tokenizer: Path, tmp_path: Path
) -> None:
    short, long = [USER, ANSWER], [USER, {**ANSWER, "content": "so " * 50}]
    late = [{**USER, "content": "ask " * 50}, ANSWER]
    rows = [{"messages": item} for item in (short, long, late)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    fixed: dict[str, Any] = {"sequence_length": 40, "packing": False, "validation_split": 0.0}
    with pytest.raises(ForgeError, match="record 1: the conversation has .* and a sequence room "
                                         "for 41 .2 of 3 are too long."):  # fmt: skip
        made(file, tokenizer, tmp_path, **fixed)
    data, events = made(file, tokenizer, tmp_path, **fixed, too_long="cut")
    assert data.spec.samples == 2
    assert events == [
        "conversations_left_out: data.chat: 0 rows without a conversation, 1 too long"
    ]
    assert max(batch.inputs.shape[1] for batch in data.batches(0, 0)) == 40
    data, _ = made(file, tokenizer, tmp_path, **fixed, too_long="leave_out")
    assert data.spec.samples == 1


def test_sequences_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    library()
    folder = make_chat_model(tmp_path / "model")
    file = write_chats(tmp_path / "a.jsonl", 10)
    chosen = pipeline(folder, file, tmp_path / "cache", sequence_length=512)
    with pytest.raises(ForgeError, match="sequences of 512 tokens, and .* has 256 positions"):
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)


def test_paths_that_are_not_given_are_asked_for_when_the_run_is_planned(tmp_path: Path) -> None:
    chosen = [*pipeline(tmp_path, tmp_path, tmp_path), "data={use: chat}"]
    with pytest.raises(ForgeError) as told:
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert "data.with.path\n  chat: it needs the path of the conversations" in str(told.value)
    assert "data.with.tokenizer\n  chat: it needs a tokenizer" in str(told.value)
