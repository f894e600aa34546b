"""The teacher of a distillation: where it comes from, whether it fits, and what it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from forge_kernel.api import (
    Batch,
    LazyModule,
    PluginError,
    Run,
    TrainedRun,
    call_model,
    load_run,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from forge_plugins.mathematics.losses import answer_store, deferred_logits
    from forge_plugins.mathematics.metrics import label_positions
else:
    torch = LazyModule("torch")
    answer_store = LazyModule("forge_plugins.mathematics.losses.answer_store")
    deferred_logits = LazyModule("forge_plugins.mathematics.losses.deferred_logits")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")

_SAID: Final = (
    "The quick brown fox, 12 345.67 times!\n\tdef f(x): return x ** 2  # naïve",
    "Größe über 中文字符 и кириллица 🙂", "<s></s><|endoftext|><|im_start|>",
)  # fmt: skip
"""Texts that two tokenizers are compared by: scripts, numbers, blanks, code, special names."""


def loaded_teacher(folder: str, run: Run) -> TrainedRun:
    """A run, or a model's folder, on the run's device; it is not trained.

    Raises:
        ConfigError, CheckpointError: it cannot be read.
        PluginError: it has another tokenizer or vocabulary than the data.
    """
    teacher = load_run(folder)
    _check_vocabulary(teacher, run)
    teacher.model.to(run.device).requires_grad_(False)
    return teacher


def _check_vocabulary(teacher: TrainedRun, run: Run) -> None:
    own, theirs = run.data.spec.vocabulary, teacher.spec.vocabulary
    if own is not None and theirs is not None and theirs < own:
        raise PluginError(
            f"distillation: the teacher {teacher.folder} has a vocabulary of {theirs} tokens, and "
            f"the data one of {own}: name a teacher with the data's tokenizer"
        )
    tokenizer = getattr(run.data, "tokenizer", None)
    if tokenizer is None or teacher.tokenizer is None:
        return
    for text in _SAID:
        pair = [list(map(int, each.encode(text))) for each in (tokenizer, teacher.tokenizer)]
        if pair[0] != pair[1]:
            raise PluginError(
                f"distillation: the teacher {teacher.folder} has another tokenizer than the data: "
                f"{text[:24]!r} is {pair[1][:8]} to it and {pair[0][:8]} to the data. Its answers "
                "would be about other tokens: name a teacher with the data's tokenizer"
            )


def check_heads(student: nn.Module, teacher: nn.Module, names: tuple[str, str]) -> None:
    """Refuse a teacher whose logits are of another number of classes.

    Args:
        student: the model in training.
        teacher: on the same data.
        names: of the heads of both.

    Raises:
        PluginError: the number of rows differs.
    """
    sizes = []
    for model, name in zip((student, teacher), names, strict=True):
        head = dict(model.named_modules()).get(name)
        weight = getattr(head, "weight", None)
        sizes.append(weight.shape[0] if weight is not None and weight.ndim == 2 else None)
    if None not in sizes and sizes[0] != sizes[1]:
        raise PluginError(
            f"distillation: the teacher gives {sizes[1]} logits and the model {sizes[0]}: they "
            "have other vocabularies"
        )


def head_of(model: nn.Module, wanted: str | None) -> str:
    """The name of a model's last layer.

    Raises:
        PluginError: it has none of this name.
    """
    name = wanted or deferred_logits.head_name(model) or "head"
    if name not in dict(model.named_modules()):
        raise PluginError(
            f"distillation: the teacher {type(model).__name__} has no layer '{name}' "
            f"(loss.with.loss.with.head); it has "
            f"{', '.join(name for name, _ in model.named_children())}"
        )
    return name


def check_plain_head(model: nn.Module, name: str, batch: Batch) -> None:
    """Refuse a teacher that changes what its head gives, which pieces would miss.

    Raises:
        PluginError: it does.
    """
    few = batch.rows(slice(0, 1))
    if deferred_logits.changes_after_head(
        model,
        model.get_submodule(name),
        lambda: label_positions.main_output(call_model(model, few)),
    ):
        raise PluginError(
            f"distillation: the teacher {type(model).__name__} changes what its layer '{name}' "
            "gives (such as a soft cap of the logits), which pieces would miss: use the loss "
            "cross_entropy inside distillation"
        )


def rows_before_head(model: nn.Module, name: str, batch: Batch) -> tuple[Tensor, nn.Module]:
    """What a teacher's head would be given at each target, shape (targets, width), and the head.

    Raises:
        PluginError: there are not as many rows as targets.
    """
    with torch.no_grad(), deferred_logits.without_head(model, name) as head:
        hidden = label_positions.main_output(call_model(model, batch))
    wanted = batch.targets.shape[1] if batch.targets.ndim > 1 else hidden.shape[1]
    if batch.positions is not None and hidden.ndim == 3 and hidden.shape[1] != wanted:
        hidden = hidden[:, batch.positions]
    rows = hidden.flatten(0, -2)
    if len(rows) != batch.targets.numel():
        raise PluginError(
            f"distillation: {len(rows)} answers of the teacher for {batch.targets.numel()} targets"
        )
    return cast("Tensor", rows), head


def counted_rows(batch: Batch) -> Tensor | None:
    """Numbers of the rows that count, int64; None: all do."""
    weights = batch.counted.weights
    return None if weights is None else weights.nonzero().squeeze(1)


def keys_of(batch: Batch) -> tuple[Any, Any]:
    """What tells a batch's samples apart, and how many of each one's rows count."""
    inputs = batch.inputs
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    samples, counted = batch.samples, batch.counted
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if isinstance(batch.positions, torch.Tensor):
        tensors.append(batch.positions.expand(samples, *batch.positions.shape))
    elif batch.positions is not None:
        place = batch.positions
        told = torch.tensor(
            [-1 if each is None else each for each in (place.start, place.stop, place.step)]
        )
        tensors.append(told.expand(samples, 3))
    rows = counted.rows // max(1, counted.samples)
    if counted.weights is None:
        counts = torch.full((samples,), rows)
    else:
        shown = (counted.weights > 0).view(samples, -1)
        tensors.append(shown)
        counts = shown.sum(1)
    tensors.append(counts)  # not the targets themselves: the teacher is not asked about them
    return answer_store.sample_keys(tensors), counts.cpu().numpy()


def source_of(folder: str) -> str:
    """What tells a teacher's folder from another: a hash of its files; empty: it is not there.

    Of a run the newest checkpoint's list of files, which has their hashes.
    """
    path = Path(folder)
    steps = list(path.glob("checkpoints/step-*/manifest.json"))
    if steps:
        newest = max(steps, key=lambda item: int(item.parent.name.partition("-")[2] or 0))
        return str(answer_store.digest_of([newest]))
    files = sorted(item for item in path.glob("*") if item.suffix in (".safetensors", ".bin"))
    return str(answer_store.digest_of(files)) if files else ""


def tie_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """Let a teacher use the student's frozen parameters where both are equal: no second copy.

    Returns:
        Bytes that are held once now.
    """
    theirs = dict(teacher.named_parameters())
    saved = 0
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if parameter.requires_grad or other is None or other.shape != parameter.shape:
            continue
        if other.dtype is parameter.dtype and torch.equal(other, parameter):
            other.data = parameter.data
            saved += other.numel() * other.element_size()
    return saved


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights, in hex."""
    result = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        result.update(name.encode())
        result.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return result.hexdigest()
