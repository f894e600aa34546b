"""One optimizer step: forward, backward, checks, update.

batches -> accumulate ... accumulate -> update
             |                            close the window (means over what counts)
             |                            regularize, unscale and check (one host read)
             to device, outputs, loss,    filter gradients, learning rates, optimizer
             backward                     tell everyone, drop the gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from forge_kernel.contract.run import Run
from forge_kernel.contract.values import Batch, Step
from forge_kernel.errors import NonFiniteError, PluginError, RunError
from forge_kernel.training.accumulation import GradientAccumulation
from forge_kernel.training.bus import Bus
from forge_kernel.training.events import pass_events
from forge_kernel.training.forward_pass import ForwardPass, term_means
from forge_kernel.training.forward_state import ForwardState
from forge_kernel.training.guards import out_of_memory
from forge_kernel.training.guards.finite_check import (
    FiniteCheck,
    in_words,
    name_non_finite,
    non_finite_names,
)
from forge_kernel.training.loss_scale import LossScale
from forge_kernel.training.param_group_schedule import ParamGroupSchedule
from forge_kernel.training.weight_terms import WeightTerms

MAX_SKIPS: Final = 100  # windows dropped in a row before the run gives up
MAX_HALVINGS: Final = 64  # no batch has 2^64 samples
MAX_EMPTY: Final = 100  # windows in a row in which nothing counts


class OptimizerStep:
    """The steps of a run that is set up.

    Args:
        forward: outputs and loss of a batch.
        bus: of the run.
        loss_scale: of fp16.
        roll_back: goes back to the newest checkpoint, after values that are not finite.

    Attributes:
        window: the micro-batches since the last update.
        phase: of training, as the phases' plugin said last.
        empty: windows in a row in which nothing counted.
    """

    def __init__(
        self,
        forward: ForwardPass,
        bus: Bus,
        loss_scale: LossScale,
        *,
        roll_back: Callable[[str], None],
    ) -> None:
        self.forward, self.bus, self.loss_scale = forward, bus, loss_scale
        self.run: Run = forward.run
        self.step: Step = forward.step
        self._roll_back = roll_back
        run = self.run
        self.window = GradientAccumulation()
        self.phase: str | None = None
        self.empty = 0
        self.updating = False  # weights and memories are between two steps
        self.parts = 1  # that a micro-batch is taken in, since memory was short
        self._skips = 0  # windows dropped in a row
        self._weight_terms = WeightTerms(run, self.step, bus)
        # local names for the hot path: one attribute each, no look-ups by name in the step
        self._to_device, self._training_loss = forward.to_device, forward.training_loss
        self._on_batch = bus.calls("on_batch")
        self._on_gradients = bus.calls("on_gradients")
        self._on_weights = bus.calls("on_weights")
        self._on_weights_changed = bus.calls("on_weights_changed")
        self._on_step_end = bus.calls("on_step_end")
        self._regularizes = self._weight_terms.asked
        self._compute_phase = bus.call("compute_phase")
        self._compute_loss_weights = bus.call("compute_loss_weights")
        self._compute_schedule_factors = bus.call("compute_schedule_factors")
        self._parameters = list(run.parameters.values())
        for parameter in self._parameters:
            parameter.grad = None  # what someone else's backward left would be stepped
        self._finite = FiniteCheck(run.device)
        self._several = run.strategy.world_size > 1
        self._checks = run.settings.non_finite != "off" or run.settings.precision == "fp16"
        self._group_rates = ParamGroupSchedule(run.optimizer)
        kept = ForwardState([run.model, *run.modules.values()])
        self._forward_state = kept if self._checks and not kept.empty else None

    def state_dict(self) -> dict[str, Any]:
        """What steps remember of those before."""
        return {
            "scale": self.loss_scale.value,
            "clean": self.loss_scale.clean,
            "skips": self._skips,
            "empty": self.empty,
            "phase": self.phase,
            "parts": self.parts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.loss_scale.value, self.loss_scale.clean = state["scale"], state["clean"]
        self._skips, self.empty = state["skips"], state["empty"]
        self.phase = self.step.phase = state["phase"]
        self.parts = state["parts"]

    def open(self) -> None:
        """Number the step that comes."""
        run, step = self.run, self.step
        step.number = number = run.progress.step + 1
        step.logs = number % run.settings.log_every == 0 or number == run.total_steps

    def take(self, batches: Sequence[Batch]) -> None:
        """A whole window: each micro-batch, then the update; a dropped one is counted as such."""
        parts, updates = self.parts, False
        if parts > 1:
            self._take_in_parts(batches, parts)
            return
        try:
            if len(batches) == 1:  # nearly always, and a step is short
                self.accumulate(batches[0], last=True)
            else:
                self._accumulate_all(batches)
            updates = True  # what follows does not depend on the size of a micro-batch
            _ = self.update()
            return
        except BaseException as error:
            report = self._after_error(error, batches, batches, updates=updates)
            if report is error:
                raise
            if report is not None:
                raise report from error
        # only here, where the error no longer holds what the pass had computed
        self._halve()
        self._take_in_parts(batches, parts)

    def _take_in_parts(self, whole: Sequence[Batch], before: int) -> None:
        """The window in smaller micro-batches, of half the size while memory is short.

        Args:
            whole: the window.
            before: the parts to go back to when smaller micro-batches are no help.
        """
        for _ in range(MAX_HALVINGS):
            batches, updates = out_of_memory.split(whole, self.parts), False
            try:
                self._accumulate_all(batches)
                updates = True
                _ = self.update()
                return
            except BaseException as error:
                report = self._after_error(error, batches, whole, updates=updates)
                if report is error:
                    raise
                if report is not None:
                    self.parts = before
                    raise report from error
            self._halve()
        raise AssertionError("a batch of one sample cannot be split")

    def _after_error(
        self, error: BaseException, taken: Sequence[Batch], whole: Sequence[Batch], *, updates: bool
    ) -> BaseException | None:
        """What to raise for an error in a window; None: smaller micro-batches may do."""
        self._abandon_window()
        report = out_of_memory.reported(self.run, error, taken)
        halves = self.run.settings.on_out_of_memory == "halve" and not self._several
        if report is error or updates or not halves:
            return report
        return None if out_of_memory.smaller(whole, self.parts) else report

    def _halve(self) -> None:
        """Take micro-batches in twice as many parts from here on."""
        self.parts *= 2
        out_of_memory.release_memory(self.run, self.parts)
        pass_events(self.run, self.bus)

    def _accumulate_all(self, batches: Sequence[Batch]) -> None:
        """Several micro-batches; a loss of terms is told beforehand what they will count."""
        if self._compute_loss_weights is not None:
            batches = self._weigh(batches, self._compute_loss_weights)
        for index, batch in enumerate(batches):
            self.accumulate(batch, last=index == len(batches) - 1)

    def _weigh(self, batches: Sequence[Batch], weights_of: Callable[..., Any]) -> tuple[Batch, ...]:
        """Tell the window what the loss's terms will count in all of it."""
        taken = tuple(self.forward.to_device(batch) for batch in batches)
        result = [weights_of(self.run, batch) for batch in taken]
        try:
            if result[0]:
                sums = (sum(each[1:], each[0]) for each in zip(*result, strict=True))
                self.window.expect(tuple(sums))
        except Exception:
            for answer in result:
                self.bus.judge("compute_loss_weights", answer)
            raise
        return taken

    def accumulate(self, batch: Batch, *, last: bool) -> Tensor:
        """One micro-batch forward and backward; its mean loss, detached."""
        run, step = self.run, self.step
        if self.window.count == 0:
            if self._forward_state is not None:
                self._forward_state.keep()
            if self._compute_phase is not None:
                self._take_phase(self._compute_phase)
        batch = self._to_device(batch)
        for listen in self._on_batch:
            listen(run, step, batch)
        if not self._several:
            return self._differentiate(self._training_loss(batch), batch)
        with run.strategy.backward_scope(last=last):
            return self._differentiate(self._training_loss(batch), batch)

    def _differentiate(self, answer: Any, batch: Batch) -> Tensor:
        window = self.window
        weight: float | Tensor
        try:
            if isinstance(answer, Tensor) and not answer.ndim:
                counted = batch.counted
                loss, weight = answer, counted.total
                if counted.weights is not None or not weight:
                    loss, weight = counted.mean(answer)
                share = window.add(loss, weight)
            elif type(answer) is tuple and len(answer) == 2 and isinstance(answer[0], Tensor):
                loss, weight = answer
                share = window.add(loss, weight)
            else:
                share, weight = self._share_of(answer, batch)
            mean = self.step.loss = window.loss
            # a micro-batch of weight 0 adds nothing, but other ranks wait for its gradients
            if isinstance(weight, Tensor) or weight or self._several:
                scale = self.loss_scale.value
                (share if scale == 1.0 else share * scale).backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            self.forward.judge_loss(answer, error)
            raise
        return share.detach() if mean is None else mean

    def _share_of(self, answer: Any, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """What is to be differentiated for a loss of values or of terms, and what it counts."""
        terms = term_means(answer, batch)
        if len(terms) == 1 and not terms[0].name:
            (term,) = terms
            mean = term.mean if term.scale == 1.0 else term.mean * term.scale
            share = self.window.add(mean, term.weight)
            return share, term.weight
        share = self.window.add_terms(terms)
        weights = [term.weight for term in terms]
        return share, sum(weights[1:], weights[0])

    def _take_phase(self, compute_phase: Callable[..., Any]) -> None:
        run, step = self.run, self.step
        phase = compute_phase(run, step)
        step.phase = phase
        if phase is not self.phase and (not isinstance(phase, str) or phase != self.phase):
            self.bus.judge("compute_phase", phase)
            before, self.phase = self.phase, phase
            for listen in self.bus.calls("on_phase_change"):
                listen(run, before, phase)
            pass_events(self.run, self.bus)

    def update(self) -> bool:
        """End the window: gradients to weights; False when it was dropped."""
        run, step, window = self.run, self.step, self.window
        if window.count > 1 or window.has_terms:
            self._close_window()
        window.count = 0
        if self._regularizes:
            self._weight_terms.add(self.loss_scale.value)
        parameters: list[nn.Parameter] = []
        gradients: list[Tensor] = []
        for parameter in self._parameters:  # one look at each gradient
            gradient = parameter.grad
            if gradient is not None:
                parameters.append(parameter)
                gradients.append(gradient)
        step.parameters, step.gradients = parameters, gradients
        if not self._unscale_and_check(gradients):
            return False
        if step.logs:
            _put_norm(run, gradients)
        self.updating = True  # filters remember what they were shown
        for listen in self._on_gradients:
            listen(run, step)
        if self._compute_schedule_factors is not None:
            factors = self._compute_schedule_factors(run, step)
            try:
                self._group_rates.write(factors)
            except Exception as error:
                _judge_factors(self.bus, factors, error)
                raise
        run.optimizer.step()
        for listen in self._on_weights:
            listen(run, step)
        for notify in self._on_weights_changed:
            notify(run)
        self._end_step()
        return True

    def _close_window(self) -> None:
        """Gradients and loss as means over what counts in all micro-batches."""
        step, window = self.step, self.window
        try:
            window.close([p.grad for p in self._parameters if p.grad is not None])
        except RunError as error:
            error.add_note(f"the loss is of {self.forward.givers()}")
            raise
        step.loss, step.losses = window.loss, window.terms

    def _end_step(self) -> None:
        """Count the step, tell everyone, drop the gradients."""
        run, step = self.run, self.step
        run.progress.step += 1
        self.updating = False  # whoever raises from here on, the step is whole and can be kept
        for listen in self._on_step_end:
            listen(run, step)
        if run.events:
            pass_events(self.run, self.bus)
        for parameter in step.parameters:
            parameter.grad = None
        self.open()

    def _unscale_and_check(self, gradients: list[Tensor]) -> bool:
        """Unscale, check, and decide for all ranks whether the window is stepped."""
        weight = self.window.weight
        if not isinstance(weight, Tensor) and not weight:
            self._drop_empty()
            return False
        if not self._checks:
            self.empty = 0
            return True
        loss, terms = self.step.loss, self._weight_terms
        assert loss is not None
        if self.forward.autocast is torch.float16:
            flag = self._finite.scale_and_check(gradients, 1.0 / self.loss_scale.value)
            flag = flag + ~torch.isfinite(loss)
            if terms.given:
                flag = flag + ~torch.isfinite(terms.total)
        elif terms.given:
            flag = self._finite.scale_and_check([*gradients, loss, terms.total.to(loss)], 1.0)
        else:  # a factor of 1 leaves the loss as it is, so it joins the one pass
            flag = self._finite.scale_and_check([*gradients, loss], 1.0)
        if isinstance(weight, Tensor):
            flag = torch.where(weight > 0, (flag > 0).float(), 2.0)
        if self._several:
            flag = self.run.strategy.reduce(flag)
        code = flag.item()  # the one host read of a step
        if code == 0:
            self._skips = self.empty = 0
            self.loss_scale.count_finite()
            return True
        self._finite.clear()
        if isinstance(weight, Tensor) and code == 2.0:
            self._drop_empty()
            return False
        self._after_non_finite()
        return False

    def _drop_window(self) -> None:
        """Leave no trace of the window; the step's number stands for the next one."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._forward_state is not None:
            self._forward_state.put_back()

    def _drop_empty(self) -> None:
        """Drop a window in which nothing counted.

        Raises:
            RunError: there have been too many in a row: the run would never end.
        """
        self._drop_window()
        self.empty += 1
        if self.empty >= MAX_EMPTY:
            raise RunError(self.nothing_counts(f"in {self.empty} optimizer steps in a row"))

    def nothing_counts(self, where: str) -> str:
        """What to say of data in which no target counts."""
        loss = next(entry.info.name for entry in self.bus.plan.answering("compute_loss"))
        return (
            f"the loss {loss} has nothing to learn from {where}: every target is "
            f"run.ignore_index ({self.run.settings.ignore_index}) or has the sample weight 0. "
            "Look at the targets, or name another run.ignore_index"
        )

    def _after_non_finite(self) -> None:
        """Apply the policy; the optimizer has not stepped and no filter has seen the values."""
        progress, policy = self.run.progress, self.run.settings.non_finite
        names = name_non_finite(self.run.named_parameters()) + self._sources()
        self._drop_window()
        progress.skipped += 1
        self._skips += 1
        if self.loss_scale.back_off():
            return  # an overflow of the scaled loss is how the scale finds its place
        where = f"in step {progress.step + 1}: {names}"
        if policy == "rollback":
            self._roll_back(where)
            return
        trained = {name: p for name, p in self.run.named_parameters() if p.requires_grad}
        broken = non_finite_names(trained)
        if policy in ("stop", "off") or self._skips >= MAX_SKIPS or broken:
            times = f" {self._skips} windows in a row" if self._skips > 1 else ""
            state = f"The weights are those of step {progress.step}"
            if broken:  # dropping windows mends nothing
                state = (
                    f"The weights are lost: {in_words(broken)} are not finite themselves. A "
                    "filter, the optimizer or a plugin has written that after finite gradients"
                )
            raise NonFiniteError(
                f"not finite{times} {where}. {state}. "
                "Lower the learning rate, clip gradients, or set run.non_finite to skip or rollback"
            )

    def _sources(self) -> str:
        """Which answers of plugins were not finite themselves."""
        result = list(self._weight_terms.non_finite())
        loss = self.step.loss
        if loss is not None and not bool(torch.isfinite(loss)):
            result.append(f"the loss of {self.forward.givers()}")
        return f"; not finite itself: {' and '.join(result)}" if result else ""

    def _abandon_window(self) -> None:
        """Something raised: who goes on all the same finds nothing of the window left behind."""
        if self.window.count and self._forward_state is not None:
            self._forward_state.put_back()
        self.window.abandon()
        for parameter in self._parameters:
            parameter.grad = None


def _put_norm(run: Run, gradients: list[Tensor]) -> None:
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
    run.metrics.put("grad_norm", norm)


def _judge_factors(bus: Bus, factors: Any, error: Exception) -> None:
    """Say whose factors cannot be used."""
    bus.judge("compute_schedule_factors", factors)
    if isinstance(error, PluginError):
        raise PluginError(f"{bus.giver('compute_schedule_factors')}: {error}") from error
