"""Objects that a program hands in, as plugins: a live model, live data, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_kernel.contract.data import Data
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.errors import ConfigError, Fault
from forge_kernel.training.loaders.data_loaders import LoaderData

if TYPE_CHECKING:
    from torch import nn

    from forge_kernel.contract.run import Run
    from forge_kernel.contract.values import Event, LogRecord

ProgressCallback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """No settings: the object itself was handed in."""


class InMemoryModel:
    """A module of the embedding program."""

    info = PluginInfo(name="live_model", kind=Kind.MODEL, config=NoConfig)

    def __init__(self, model: nn.Module) -> None:
        self.config = NoConfig()
        self._model = model

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The module as it is, by its own names.

        One that was compiled or wrapped by torch is taken out of its wrapper, whose prefix
        (`_orig_mod.`, `module.`) would stand in every file; it stays compiled.

        Raises:
            ConfigError: it is no module, or is wrapped for several processes.
        """
        return _unwrapped(run, self._model)


def _unwrapped(run: Run, model: Any) -> nn.Module:
    """The module that a compiler's or a replicating wrapper holds."""
    from torch import nn

    for _ in range(8):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            message = "the model is wrapped in DistributedDataParallel: hand in the plain module"
            hint = "how a run spreads over processes is the strategy's: run(..., strategy=...)"
            raise ConfigError([Fault(message, hints=(hint,))])
        if isinstance(model, nn.DataParallel):
            run.emit_event(
                "unwrapped",
                "The model is taken out of DataParallel and runs on the run's device alone.",
            )
            model = model.module
        elif (inner := getattr(model, "_orig_mod", None)) is not None:
            if inner._compiled_call_impl is None:
                inner._compiled_call_impl = _compiled(model.dynamo_ctx, inner)
            model = inner
        else:
            break
    if not isinstance(model, nn.Module):
        raise ConfigError([Fault(f"model is a {type(model).__name__}, not a torch.nn.Module")])
    return model


def _compiled(compiler: Any, module: nn.Module) -> Any:
    """What `nn.Module.compile` sets, by a compiler whose settings were chosen already."""

    def call(*arguments: Any, **named: Any) -> Any:
        return module._call_impl(*arguments, **named)  # type: ignore[no-untyped-call]

    return compiler(call)


class InMemoryData:
    """Data of the embedding program: `Data`, an iterable of batches, or (training, validation)."""

    info = PluginInfo(name="live_data", kind=Kind.DATA, config=NoConfig)

    def __init__(self, data: Any) -> None:
        self.config = NoConfig()
        self._data = data
        _check_form(data)

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The data, brought into the protocol."""
        data = self._data
        if hasattr(data, "batches") and hasattr(data, "validation"):
            result: Data = data
        elif isinstance(data, tuple) and len(data) == 2:
            result = LoaderData(*data)
        else:
            result = LoaderData(data)
        if isinstance(result, LoaderData):
            result.join(run)
        return result


def _check_form(data: Any) -> None:
    """Refuse tensors where batches are wanted: a pair of them would be read as two data sets.

    Raises:
        ConfigError: it is a tensor or array, or holds some.
    """
    parts = data if isinstance(data, tuple) else (data,)
    if any(hasattr(part, "dtype") and hasattr(part, "shape") for part in parts):
        hint = "batches come from: DataLoader(TensorDataset(inputs, targets), batch_size=32)"
        raise ConfigError(
            [
                Fault(
                    "data holds tensors: it is an iterable of batches, or a pair (training, "
                    "validation) of such iterables",
                    hints=(hint,),
                )
            ]
        )
    iterates = all(hasattr(part, "__iter__") or hasattr(part, "__getitem__") for part in parts)
    if not iterates and not hasattr(data, "batches"):
        what = type(data).__name__
        raise ConfigError([Fault(f"data is a {what}: it cannot be iterated over for batches")])


class ProgressObserver:
    """Calls a function with each event of a run, as plain data; what it raises ends the run."""

    ends_run = True  # it is the program's own, which may want just that
    info = PluginInfo(name="on_progress", kind=Kind.OBSERVERS, config=NoConfig)

    def __init__(self, callback: ProgressCallback) -> None:
        self.config = NoConfig()
        self._callback = callback

    def _tell(self, run: Run, event: str, **facts: Any) -> None:
        total = run.total_steps
        step = run.progress.step
        self._callback({"event": event, "step": step, "total_steps": total, **facts})

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Event `start`."""
        self._tell(run, "start")

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """Event `told`, with its name, message and facts."""
        self._tell(run, "event", name=event.name, message=event.message, facts=dict(event.facts))

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """Event `log`."""
        self._tell(run, "log", metrics=dict(record.metrics))

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Event `validation`."""
        self._tell(run, "validation", metrics=dict(metrics))

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """Event `checkpoint`."""
        self._tell(run, "checkpoint", folder=str(folder))
