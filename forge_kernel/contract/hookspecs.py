"""Every event of a run, in life-cycle order: the book of the project.

The prefix of a hook is its contract:

- `make_*`: exactly one plugin answers, once (`make_modules`, `make_metrics`: all answers count);
- `transform_*`: each gets the last one's answer and returns the next;
- `compute_*`: at most one plugin answers;
- `on_*`: everyone is told and answers nothing;
- all others (`regularize`, `measure`, `unfinished`, `check_export`, `export`): everyone's answers
  are collected.

Each docstring says what a listener may write; all else is read only, and `run.checked` enforces
that. An observer writes nothing but itself. Hooks that make the model, the batch, the loss or the
weights may draw from the random streams, which are kept with the run; others may not, since the run
would be another one without them: they draw from a generator of their own (`run.seed`).

    strategy starts
    make_data -> transform_data* -> make_model -> make_modules* -> transform_model*
      -> make_optimizer -> make_metrics* -> check_export* -> on_run_start*
    per step:
      compute_phase / on_phase_change*
      on_batch* -> compute_outputs -> on_outputs* -> compute_loss -> backward    (per micro-batch;
      of several, compute_loss_weights before the first)
      -> regularize* -> unscale -> finite? -> on_gradients* -> compute_schedule_factors
      -> optimizer.step -> on_weights* -> on_weights_changed* -> on_step_end*
    when due:  validate -> unfinished* -> on_validation*; log_metrics* -> on_log*; on_checkpoint*
               on_epoch_end*; on_event* (what plugins told, after the hook that they told it in)
    finally:   validate -> export* -> on_run_end*          (on_error* when something raised)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from forge_kernel.contract.counting import LossAnswer
    from forge_kernel.contract.data import Data
    from forge_kernel.contract.metrics import Metric
    from forge_kernel.contract.result import RunResult
    from forge_kernel.contract.run import Run
    from forge_kernel.contract.values import Batch, Event, LogRecord, ScheduleFactors, Step

PROJECT: Final = "forge_kernel"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def make_data(run: Run) -> Data:  # type: ignore[empty-body]
    """Give the training and validation batches. May write: nothing."""


@hookspec
def transform_data(run: Run, data: Data) -> Data:  # type: ignore[empty-body]
    """Give the data that takes the place of `data`. May write: nothing."""


@hookspec
def make_model(run: Run) -> nn.Module:  # type: ignore[empty-body]
    """Give the network; `run.data` is known. May write: nothing.

    The kernel moves the module to the run's device and draws its initial weights from the run's
    seed.
    """


@hookspec
def make_modules(run: Run) -> Mapping[str, nn.Module]:  # type: ignore[empty-body]
    """Give further trainable modules by name (heads, loss weights, teachers). May write: nothing.

    Their parameters join those of the model for the optimizer and the checkpoint.
    """


@hookspec
def transform_model(run: Run, model: nn.Module) -> nn.Module:  # type: ignore[empty-body]
    """Give the model that takes the place of `model`, or `model` itself changed in place.

    May write: the model.
    """


@hookspec
def make_optimizer(  # type: ignore[empty-body]
    run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
) -> Optimizer:
    """Give the optimizer over the named trainable parameters. May write: nothing."""


@hookspec
def make_metrics(run: Run) -> Sequence[Metric]:  # type: ignore[empty-body]
    """Give the metrics that each validation pass feeds and reads. May write: nothing."""


@hookspec
def on_run_start(run: Run) -> None:
    """Everything is built and, on resume, restored; `run` is sealed. May write: itself."""


@hookspec
def compute_phase(run: Run, step: Step) -> str | None:
    """Name the phase of this step; the one clock that all read. May write: itself."""


@hookspec
def on_phase_change(run: Run, before: str | None, after: str | None) -> None:
    """The phase changed; the new one is already in force. May write: itself and metrics."""


@hookspec
def on_batch(run: Run, step: Step, batch: Batch) -> None:
    """A micro-batch is on the device, the forward pass comes next.

    May write: the batch's fields, itself, metrics.
    """


@hookspec
def compute_outputs(run: Run, step: Step, batch: Batch) -> Any:
    """Run the model on the batch; without an answer, `model(batch.inputs)`. May write: nothing.

    Used in training and in validation.
    """


@hookspec
def on_outputs(run: Run, step: Step, batch: Batch, outputs: Any) -> None:
    """The forward pass of a micro-batch of training is done; not called in validation.

    `outputs` is None where the loss runs the model itself. May write: itself, metrics.
    """


@hookspec
def compute_loss(run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
    """Give the loss of the micro-batch as values of which the kernel takes the mean.

    A tensor with one value for each target or for each sample; their mean over what counts (see
    `batch.counted`) as a 0-d tensor; a `LossTerm`, which also has factors of the divisor; or a list
    of terms, whose means are added up. Sample weights and ignored targets are the kernel's to
    apply. A loss that counts in its own way gives a pair: the mean (0-d; 0, never NaN, where
    nothing counts) and what it was taken over.

    What it remembers is written in `on_step_end`, so that a dropped window leaves no trace. Used in
    training and in validation. May write: metrics.
    """


@hookspec
def compute_loss_weights(run: Run, batch: Batch) -> Sequence[float | Tensor]:  # type: ignore[empty-body]
    """Give what each term of the loss will count in a micro-batch, from its targets alone.

    Asked before the first of several micro-batches, of a loss that gives several terms: their
    gradients cannot be told apart afterwards. Empty: the loss gives one term. May write: nothing.
    """


@hookspec
def regularize(run: Run, step: Step) -> Tensor | None:
    """Give a term of the weights (0-d) to add to the loss, once per optimizer step.

    May write: itself, metrics.
    """


@hookspec
def on_gradients(run: Run, step: Step) -> None:
    """The gradients of the window are complete, unscaled and finite.

    May write: the values of `step.gradients` in place, itself, metrics.
    """


@hookspec
def compute_schedule_factors(run: Run, step: Step) -> ScheduleFactors:  # type: ignore[empty-body]
    """Give rate, momentum and weight decay of this step as factors of the configured ones.

    May write: itself, metrics.
    """


@hookspec
def on_weights(run: Run, step: Step) -> None:
    """The optimizer has stepped. May write: parameters in place, itself, metrics."""


@hookspec
def on_weights_changed(run: Run) -> None:
    """Parameters have new values (a step, a load or a restore). May write: itself.

    What was derived from the weights is to be forgotten here.
    """


@hookspec
def on_step_end(run: Run, step: Step) -> None:
    """The optimizer step is complete and counted. May write: itself and metrics."""


@hookspec
def compute_evaluation_model(run: Run) -> nn.Module:  # type: ignore[empty-body]
    """Name the model that validation and export use. May write: itself."""


@hookspec
def unfinished(run: Run) -> str | None:
    """Say why the network is not yet what will be exported; None: it is. May write: nothing.

    Such as levels that are still being blended in. Its metrics are of another network: they are
    never kept as the best, and callbacks do not hear of them (see `on_validation`).
    """


@hookspec
def on_validation(run: Run, metrics: Mapping[str, float]) -> None:
    """A validation pass is complete. May write: itself; may request stop, save, restore.

    Plugins of the kind callbacks hear of it when the network is what will be exported, and before
    that from the step that their setting `not_before` names; those whose card says
    `hears_unfinished` always do.
    """


@hookspec
def log_metrics(run: Run, step: Step) -> Mapping[str, float | Tensor | None]:  # type: ignore[empty-body]
    """Give metrics for the log line that is due; None is "not measured". May write: itself."""


@hookspec
def on_event(run: Run, event: Event) -> None:
    """A plugin made something known with `run.emit_event`. May write: itself."""


@hookspec
def on_log(run: Run, record: LogRecord) -> None:
    """The metrics of a log interval. May write: itself."""


@hookspec
def on_checkpoint(run: Run, folder: Path) -> None:
    """A checkpoint is committed at `folder`. May write: itself."""


@hookspec
def on_epoch_end(run: Run) -> None:
    """A pass over the training data is complete. May write: itself and metrics."""


@hookspec
def check_export(run: Run) -> str | None:
    """Say before the first step why `export` could not write this run's result; None: it can.

    The run is refused then, with what was said. May write: nothing.
    """


@hookspec
def export(run: Run, folder: Path) -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Write the result into the empty `folder` and say what was written (the manifest).

    May write: files below `folder`.
    """


@hookspec
def on_run_end(run: Run, result: RunResult) -> None:
    """The run is over and its result known; also after a stop. May write: itself."""


@hookspec
def on_error(run: Run, error: BaseException) -> None:
    """The run failed and its result is written; `error` is raised again. May write: itself."""
