"""Small parts that many tests build runs from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.contract.counting import loss_terms
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.values import Batch
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import check_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.testing.trial import TrialLoss
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_kernel.training.loaders.in_memory import InMemoryData, InMemoryModel, NoConfig
from forge_kernel.training.session import Session


class SgdPart:
    """Plain SGD as a live plugin."""

    info = PluginInfo(name="sgd_part", kind=Kind.OPTIMIZER, config=NoConfig)
    config = NoConfig()

    def __init__(self, lr: float = 0.1, **options: Any) -> None:
        self.options = {"lr": lr, **options}

    @hookimpl
    def make_optimizer(self, run: Any, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in parameters], **self.options)


def make_plugin(name: str, kind: Kind, **hooks: Callable[..., Any]) -> Any:
    """A live plugin with the given hooks, written as functions with `self` first."""
    body: dict[str, Any] = {
        "info": PluginInfo(name=name, kind=kind, config=NoConfig),
        "config": NoConfig(),
    }
    for hook, function in hooks.items():
        function.__qualname__ = f"{name}.{hook}"
        function.__name__ = hook
        body[hook] = hookimpl(function)
    return type(name, (), body)()


def make_session(
    model: nn.Module,
    data: Any,
    *,
    plugins: Sequence[Any] = (),
    lr: float = 0.1,
    folder: Path | None = None,
    optimizer: Any = None,
    uses: dict[str, Any] | None = None,
    cancel: Any = None,
    own_loss: bool = False,
    strategy: Any = None,
    **settings: Any,
) -> Session:
    """A session of live parts, set up and started; `own_loss`: `uses` names the loss."""
    if isinstance(data, list):
        data = LoaderData(data, spec=DataSpec(classes=3))
    parts = [InMemoryModel(model), InMemoryData(data), optimizer or SgdPart(lr)]
    if not own_loss and not any(part.info.kind is Kind.LOSS for part in plugins):
        parts.append(TrialLoss())
    parts += plugins
    run = RunConfig(**{"max_steps": 10**6, "device": "cpu", "log_every": 10**6, **settings})
    catalog = Catalog.installed()
    pipeline = check_pipeline(
        PipelineConfig(run=run, **(uses or {})), catalog, {part.info.kind for part in parts}
    )
    session = Session(
        plan(pipeline, catalog, plugins=parts), folder=folder, cancel=cancel, strategy=strategy
    )
    return session.__enter__()


class StopAfter:
    """A cancel that is set when a given number of steps is done."""

    info = PluginInfo(name="stop_after", kind=Kind.OBSERVERS, config=NoConfig)
    config = NoConfig()

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.event = threading.Event()

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        if run.progress.step >= self.steps:
            self.event.set()

    def is_set(self) -> bool:
        return self.event.is_set()


def loss_and_weight(plugin: Any, batch: Batch, outputs: Any) -> tuple[torch.Tensor, float]:
    """The mean of a loss plugin's one term over what counts in a batch, and what it counts."""
    (term,) = loss_terms(plugin.compute_loss(None, None, batch, outputs))
    mean, weight = term.mean(batch.counted)
    return mean, float(weight)
