"""Conversations, and a model's folder that chats: a tokenizer with templates as families have them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from clients import need
from model_folders import make_folder

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- message.content | trim }}<|im_end|>
        {%- endgeneration %}
    {%- elif message.role in ('system', 'user', 'tool') %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' }}
    {%- else %}
        {{- raise_exception('no place for ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
RICH = """{%- set ns = namespace(turns=0) -%}
{% if tools %}<tools>{{ tools | tojson(indent=2) }}</tools>
{% endif %}
{% for message in messages %}
{% if loop.first and message.role != 'system' %}<|system|>it is {{ strftime_now('%Y') }}
{% endif %}
    {% if message.role == 'user' %}{% set ns.turns = ns.turns + 1 %}{% endif %}
<|{{ message.role }}|>{{ ns.turns }} {{ message.content }}{% if message.tool_calls %}{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}{% endif %}<|im_end|>
{% if message.reasoning_content %}<think>{{ message.thinking }}</think>{% endif %}
  {% if message.role == 'unknown' %}{% continue %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{{ ns.turns }} {% endif %}
"""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "rich": RICH}
WORDS = [
    "the", "model", "answers", "in", "whole", "words", "é", "漢字", "and", "it", "goes", "on", "12",
    "<b>&amp;</b>", "'quoted'", '"twice"',
]  # fmt: skip


def conversation(draw: random.Random, *, turns: int = 3, words: int = 8) -> list[dict[str, Any]]:
    """Messages of up to so many turns."""

    def said() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, words)))

    result = [{"role": "system", "content": said()}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, turns)):
        result += [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
    return result


def conversations(count: int, seed: int = 1, **sizes: int) -> list[list[dict[str, Any]]]:
    """So many of them, the same for a seed."""
    draw = random.Random(seed)
    return [conversation(draw, **sizes) for _ in range(count)]


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Rows as JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_chats(file: Path, count: int = 40, seed: int = 1, **sizes: int) -> Path:
    """Conversations as JSON Lines."""
    return write_rows(file, [{"messages": item} for item in conversations(count, seed, **sizes)])


def add_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level tokenizer of 300 tokens beside a model, as transformers saves it."""
    need("tokenizers")
    import tokenizers as library

    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([" ".join(WORDS) * 3], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
        "eos_token": "<|im_end|>", "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True},
    }  # fmt: skip
    if template is not None:
        about["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def make_chat_model(folder: Path, family: str = "llama", template: str | None = CHATML) -> Path:
    """A tiny model of a family with its tokenizer."""
    longest = "n_positions" if family == "gpt2" else "max_position_embeddings"
    make_folder(folder, family, vocab_size=300, **{longest: 256})
    return add_tokenizer(folder, template)
