"""One batch through the model: on the device, with what counts in it, to outputs and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from forge_kernel.contract.answers import shown
from forge_kernel.contract.counting import loss_terms
from forge_kernel.contract.model_call import ModelCall
from forge_kernel.contract.run import Run
from forge_kernel.contract.values import Batch, Step
from forge_kernel.errors import PluginError, RunError
from forge_kernel.training.accumulation import TermMean
from forge_kernel.training.bus import Bus
from forge_kernel.training.loaders.data_loaders import batch_from

AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ForwardPass:
    """What training and validation compute of a batch.

    Args:
        run: set up, with its model.
        step: what hooks are told of the step.
        bus: of the run.

    Attributes:
        autocast: dtype of the products, or None for the weights' own.
        to_device: the batch on the device, with what counts in it; what is no batch is refused.
        training_loss: the loss's answer to a batch; listeners are told the outputs.
        batches: taken so far, in training and validation: a sign of life.
    """

    to_device: Callable[[Any], Batch]
    training_loss: Callable[[Batch], Any]

    def __init__(self, run: Run, step: Step, bus: Bus) -> None:
        self.run, self.step = run, step
        self.batches = 0
        self.autocast = AUTOCAST.get(run.settings.precision)
        # chosen here, since each step calls it
        self.to_device = self._on_host if run.device.type == "cpu" else self._moved
        self._ignore_index = run.settings.ignore_index
        self._bus = bus
        self._on_outputs = bus.calls("on_outputs")
        self._compute_outputs = bus.call("compute_outputs")
        compute_loss = bus.call("compute_loss")
        assert compute_loss is not None, "the planner let a run pass without compute_loss"
        self._compute_loss = compute_loss
        self._model_call = ModelCall(run.model)
        self.training_loss = self._plainly if self.autocast is None else self._under_autocast

    def _on_host(self, batch: Any) -> Batch:
        self.batches += 1
        taken: Batch = batch if isinstance(batch, Batch) else batch_from(batch)
        taken.ignore_index = self._ignore_index
        return taken

    def _moved(self, batch: Any) -> Batch:
        taken = self._on_host(batch)
        counted = taken.counted  # before it moves: on the host counting waits for nothing
        moved: Batch = taken.to(self.run.device)
        moved.ignore_index = taken.ignore_index
        moved.counted_as(counted, self.run.device)
        return moved

    def outputs(self, batch: Batch) -> Any:
        """What the model gives for a batch."""
        if self._compute_outputs is not None:
            return self._compute_outputs(self.run, self.step, batch)
        if batch.positions is None and isinstance(batch.inputs, Tensor):
            return self.run.active_model(batch.inputs)
        return self._model_call(self.run.active_model, batch)

    def _under_autocast(self, batch: Batch) -> Any:
        with torch.autocast(self.run.device.type, self.autocast):
            return self._plainly(batch)

    def _plainly(self, batch: Batch) -> Any:
        run, step = self.run, self.step
        outputs = self.outputs(batch)
        try:
            for listen in self._on_outputs:
                listen(run, step, batch, outputs)
            return self._compute_loss(run, step, batch, outputs)
        except Exception as error:
            self._judge_outputs(outputs, error)
            raise

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The arithmetic of the run's products."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.run.device.type, self.autocast)

    def validation_loss(self, batch: Batch) -> tuple[Any, Any]:
        """The loss's answer and the outputs."""
        with self.arithmetic():
            return self._validation_loss(batch)

    def _validation_loss(self, batch: Batch) -> tuple[Any, Any]:
        outputs = self.outputs(batch)
        try:
            return self._compute_loss(self.run, self.step, batch, outputs), outputs
        except Exception as error:
            self._judge_outputs(outputs, error)
            raise

    def _judge_outputs(self, outputs: Any, error: Exception) -> None:
        """Say whose outputs a loss failed on, where a plugin gave them.

        Raises:
            PluginError: no loss could have read them.
        """
        if self._compute_outputs is None:
            return
        try:
            self._bus.judge("compute_outputs", outputs)
        except PluginError as wrong:
            raise wrong from error
        giver = self._bus.giver("compute_outputs")
        error.add_note(f"the outputs that the loss read, {shown(outputs)}, are of {giver}")

    def givers(self) -> str:
        """Who gave the loss: the plugin, and the one whose outputs it read."""
        of_outputs = ""
        if self._compute_outputs is not None:
            of_outputs = f" from the outputs of {self._bus.giver('compute_outputs')}"
        weighed = self._bus.call("compute_loss_weights") is not None
        weights = f", weighed by {self._bus.giver('compute_loss_weights')}" if weighed else ""
        return f"{self._bus.giver('compute_loss')}{of_outputs}{weights}"

    def judge_loss(self, answer: Any, error: Exception) -> None:
        """Say whose loss cannot be used, where the answer is what an error is of.

        Raises:
            PluginError: it is.
        """
        try:
            self._bus.judge("compute_loss", answer)
        except PluginError as wrong:
            raise wrong from error
        if isinstance(error, PluginError):  # as many values as nothing in the batch
            raise PluginError(f"{self.givers()}: {error}") from error
        if isinstance(error, RunError):
            error.add_note(f"the loss is of {self.givers()}")


def term_means(answer: Any, batch: Batch) -> list[TermMean]:
    """The means of a loss's terms over what counts in a batch."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor):
        return [TermMean(*answer)]
    counted = batch.counted
    return [TermMean(*term.mean(counted), term.scale, term.name) for term in loss_terms(answer)]


def joined(terms: Sequence[TermMean]) -> tuple[Tensor, float | Tensor]:
    """One mean and weight of a batch's terms, for whoever looks at the batch alone."""
    if len(terms) == 1:
        (term,) = terms
        return term.mean if term.scale == 1.0 else term.mean * term.scale, term.weight
    mean = torch.stack([term.mean * term.scale for term in terms]).sum()
    weights = [term.weight for term in terms]
    return mean, sum(weights[1:], weights[0]) / len(weights)
