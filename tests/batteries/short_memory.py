"""Memory that does not suffice, at each place of a run: told with what helps, and nothing lost."""

from __future__ import annotations

import inspect
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from plugin_run import CLASSES, FEATURES, features, parts, scratch, small_run
from torch import nn

from forge_kernel import resume
from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.contract import hookspecs
from forge_kernel.errors import OutOfMemoryError
from forge_kernel.storage.checkpoint_store import CheckpointReader
from forge_kernel.training.loaders.in_memory import NoConfig

STEPS: Final = 6
HOOKS: Final = (
    "on_run_start", "on_batch", "on_outputs", "on_gradients", "on_weights", "on_weights_changed",
    "on_step_end", "on_log", "log_metrics", "on_validation", "on_checkpoint", "on_epoch_end",
)  # fmt: skip
SITES: Final = (
    *HOOKS, "make_model", "make_optimizer", "make_data", "batches", "validation batches", "forward",
    "backward", "loss", "optimizer step", "metric",
)  # fmt: skip
SET_UP: Final = ("make_model", "make_optimizer", "make_data", "on_run_start")
IN_AN_UPDATE: Final = ("on_gradients", "on_weights", "on_weights_changed", "optimizer step")
SPLITS: Final = ("forward", "backward", "loss")  # where a smaller micro-batch helps


def cuda() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def host() -> BaseException:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("there is no such memory")


def python() -> BaseException:
    return MemoryError()


def library() -> BaseException:
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")


ERRORS: Final = (cuda, host, python, library)


class Short:
    """Where memory is short, in which step, and for how many rows it suffices."""

    def __init__(self, site: str, at: int, error: Callable[[], BaseException], rows: int) -> None:
        self.site, self.at, self.error, self.rows = site, at, error, rows
        self.step = 0

    def look(self, site: str, rows: int | None = None) -> None:
        """Raise where it is the place and the time."""
        suffices = rows is not None and rows <= self.rows
        if site == self.site and not suffices and (site in SET_UP or self.step >= self.at):
            raise self.error()


class Network(nn.Module):
    """Two layers; no sample sees another."""

    def __init__(self, short: Short) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.short = short

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = len(inputs)
        if self.training:
            self.short.look("forward", rows)
        outputs: torch.Tensor = self.layers(inputs)
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: self.short.look("backward", rows))
        return outputs


class Part:
    """One kind's part that may be short of memory."""

    def __init__(self, short: Short) -> None:
        self.short, self.config = short, NoConfig()


class Data(Part):
    info = PluginInfo(name="short_data", kind=Kind.DATA, config=NoConfig)

    @hookimpl
    def make_data(self, run: Any) -> Any:
        self.short.look("make_data")
        short, data = self.short, features()
        batches, validation = data.batches, data.validation

        def counted(epoch: int, place: int) -> Iterator[Any]:
            for batch in batches(epoch, place):
                short.look("batches")
                yield batch

        def looked() -> Iterator[Any]:
            short.look("validation batches")
            yield from validation()

        data.batches, data.validation = counted, looked  # type: ignore[method-assign]
        return data


class Model(Part):
    info = PluginInfo(name="short_model", kind=Kind.MODEL, config=NoConfig)

    @hookimpl
    def make_model(self, run: Any) -> nn.Module:
        self.short.look("make_model")
        return Network(self.short)


class Optimizer(Part):
    info = PluginInfo(name="short_optimizer", kind=Kind.OPTIMIZER, config=NoConfig)

    @hookimpl
    def make_optimizer(self, run: Any, parameters: Any) -> Any:
        self.short.look("make_optimizer")
        made = torch.optim.AdamW([p for _, p in parameters], lr=0.02)
        made.register_step_pre_hook(lambda *_: self.short.look("optimizer step"))
        return made


class Loss(Part):
    info = PluginInfo(name="short_loss", kind=Kind.LOSS, config=NoConfig)

    @hookimpl
    def compute_loss(self, run: Any, step: Any, batch: Any, outputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.short.look("loss", len(outputs))
        return nn.functional.cross_entropy(outputs, batch.targets, reduction="none")


class Validator(Part):
    info = PluginInfo(name="short_validator", kind=Kind.VALIDATORS, config=NoConfig)

    @hookimpl
    def make_metrics(self, run: Any) -> list[Any]:
        return [self]

    def reset(self) -> None: ...

    def update(self, batch: Any, outputs: Any, loss: Any, weight: Any) -> None:
        self.short.look("metric")

    def compute(self, reduce: Any) -> dict[str, float]:
        return {"seen": 1.0}


def watcher(short: Short) -> Any:
    """A callback that answers every hook of the list, and counts steps."""
    body: dict[str, Any] = {
        "info": PluginInfo(name="short_callback", kind=Kind.CALLBACKS, config=NoConfig),
        "config": NoConfig(),
    }
    for hook in HOOKS:
        names = ["self", *inspect.signature(getattr(hookspecs, hook)).parameters]
        body[hook] = hookimpl(_method(hook, names, short))
    return type("Watcher", (), body)()


def _method(hook: str, names: list[str], short: Short) -> Any:
    def answer(run: Any) -> Any:
        if hook == "on_batch":
            short.step = run.progress.step + 1
        short.look(hook)
        return {} if hook == "log_metrics" else None

    space: dict[str, Any] = {"answer": answer}
    exec(f"def {hook}({', '.join(names)}): return answer(run)", space)
    space[hook].__qualname__ = f"Watcher.{hook}"  # a method, for whoever reads signatures
    return space[hook]


def plugins(short: Short) -> list[Any]:
    made = [Data, Model, Optimizer, Loss, Validator]
    return [*(part(short) for part in made), watcher(short)]


def attempt(short: Short, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(5)
    return small_run(
        plugins(short), folder, max_steps=STEPS, validate_every=3, save_every=4, **settings
    )


def same(a: Any, b: Any, within: float) -> bool:
    return all(
        torch.allclose(mine, theirs, rtol=0, atol=within)
        for mine, theirs in zip(a.parameters(), b.parameters(), strict=True)
    )


def verdict(short: Short, policy: str, straight: Any, folder: Path) -> str:
    """What went otherwise than promised, or nothing."""
    outcome = attempt(short, folder, on_out_of_memory=policy)
    if policy == "halve" and short.site in SPLITS:
        if outcome.error is not None:
            return f"not halved: {outcome.words[:200]}"
        return "" if same(outcome.result.model, straight.model, 1e-5) else "other weights"
    error = outcome.error
    if not isinstance(error, OutOfMemoryError):
        return f"no report: {outcome.words[:200]}"
    text, hints = str(error), str(error).count("\n  - ")
    if hints != 3 or "GiB" not in text or "step" not in text:
        return f"an incomplete report: {text}"
    if short.site in SPLITS and "inputs [4, 6] float32" not in text:
        return f"the micro-batch is not in the report: {text}"
    if json.loads((folder / "result.json").read_text())["outcome"] != "failed":
        return "the run is not told as failed"
    if short.site in SET_UP or short.site in IN_AN_UPDATE:
        return ""
    step = CheckpointReader(folder / "checkpoints").newest()[0].step
    if step < short.at - 1:
        return f"step {step} was kept, {short.at - 1} were whole"
    again = Short("nowhere", 0, cuda, 0)
    resumed = resume(folder, plugins=parts(plugins(again)), quiet=True)
    return "" if same(resumed.model, straight.model, 0.0) else "resumed to other weights"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    cases = [(site, policy) for site, policy in itertools.product(SITES, ("stop", "halve"))]
    draw.shuffle(cases)
    with scratch() as place:
        straight = attempt(Short("nowhere", 0, cuda, 0), place / "straight").result
        for number in range(count):
            site, policy = cases[number % len(cases)]
            error = draw.choice(ERRORS)
            late = site in ("on_validation", "validation batches", "metric", "on_checkpoint")
            at = 2 if late or site == "on_epoch_end" else draw.randint(2, STEPS - 1)
            rows = 2 if site in SPLITS and policy == "halve" else 0
            short = Short(site, at, error, rows)
            with scratch() as folder:
                wrong = verdict(short, policy, straight, folder / "run")
            yield Trial(f"{error.__name__} in {site}, step {at}, {policy}", wrong)


BATTERY = Battery(
    name="short-memory",
    promise="told with step, peak and three hints, what was whole is kept, halves give the same step",
    ci=44,
    deep=400,
    trials=trials,
)
