"""NaN and infinities in ten places of a run, under each policy: nothing of them is kept."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from plugin_run import scratch, small_run
from torch import Tensor, nn

from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.errors import NonFiniteError
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.training.guards.finite_check import non_finite_names, state_of_parameters
from forge_kernel.training.loaders.in_memory import NoConfig
from forge_plugins.callbacks.weight_average import WeightAverage, WeightAverageConfig
from forge_plugins.gradients.grokfast import Grokfast, GrokfastConfig

STEPS: Final = 8
POISON: Final = "weight beyond use"  # a number, of which nothing but infinities comes
PLACES: Final = (
    "input", "loss", "gradient", "parameter", "buffer", "optimizer state", "grokfast average",
    "filter output", "after the step", "weight average", POISON,
)  # fmt: skip
IN_TIME: Final = ("input", "loss", "gradient")  # caught before the optimizer has stepped


class Adam:
    """The optimizer part."""

    info = PluginInfo(name="adam_part", kind=Kind.OPTIMIZER, config=NoConfig)
    config = NoConfig()

    @hookimpl
    def make_optimizer(self, run: Any, parameters: Any) -> Any:
        return torch.optim.Adam([p for _, p in parameters], lr=0.01)


class Injector:
    """Writes a value into one place in a step, once or from then on."""

    info = PluginInfo(name="injector", kind=Kind.CALLBACKS, config=NoConfig)
    config = NoConfig()

    def __init__(self, place: str, value: float, at: int, *, again: bool) -> None:
        self.place, self.value, self.at, self.again = place, value, at, again
        self.calls = 0
        self.model: Any = None
        self.weights: dict[int, list[Tensor]] = {}  # by step, as they were at its end
        self.grokfast = Grokfast(GrokfastConfig())
        self.average = WeightAverage(WeightAverageConfig())

    def due(self, place: str, step: Any) -> bool:
        """Whether it is the moment, and the place."""
        if place != self.place or step.number < self.at or (self.calls and not self.again):
            return False
        self.calls += 1
        return True

    def spoil(self, tensor: Tensor) -> None:
        tensor.detach().view(-1)[0] = self.value

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        self.model = run.model
        self.weights[run.progress.step] = [p.detach().clone() for p in run.model.parameters()]

    @hookimpl
    def on_batch(self, run: Any, step: Any, batch: Any) -> None:
        if self.due("input", step):
            batch.inputs = batch.inputs.clone()
            batch.inputs[0] = self.value
        elif self.due("parameter", step):
            self.spoil(next(iter(run.model.parameters())))
        elif self.due("buffer", step):
            self.spoil(run.model[1].running_var)
        elif run.optimizer.state and self.due("optimizer state", step):
            memory = next(iter(run.optimizer.state.values()))
            self.spoil(memory[random.Random(self.at).choice(["exp_avg", "exp_avg_sq"])])
        elif self.grokfast._memory and self.due("grokfast average", step):
            self.spoil(next(iter(self.grokfast._memory.values())).mean)
        elif self.due("weight average", step):
            self.spoil(next(iter(self.average._ready(run).model.parameters())))

    @hookimpl
    def on_outputs(self, run: Any, step: Any, batch: Any, outputs: Any) -> None:
        if outputs.requires_grad and self.due("gradient", step):
            outputs.register_hook(lambda gradient: gradient * self.value)

    @hookimpl
    def on_weights(self, run: Any, step: Any) -> None:
        if self.due("after the step", step):
            self.spoil(next(iter(run.model.parameters())))

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        if self.due(POISON, step):
            next(iter(run.model.parameters())).detach().fill_(3e38)
        self.weights[run.progress.step] = [p.detach().clone() for p in run.model.parameters()]


class InjectedLoss:
    """Cross-entropy, times the value when it is the moment."""

    info = PluginInfo(name="injected_loss", kind=Kind.LOSS, config=NoConfig)
    config = NoConfig()

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    @hookimpl
    def compute_loss(self, run: Any, step: Any, batch: Any, outputs: Any) -> Tensor:
        values = nn.functional.cross_entropy(outputs, batch.targets, reduction="none")
        spoiled = torch.is_grad_enabled() and self.injector.due("loss", step)
        return values * self.injector.value if spoiled else values


class InjectedFilter:
    """Stands after the filter of the gradients."""

    info = PluginInfo(name="injected_filter", kind=Kind.GRADIENTS, config=NoConfig)
    config = NoConfig()

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    @hookimpl
    def on_gradients(self, run: Any, step: Any) -> None:
        if self.injector.due("filter output", step):
            self.injector.spoil(step.gradients[0])


def attempt(injector: Injector, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(5)
    plugins = [
        injector.grokfast, injector, injector.average, InjectedLoss(injector),
        InjectedFilter(injector), Adam(),
    ]  # fmt: skip
    return small_run(
        plugins, folder, max_steps=STEPS, save_every=2, validate_every=4, seed=3, **settings
    )


@functools.cache
def undisturbed(accumulate: int, precision: str) -> dict[int, list[Tensor]]:
    """The weights after each step of a run in which nothing is injected."""
    injector = Injector("nowhere", 0.0, 99, again=False)
    with scratch() as folder:
        attempt(injector, folder / "r", accumulate=accumulate, precision=precision)
    return injector.weights


def kept(folder: Path) -> tuple[list[int], str]:
    """The checkpoints' steps, and what of them is no number."""
    store = CheckpointStore(folder / "checkpoints")
    for step in store.steps():
        snapshot = store.load(store.path(step))
        shapes = {tensor.shape for tensor in snapshot.model.values()}
        trees = {name: snapshot.trees[name] for name in ("optimizer", "plugins")}
        bad = non_finite_names({**snapshot.model, **state_of_parameters(trees, shapes)})
        if bad:
            return store.steps(), f"the checkpoint of step {step} holds {bad}"
        if snapshot.step != step or snapshot.trees["progress"]["step"] != step:
            return store.steps(), f"the checkpoint of step {step} says {snapshot.step}"
    return store.steps(), ""


def is_finite(weights: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights)


def wrong_claim(injector: Injector, outcome: Any, folder: Path, good: dict[int, Any]) -> str:
    """What the run says of its steps and weights that is not so."""
    steps = json.loads((folder / "result.json").read_text())["steps"]
    weights = [p.detach() for p in injector.model.parameters()]
    claim = re.search(r"The weights are those of step (\d+)", outcome.words)
    if claim is not None:
        step = int(claim[1])
        if step != steps:
            return f"the error says step {step}, the result {steps}"
        if not is_finite(weights):
            return f"the error calls weights that are no numbers those of step {step}"
        caught = injector.place in IN_TIME and not injector.again and step == injector.at - 1
        if caught and not all(map(torch.equal, weights, good[step])):
            return f"the weights are not those of step {step}"
    if injector.calls == 0 and injector.place != "weight average" and outcome.error is not None:
        return f"failed without an injection: {outcome.words}"
    return ""


def judged(injector: Injector, folder: Path, policy: str, accumulate: int, precision: str) -> str:
    good = undisturbed(accumulate, precision)
    outcome = attempt(
        injector, folder, non_finite=policy, accumulate=accumulate, precision=precision
    )
    if outcome.error is not None and not isinstance(outcome.error, NonFiniteError):
        return f"another error: {outcome.words} {outcome.where}"
    if policy == "off" and outcome.error is not None:
        return f"off ended the run: {outcome.words}"
    steps, bad = kept(folder)
    if bad:
        return bad
    if outcome.error is None:
        if outcome.result.steps != STEPS:
            return f"completed after {outcome.result.steps} steps"
        finite = is_finite([p.detach() for p in outcome.result.model.parameters()])
        if policy != "off" and not finite:
            return "completed with weights that are no numbers"
        if policy == "off" and not finite and "was not written" not in outcome.log:
            return "nobody was told that nothing was saved"
        if finite and policy != "off" and (not steps or steps[-1] != STEPS):
            return f"completed, and the checkpoints are of {steps}"
        once = injector.place in IN_TIME and not injector.again
        if policy == "skip" and once and injector.calls and '"skipped": 1' not in outcome.log:
            skipped = outcome.result.final.get("skipped_steps")
            if skipped != 1:
                return f"one window was dropped, {skipped} are counted"
    elif injector.place in IN_TIME and not injector.again and policy in ("skip", "rollback"):
        return f"{policy} ended the run: {outcome.words}"
    elif injector.place == POISON and policy == "rollback" and not injector.again:
        return f"an older checkpoint was not gone back to: {outcome.words}"
    return wrong_claim(injector, outcome, folder, good)


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each place with each policy, accumulation and precision in turn; value and moment drawn."""
    cases = list(
        itertools.product(PLACES, ("stop", "skip", "rollback", "off"), (1, 3), ("fp32", "bf16"))
    )
    draw.shuffle(cases)
    for place, policy, accumulate, precision in itertools.islice(itertools.cycle(cases), count):
        value = draw.choice([math.nan, math.inf, -math.inf])
        at, again = draw.randint(1, STEPS - 1), draw.random() < 0.25
        name = f"{value} in {place} at {at}{' and on' if again else ''}, {policy}, {accumulate} "
        injector = Injector(place, value, at, again=again)
        with scratch() as folder:
            wrong = judged(injector, folder / "r", policy, accumulate, precision)
            yield Trial(f"{name}{precision}", wrong)


BATTERY = Battery(
    "non-finite",
    "no checkpoint holds what is no number, and what is said of steps and weights is so",
    ci=160,
    deep=500,
    trials=trials,
)
