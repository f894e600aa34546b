"""Plugins that write what their hook does not own, under `run.checked`."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from battery import Battery, Trial
from misbehaviour import beside, misbehaving
from plugin_run import scratch, small_run
from wrong_returns import KINDS

from forge_kernel.api import Kind
from forge_kernel.contract.answers import ANSWERED
from forge_kernel.planning.plan import HOOKS
from forge_kernel.training.guards.ownership import OWNED


def write_parameters(run: Any) -> None:
    with torch.no_grad():
        next(iter(run.model.parameters())).add_(0.5)


def write_gradients(run: Any) -> None:
    parameter = next(iter(run.model.parameters()))
    if parameter.grad is None:
        parameter.grad = torch.ones_like(parameter)
    else:
        parameter.grad.mul_(2.0).add_(1.0)


def write_rates(run: Any) -> None:
    run.optimizer.param_groups[0]["lr"] *= 0.5


def write_groups(run: Any) -> None:
    run.optimizer.param_groups[0]["weight_decay"] += 0.25


def write_state(run: Any) -> None:
    parameter = next(iter(run.model.parameters()))
    memory = run.optimizer.state[parameter]
    memory["momentum_buffer"] = torch.rand_like(parameter.detach().clone(), requires_grad=False)


def write_modes(run: Any) -> None:
    for module in run.model.modules():
        module.training = not module.training


def write_progress(run: Any) -> None:
    run.progress.skipped += 1


def draw_python(run: Any) -> None:
    random.random()


def draw_numpy(run: Any) -> None:
    np.random.rand()


def draw_torch(run: Any) -> None:
    torch.rand(1)


def write_grad_mode(run: Any) -> None:
    torch.set_grad_enabled(not torch.is_grad_enabled())


def write_folder(run: Any) -> None:
    os.chdir(os.pardir)


ACTS: Final[Mapping[str, Callable[[Any], None]]] = {
    "parameters": write_parameters,
    "gradients": write_gradients,
    "rates": write_rates,
    "the optimizer's groups": write_groups,
    "the optimizer's state": write_state,
    "module modes": write_modes,
    "progress": write_progress,
    "python's random stream": draw_python,
    "numpy's random stream": draw_numpy,
    "torch's random stream": draw_torch,
    "grad mode": write_grad_mode,
    "the working folder": write_folder,
}
NO_MODEL: Final = ("make_data", "transform_data", "make_model")
NO_OPTIMIZER: Final = (*NO_MODEL, "make_modules", "transform_model", "make_optimizer")
OF_THE_OPTIMIZER: Final = ("rates", "the optimizer's groups", "the optimizer's state")
OF_THE_MODEL: Final = ("parameters", "gradients", "module modes")


def possible(hook: str, what: str) -> bool:
    """Whether there is anything of it yet."""
    if what in OF_THE_OPTIMIZER:
        return hook not in NO_OPTIMIZER
    return what not in OF_THE_MODEL or hook not in NO_MODEL


def judged(hook: str, kind: Kind, what: str, folder: Path) -> str:
    act = ACTS[what]
    plugin = misbehaving(hook, kind, lambda run, *_: act(run), sees=True)
    several = 2 if hook == "compute_loss_weights" else 1
    home = Path.cwd()
    try:
        outcome = small_run(
            [plugin, *beside(hook, kind)], folder, checked=True, accumulate=several, save_every=2
        )
    finally:
        os.chdir(home)
        torch.set_grad_enabled(True)
    said = f"{outcome.words}\n{outcome.log}"
    named = f"culprit wrote {what} in {hook}" in said
    owned = kind is not Kind.OBSERVERS and what in OWNED.get(hook, frozenset())
    if owned:
        return "wrongly refused: " + said[-400:] if "culprit wrote" in said else ""
    return "" if named else f"not seen: {said[-400:]}"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each hook, by each kind that may answer it, with each trespass, in a drawn order."""
    cases = []
    for hook in HOOKS:
        kinds = [KINDS[hook]] if hook in ANSWERED else [Kind.CALLBACKS, Kind.OBSERVERS]
        if hook in ANSWERED and not hook.startswith(("make_", "compute_", "check_", "export")):
            kinds.append(Kind.GRADIENTS)
        cases += [
            (hook, kind, what)
            for kind, what in itertools.product(kinds, ACTS)
            if possible(hook, what) and not (hook == "transform_model" and what in OF_THE_MODEL)
        ]
    draw.shuffle(cases)
    for hook, kind, what in itertools.islice(itertools.cycle(cases), count):
        with scratch() as folder:
            yield Trial(f"{what} in {hook} ({kind})", judged(hook, kind, what, folder / "r"))


BATTERY = Battery(
    "trespasses",
    "what a hook does not own is seen and named, what it owns is not refused",
    ci=350,
    deep=1200,
    trials=trials,
)
