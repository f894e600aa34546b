"""Texts that a trained language model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_kernel.api import TrainedRun
from forge_plugins.mathematics.networks.llama import Llama
from forge_plugins.mathematics.text import generation
from forge_plugins.mathematics.text.generation import Reader, Sampling

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def stream(
    run: TrainedRun,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[str]:
    """What a model writes after a prompt, piece by piece; see `TrainedRun.stream`.

    Args:
        run: with a language model.
        prompt: a text; tokens where the run has no tokenizer, which are written as numbers.
        max_tokens: most tokens to write.
        temperature: of the choice; 0: the likeliest token.
        top_k: only so many of the likeliest.
        top_p: only the likeliest with this probability together.
        seed: of the choices.
        chat: the prompt is what a user says: it is put into the chat template of the model.

    Raises:
        ValueError: an option is out of its range, the prompt has no token or one that the model
            does not know, there is no chat template, or the model writes no tokens.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: it must be 1 or above")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ends = _ends(run)
    tokens = _tokens(run, prompt, chat=chat)
    reader = reader_of(run.model, len(tokens) + max_tokens, run.spec.sequence)
    tokens = tokens.to(next(run.model.parameters()).device)
    written = generation.written(reader, tokens, max_tokens, sampling, seed=seed, ends=ends)
    if run.tokenizer is None:
        return (f"{token} " for token in written)
    return _decoded(run.tokenizer, written)


def reader_of(model: nn.Module, length: int, context: int | None) -> Reader:
    """The cheapest way to read on: with keys and values kept, where the model can and they fit.

    Args:
        model: in evaluation mode.
        length: tokens of the whole sequence, at most.
        context: tokens that the model was trained on, at most.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "generate"):  # of the transformers library
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is None or length <= longest:
            return generation.TransformersReader(model)
        context = longest
    elif isinstance(model, Llama):
        if length <= max(model.shape.context, context or 0):
            return generation.LlamaReader(model, length)
        context = model.shape.context
    return generation.WholeReader(model, context)


def _tokens(run: TrainedRun, prompt: str | Sequence[int], *, chat: bool) -> Tensor:
    if isinstance(prompt, str) and run.tokenizer is None:
        try:
            prompt = [int(word) for word in prompt.split()]
        except ValueError as error:
            raise ValueError(
                "this run has no tokenizer: give its tokens as numbers, as in '3 17 4'"
            ) from error
    if isinstance(prompt, str):
        text = _as_chat(run, prompt) if chat else prompt
        tokens: Tensor = run.tokenizer.encode(text)
    elif chat:
        raise ValueError("a chat begins with a text, not with tokens")
    else:
        tokens = torch.tensor(list(prompt), dtype=torch.int64)
    if not len(tokens):
        raise ValueError("the prompt is empty: the model needs a token to begin with")
    size = run.spec.vocabulary
    if size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"the prompt has a token that is none of the model's 0 to {size - 1}")
    return tokens


def _as_chat(run: TrainedRun, prompt: str) -> str:
    """The text by the chat template that the run was trained with, or of the model's folder."""
    messages = [{"role": "user", "content": prompt}]
    trained = dict(getattr(run.tokenizer, "settings", {}))
    source = trained.pop("chat_template", None)
    if source is not None:
        from forge_plugins.mathematics.text.chat_template import ChatTemplate

        return ChatTemplate(source, trained).render(messages, asks=True).text
    folder = model_folder_of(run)
    if folder is None or not any(
        (folder / name).is_file() for name in ("chat_template.jinja", "tokenizer_config.json")
    ):
        raise ValueError("this model comes without a chat template: leave chat out")
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {folder} has no chat template: leave chat out")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def model_folder_of(run: TrainedRun) -> Path | None:
    """The folder of the transformers library that the model is from, or None."""
    if (run.folder / "config.json").is_file():
        return run.folder
    name = getattr(getattr(run.model, "config", None), "_name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None


def _ends(run: TrainedRun) -> frozenset[int]:
    """Tokens after which the text is over: the tokenizer's, and those that the model names."""
    ends = set() if run.tokenizer is None else {int(run.tokenizer.end)}
    named = getattr(getattr(run.model, "generation_config", None), "eos_token_id", None)
    if named is not None:
        ends |= set(named) if isinstance(named, list) else {named}
    return frozenset(ends)


def _decoded(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Text as soon as it is whole: a character may be of several tokens."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if text.endswith(_UNFINISHED):
            continue
        yield text[len(shown) :]
        shown = text
    text = tokenizer.decode(seen)
    if len(text) > len(shown):
        yield text[len(shown) :]
