"""Whether a loss or a validator counts what counts, and whether a dropped window leaves a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.run import Run
from forge_kernel.contract.values import Batch, Step
from forge_kernel.recorded_run import result_of
from forge_kernel.storage.state_tree import split_tree
from forge_kernel.testing.trial import Trial
from forge_kernel.training.loaders.in_memory import NoConfig
from forge_kernel.training.session import Session

TOLERANCE = 1e-5
"""Of gradients, as a fraction of the largest: sums in fp32 in another order."""


class _Gradients:
    """Keeps the gradients of the last optimizer step."""

    info = PluginInfo(name="gradients_kept", kind=Kind.GRADIENTS, config=NoConfig)

    def __init__(self) -> None:
        self.config = NoConfig()
        self.kept: Tensor | None = None

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Copy them."""
        names = {id(parameter): name for name, parameter in run.named_parameters()}
        pairs = zip(step.parameters, step.gradients, strict=True)
        ordered = sorted((names[id(p)], gradient.flatten().clone()) for p, gradient in pairs)
        self.kept = torch.cat([gradient for _, gradient in ordered])


def _step(trial: Trial, *batches: Batch) -> tuple[Tensor | None, float]:
    """Gradients of one optimizer step of fresh parts, None when it was dropped; and its loss."""
    torch.manual_seed(0)
    kept = _Gradients()
    session = trial.session(kept, accumulate=len(batches), seed=3)
    loss = float(session.step(*batches))
    return kept.kept, loss


def _apart(left: Tensor | None, other: Tensor | None) -> float:
    """The largest difference as a fraction of the largest gradient."""
    if left is None or other is None:
        return 0.0 if left is other else 1.0
    return float((left - other).abs().max() / left.abs().max().clamp_min(1e-12))


def _other_inputs(batch: Batch, rows: Tensor) -> Batch:
    """The batch with other inputs in some rows."""
    inputs = batch.inputs.clone()
    inputs[rows] = inputs[rows].flip(0) + (0.5 if inputs.is_floating_point() else 0)
    if not inputs.is_floating_point():
        inputs[rows] = (inputs[rows] + 1) % int(batch.inputs.max() + 1)
    return dataclasses.replace(batch, inputs=inputs)


def _cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The batch in pieces."""
    pieces, begin = [], 0
    for size in sizes:
        rows = slice(begin, begin + size)
        weights = None if batch.weights is None else batch.weights[rows]
        pieces.append(
            dataclasses.replace(
                batch, inputs=batch.inputs[rows], targets=batch.targets[rows], weights=weights
            )
        )
        begin += size
    return pieces


def _cases(batch: Batch) -> list[tuple[str, Batch, Tensor]]:
    """Batches in which some rows count for nothing: what they are, and which rows."""
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 2.0, 1.0, 0.0])
    result = [
        ("sample weights", dataclasses.replace(batch, weights=weights), weights == 0),
    ]
    if not batch.targets.is_floating_point():
        rows = torch.tensor([False, True, False, False, True, True, False, False])
        targets = batch.targets.clone()
        targets[rows] = batch.ignore_index
        result.append(("ignored targets", dataclasses.replace(batch, targets=targets), rows))
        both = dataclasses.replace(batch, targets=targets, weights=weights)
        result.append(("both", both, rows | (weights == 0)))
    return result


def faults_of_loss(trial: Trial, *, couples: bool) -> list[str]:
    """What a loss counts wrongly, in words; empty when all is right.

    Args:
        trial: of the loss.
        couples: whether a sample's loss depends on the others', so that no split is compared.
    """
    faults: list[str] = []
    batch = trial.batch()
    for what, case, nothing in [("plain", batch, None), *_cases(batch)]:
        whole, loss = _step(trial, case)
        if nothing is not None:
            other, again = _step(trial, _other_inputs(case, nothing))
            if _apart(whole, other) > TOLERANCE or abs(loss - again) > TOLERANCE * max(1, loss):
                faults.append(f"{what}: rows that count for nothing change the step")
        if couples:
            continue
        for sizes in ((5, 3), (1, 6, 1)):
            parts, again = _step(trial, *_cut(case, sizes))
            if _apart(whole, parts) > TOLERANCE or abs(loss - again) > TOLERANCE * max(1, loss):
                faults.append(f"{what}: micro-batches of {sizes} samples are another step")
    nothing_counts = dataclasses.replace(batch, weights=torch.zeros(len(batch.targets)))
    gradients, loss = _step(trial, nothing_counts)
    if gradients is not None or loss != 0.0:
        faults.append("weights that are all 0: the batch is learned from")
    return faults


def _metrics(trial: Trial, batches: list[Batch]) -> dict[str, float]:
    """The metrics of a validation over batches, by fresh parts."""
    torch.manual_seed(0)
    session = trial.session(seed=3)
    data: Any = session.run.data
    data.validation = lambda: iter(batches)
    return session.validate()


def faults_of_validator(trial: Trial) -> list[str]:
    """What a validator counts wrongly, in words; empty when all is right."""
    faults: list[str] = []
    batch = trial.batch()
    for what, case, nothing in [("plain", batch, None), *_cases(batch)]:
        whole = _metrics(trial, [case])
        if nothing is not None and (worse := _differ(whole, _metrics(
            trial, [_other_inputs(case, nothing)]
        ))):  # fmt: skip
            faults.append(f"{what}: rows that count for nothing change {worse}")
        splits = [(sizes, _metrics(trial, _cut(case, sizes))) for sizes in ((5, 3), (1, 6, 1))]
        faults += [
            f"{what}: batches of {sizes} samples change {worse}"
            for sizes, result in splits
            if (worse := _differ(whole, result))
        ]
    return faults


def _differ(left: dict[str, float], other: dict[str, float]) -> list[str]:
    """The metrics that differ."""
    return sorted(
        name
        for name in left.keys() | other.keys()
        if abs(left.get(name, torch.inf) - other.get(name, -torch.inf))
        > TOLERANCE * max(1.0, abs(left.get(name, 0.0)))
    )


class _NoNumber:
    """A term of the weights that is no number, in the steps that it is told."""

    info = PluginInfo(name="no_number", kind=Kind.REGULARIZERS, config=NoConfig)

    def __init__(self, step: int) -> None:
        self.config = NoConfig()
        self._step = step

    @hookimpl
    def regularize(self, run: Run, step: Step) -> Tensor | None:
        """NaN, with a gradient for every weight that is trained."""
        if step.number != self._step:
            return None
        terms = [p.sum() for _, p in run.named_parameters() if p.requires_grad]
        return torch.stack(terms).sum() * torch.nan


def traces_of_dropped_window(trial: Trial, folder: Path) -> list[str]:
    """Which parts of a trial remember a window that was dropped for a value that is no number.

    Args:
        trial: of a plugin.
        folder: an empty one, of the run.
    """
    torch.manual_seed(0)
    session = trial.session(_NoNumber(3), folder=folder, non_finite="skip", seed=3)
    batches = iter(session.run.data.batches(0, 0))
    for _ in range(2):
        session.step(next(batches))
    before = _memories(session)
    session.step(next(batches))
    after = _memories(session)
    assert session.run.progress.skipped == 1, "the window was not dropped"
    for listen in session.bus.calls("on_run_end"):  # files are closed there
        listen(session.run, result_of(session, {}))
    return sorted(label for label in before if not _same(before[label], after[label]))


Memory = tuple[Any, dict[str, Tensor]]
"""State as plain data, and copies of its tensors by name."""


def _memories(session: Session) -> dict[str, Memory]:
    """What each part remembers."""
    result: dict[str, Any] = {"the model": session.run.strategy.model_state(session.run)}
    result |= {entry.label: plugin.state_dict() for entry, plugin in session.bus.stateful()}
    split = {label: split_tree(state, label) for label, state in result.items()}
    return {
        label: (plain, {name: tensor.clone() for name, tensor in tensors.items()})
        for label, (plain, tensors) in split.items()
    }


def _same(left: Memory, other: Memory) -> bool:
    return left[0] == other[0] and all(
        torch.equal(tensor, other[1][name]) for name, tensor in left[1].items()
    )
