"""A session's set-up: what the plan names, built in life-cycle order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from forge_kernel.contract.run import Run
from forge_kernel.errors import Fault, PluginError
from forge_kernel.storage.random_state import seed_everything
from forge_kernel.training.device import resolve_device
from forge_kernel.training.extra_state import check_extra_states
from forge_kernel.training.forward_pass import ForwardPass
from forge_kernel.training.guards.disk_room import try_checkpoint
from forge_kernel.training.loss_scale import LossScale
from forge_kernel.training.optimizer_step import OptimizerStep
from forge_kernel.training.precision import resolve_precision, slow_precision_notice
from forge_kernel.training.session_state import SessionState
from forge_kernel.training.snapshot import roll_back
from forge_kernel.training.trainable import check_trainable
from forge_kernel.training.validation import Validation


def build(session: SessionState) -> None:
    """Build everything that the plan names, in life-cycle order.

    Args:
        session: not set up yet.

    Raises:
        RunError, PluginError: a device or a part is missing or wrong.
    """
    run, bus = session.run, session.bus
    run.device = resolve_device(session.settings.device)
    precision = resolve_precision(session.settings.precision, run.device)
    session.settings = run.settings = settings = replace(session.settings, precision=precision)
    session.loss_scale = LossScale(precision)
    if settings.threads is not None and torch.get_num_threads() != settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
    if settings.seed is not None:
        seed_everything(settings.seed)
    run.strategy.start()
    data = _need(session, "make_data")(run)
    run.data = bus.transform("transform_data", data, run)
    _set_total_steps(session)
    run.model = _need(session, "make_model")(run).to(run.device)
    run.active_model = run.model
    for answer in bus.calls("make_modules"):
        _add_modules(session.run, answer(run))
    _name_parameters(session.run)
    run.model = bus.transform("transform_model", run.model, run).to(run.device)
    run.model = run.strategy.transform_model(run, run.model)
    run.active_model = run.model
    _name_parameters(session.run)
    optimizer = _need(session, "make_optimizer")(run, list(run.named_parameters()))
    run.optimizer = optimizer
    session.forward = ForwardPass(run, session.step_state, bus)
    session.validation = Validation(session.forward, bus, session.plan, session.streams)
    if run.folder is not None:
        check_extra_states(run)
    check_trainable(run.parameters, {"": run.model, **run.modules}, optimizer)
    run.model.train()
    session.optimizer_step = OptimizerStep(
        session.forward, bus, session.loss_scale, roll_back=partial(roll_back, session)
    )


def _need(session: SessionState, hook: str) -> Callable[..., Any]:
    call = session.bus.call(hook)
    assert call is not None, f"the planner let a run pass without {hook}"
    return call


def _set_total_steps(session: SessionState) -> None:
    settings, run = session.settings, session.run
    lengths = [settings.max_steps] if settings.max_steps is not None else []
    per_epoch = run.data.batches_per_epoch
    if settings.max_epochs is not None and per_epoch is not None:
        lengths.append(settings.max_epochs * -(-per_epoch // settings.accumulate))
    run.total_steps = min(lengths) if lengths else None


def _add_modules(run: Run, answer: Mapping[str, nn.Module] | None) -> None:
    for name, module in (answer or {}).items():
        if name in run.modules:
            raise PluginError(f"two plugins give a module named '{name}'")
        run.modules[name] = module.to(run.device)


def _name_parameters(run: Run) -> None:
    named = dict(run.model.named_parameters())
    for name, module in run.modules.items():
        named.update({f"{name}.{key}": value for key, value in module.named_parameters()})
    run.parameters = named


def check_before_start(session: SessionState) -> None:
    """Refuse, once and before the first step, what could not be ended as asked.

    Raises:
        PluginError: a callback would wait for ever, an exporter cannot write the result.
        RunError: checkpoints cannot be kept in the run folder.
    """
    if session.is_checked:
        return
    session.validation.check()
    check_exports(session)
    try_checkpoint(session)
    session.is_checked = True


def check_exports(session: SessionState) -> None:
    """Ask the exporters, before anything is trained, whether they can write the result.

    Raises:
        PluginError: one of them cannot; names all that cannot.
    """
    if session.run.folder is None:
        return
    entries = session.plan.answering("check_export")
    answers = [
        (entry, answer(session.run))
        for entry, answer in zip(entries, session.bus.calls("check_export"), strict=True)
    ]
    faults = [Fault(f"{entry.label}: {reason}") for entry, reason in answers if reason]
    if faults:
        raise PluginError(faults)


def emit_notices(session: SessionState) -> None:
    """Say what a user would want to know before the first step."""
    _tell_groups(session)
    _tell_slow_precision(session)


def _tell_groups(session: SessionState) -> None:
    """Say of a loss over groups of samples that a micro-batch is its group."""
    count = session.settings.accumulate
    for entry in session.plan.entries:
        if count > 1 and entry.info.couples_samples:
            session.run.emit_event(
                "groups",
                f"The loss {entry.info.name} compares the samples of a micro-batch with each "
                f"other: run.accumulate ({count}) makes no larger groups of them, as a larger "
                "batch would.",
                loss=entry.info.name,
                accumulate=count,
            )


def _tell_slow_precision(session: SessionState) -> None:
    """Say of a precision that was chosen that it costs more than fp32 here."""
    precision = resolve_precision(session.settings.precision, session.run.device)
    notice = slow_precision_notice(precision, session.run.device)
    if notice is not None:
        session.run.emit_event("slow_precision", notice, precision=precision)
