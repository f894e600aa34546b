"""What a run has learned and its exports, each in the program that runs it, on the same targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from forge_kernel.api import Batch, ConfigError, Fault, PluginError, TrainedRun, call_model
from forge_plugins.clients import verification
from forge_plugins.clients.target_answers import Question, as_request, target_answers
from forge_plugins.clients.verification import Client
from forge_plugins.mathematics.metrics.label_positions import main_output
from forge_plugins.mathematics.metrics.language_model import bits, perplexity
from forge_plugins.mathematics.text.token_bytes import token_bytes


@dataclass(frozen=True, slots=True)
class _Program:
    """A client, the file or folder of an export that it reads, and the exporter that writes it."""

    client: Client
    pattern: str
    exporter: str


TORCH: Final = "torch"
PROGRAMS: Final[Mapping[str, _Program]] = {
    "transformers": _Program(verification.TRANSFORMERS, "config.json", "transformers"),
    "llama.cpp": _Program(verification.LLAMA_CPP_TARGETS, "*.gguf", "gguf"),
    "onnxruntime": _Program(verification.ONNXRUNTIME, "*.onnx", "onnx"),
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, and what each of its targets counts, shape (targets,)."""

    question: Question
    weights: Tensor


@dataclass(slots=True)
class _Answers:
    """Of all targets that count: log-probabilities, likeliest classes; fp64 and int64."""

    logprobs: Tensor
    tops: Tensor


def client_metrics(
    run: TrainedRun, batches: Iterable[Batch], clients: Sequence[str], *, most: int | None = None
) -> dict[str, dict[str, float]]:
    """Loss, accuracy and, of tokens, perplexity and bits, by each client.

    A sequence into which several texts are packed is asked text by text, of everyone.

    Args:
        run: what is looked at: its model, and the newest exports in its folder.
        batches: of the run's data.
        clients: of `torch` (the run's own model), `transformers`, `llama.cpp`, `onnxruntime`.
        most: how many targets are asked about, the first ones; None: all.

    Returns:
        By client: `targets` that count, `loss` (mean, nats), `accuracy`; for tokens `perplexity`,
        `bits_per_token` and, where tokens have bytes, `bits_per_byte`; `same_answer`, the share of
        targets for which it answers as the run's own model; and the `step` of its weights.

    Raises:
        ConfigError: a client that is not known or not installed, no export for it, or targets that
            are no classes.
        PluginError: a client cannot run its export; with its words.
    """
    exports = {name: _export_of(run, name) for name in clients if name != TORCH}
    asked = list(_first(_questions(run, batches), most))
    if not any(bool(each.weights.any()) for each in asked):
        raise ConfigError([Fault(f"{run.folder}: no target counts, so nothing can be compared")])
    own = _by_run(run, asked)
    answers = {TORCH: own}
    for name, (path, _) in exports.items():
        answers[name] = _by_client(PROGRAMS[name].client, path, asked)
    steps = {TORCH: float(run.step)} | {name: step for name, (_, step) in exports.items()}
    sizes = None if run.tokenizer is None else token_bytes(run.tokenizer)
    return {
        name: {**_metrics(run, asked, answers[name], own, sizes), "step": steps[name]}
        for name in clients
    }


def _export_of(run: TrainedRun, name: str) -> tuple[Path, float]:
    """What a client is to run, and the step of its weights."""
    import json

    program = PROGRAMS.get(name)
    if program is None:
        known = ", ".join([TORCH, *PROGRAMS])
        raise ConfigError([Fault(f"--with {name}: there is {known}")])
    lacking = verification.missing(program.client)
    if lacking:
        message = f"--with {name}: {' and '.join(lacking)} is not installed"
        raise ConfigError([Fault(message, hints=(verification.INSTALL,))])
    written = [
        path
        for path in (run.folder / "exports").glob(f"*/{program.pattern}")
        if (path.parent / "manifest.json").is_file()
    ]
    if not written:
        raise ConfigError(
            [
                Fault(
                    f"--with {name}: {run.folder} has no export that {name} reads",
                    hints=(f"write one: forge export {run.folder} --use {program.exporter}",),
                )
            ]
        )
    path = max(written, key=lambda path: (path.stat().st_mtime_ns, path.name))
    about = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
    step = about.get("step")
    whole = path.parent if path.name == "config.json" else path
    return whole, math.nan if step is None else float(step)


def _questions(run: TrainedRun, batches: Iterable[Batch]) -> Iterator[_Asked]:
    """The batches as questions; packed texts each by itself."""
    for batch in batches:
        batch.ignore_index = run.ignore_index
        targets = batch.targets
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            message = f"{run.folder}: its targets are no classes or tokens, which --with compares"
            hint = "leave --with out: the run's own metrics are measured"
            raise ConfigError([Fault(message, hints=(hint,))])
        weights = batch.counted.weights
        counts = torch.ones(targets.numel()) if weights is None else weights.float().cpu()
        if isinstance(batch.inputs, Tensor):
            inputs = batch.inputs.float() if batch.inputs.is_floating_point() else batch.inputs
            yield _Asked(Question(inputs, targets, _places(batch)), counts)
        else:
            yield from _texts(run, batch, counts.view(targets.shape))


def _places(batch: Batch) -> Tensor | None:
    """The places of a sequence that have targets, as an index; None: all of them."""
    if batch.positions is None:
        return None
    return torch.arange(batch.inputs.shape[1])[batch.positions]


def _texts(run: TrainedRun, batch: Batch, counts: Tensor) -> Iterator[_Asked]:
    """Each text of a packed batch; those where nothing counts are left out."""
    named = batch.inputs if isinstance(batch.inputs, Mapping) else {}
    tokens, positions = named.get("input_ids"), named.get("position_ids")
    if tokens is None or positions is None:
        message = (
            f"{run.folder}: its data give the model more than tokens, which no client is asked"
        )
        raise ConfigError([Fault(message)])
    for row in range(len(tokens)):
        begins = (positions[row] == 0).nonzero()[:, 0].tolist()
        for begin, end in zip(begins, [*begins[1:], len(positions[row])], strict=True):
            place = slice(begin, end)
            if bool(counts[row, place].any()):
                question = Question(tokens[row, None, place], batch.targets[row, None, place])
                yield _Asked(question, counts[row, place])


def _first(asked: Iterable[_Asked], most: int | None) -> Iterator[_Asked]:
    """As many targets that count as are wanted; the rest count for nothing."""
    left = most
    for each in asked:
        if left is None:
            yield each
            continue
        if left <= 0:
            return
        rank = (each.weights > 0).cumsum(0)
        left, kept = left - int(rank[-1]), rank <= left
        ignored = torch.where(kept.view(each.question.targets.shape), each.question.targets, -1)
        question = Question(each.question.inputs, ignored, each.question.positions)
        yield _Asked(question, torch.where(kept, each.weights, 0.0))


def _by_run(run: TrainedRun, asked: Sequence[_Asked]) -> _Answers:
    """What the run's own model answers."""
    device = next(run.model.parameters()).device
    parts = []
    for each in asked:
        question = each.question
        batch = Batch(question.inputs, question.targets, positions=question.positions).to(device)
        with torch.no_grad():
            result = main_output(call_model(run.model, batch))
        parts.append(target_answers(question, result.cpu()))
    return _Answers(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def _by_client(client: Client, export: Path, asked: Sequence[_Asked]) -> _Answers:
    """What a client answers."""
    request = as_request(each.question for each in asked)
    count = sum(each.question.targets.numel() for each in asked)
    result = verification.answer_of(client, export, request, targets=count)
    names = range(len(asked))
    answers = _Answers(
        torch.cat([result[f"logprob.{number}"] for number in names]),
        torch.cat([result[f"top.{number}"] for number in names]),
    )
    weights = torch.cat([each.weights for each in asked])
    if not bool(torch.isfinite(answers.logprobs[weights > 0]).all()):
        raise PluginError(f"{client.packages[0]} gave probabilities that are no numbers")
    return answers


def _metrics(
    run: TrainedRun, asked: Sequence[_Asked], answers: _Answers, own: _Answers, sizes: Tensor | None
) -> dict[str, float]:
    weights = torch.cat([each.weights for each in asked]).double()
    targets = torch.cat([each.question.targets.reshape(-1) for each in asked])
    counted = weights > 0
    weights, targets = weights[counted], targets[counted]
    total, nats = float(weights.sum()), -float(weights @ answers.logprobs[counted])
    tops = answers.tops[counted]
    result = {
        "targets": float(counted.sum()),
        "loss": nats / total,
        "accuracy": float(weights @ (tops == targets).double()) / total,
        "same_answer": float(weights @ (tops == own.tops[counted]).double()) / total,
    }
    if run.spec.vocabulary is not None:
        result |= {"perplexity": perplexity(nats / total), "bits_per_token": bits(nats / total)}
        length = 0.0 if sizes is None else float(weights @ sizes[targets].double())
        if length:
            result["bits_per_byte"] = bits(nats) / length
    return result
