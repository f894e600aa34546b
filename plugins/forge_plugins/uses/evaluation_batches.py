"""A file's samples as a run's validation reads them: all of them, in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from forge_kernel.api import Batch, ConfigError, Fault, PluginError, TrainedRun
from forge_plugins.data.chat import evaluated
from forge_plugins.data.chat_config import ChatConfig
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.text_batches import TokenSequences
from forge_plugins.data.text_config import TextConfig
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers.documents import Account, Documents
from forge_plugins.uses.file_inputs import check_samples, file_config, pictures_of, samples_of


def evaluation_batches(run: TrainedRun, file: Path) -> Iterator[Batch]:
    """The batches of a file, with targets, by the settings of the run's own data.

    Args:
        run: whose data are `file`, `text` or `chat`.
        file: samples, a text, or conversations.

    Raises:
        ConfigError: the file cannot be read so, or the run's data are of another kind.
    """
    kind = run.data.get("use")
    try:
        if kind == "file":
            return _samples(run, file)
        if kind == "image_folder":
            size = int(run.data["with"].get("validation_batch_size", 256))
            return pictures_of(run, file, size, labels=True)
        if kind == "text":
            return _sequences(run, file)
        if kind == "chat":
            changes = {"path": str(file), "validation_split": 0.0}
            config = ChatConfig(**{**_values(run, ChatConfig), **changes})
            return evaluated(config, run.ignore_index)
    except (PluginError, DataError, OSError) as error:
        fault = error.faults[0].message if isinstance(error, PluginError) else str(error)
        raise ConfigError([Fault(f"{file} cannot be evaluated: {fault}")]) from error
    message = f"the run's data are of data.{kind}, which reads no file"
    hint = "leave --data out: the run's own validation data are evaluated"
    raise ConfigError([Fault(message, hints=(hint,))])


def _values(run: TrainedRun, config: type[Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in run.data.get("with", {}).items() if name in names}


def _samples(run: TrainedRun, file: Path) -> Iterator[Batch]:
    changes: dict[str, Any] = {
        "path": str(file), "validation_split": 0.0, "shuffle": False, "drop_last": False,
        "workers": 0, "format": "auto", "classes": run.spec.classes
        if run.data["with"].get("target") == "class" else None, "vocabulary": run.spec.vocabulary,
    }  # fmt: skip
    if run.preparation is not None:
        changes["classes"] = None
    data = samples_of(run, config := file_config({**_values(run, FileConfig), **changes}))
    check_samples(run, file, data.spec)
    count, size = data.spec.samples or 0, config.validation_batch_size
    return (
        data.samples(data.sampler.training_samples(0, begin, min(begin + size, count)))
        for begin in range(0, count, size)
    )


def _sequences(run: TrainedRun, file: Path) -> Iterator[Batch]:
    config = TextConfig(**{**_values(run, TextConfig), "path": str(file)})
    texts = Documents(
        file=file, key=config.field, least=config.min_chars, once=config.deduplicate,
        lenient=config.unreadable == "leave_out",
    )  # fmt: skip
    tokenizer, parts = run.tokenizer, []
    for text, ended in texts.parts(Account()):
        parts.append(np.asarray(tokenizer.encode(text)))
        if ended:
            parts.append(np.array([tokenizer.end]))
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
    if len(tokens) <= config.sequence_length:
        message = f"{len(tokens)} tokens are fewer than a sequence of {config.sequence_length}"
        raise PluginError(message)
    return TokenSequences(tokens, tokens, config, 0, tokenizer).validation()
