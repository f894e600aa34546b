"""The plugin author's face of the kernel: what a plugin may import. Imports no torch."""

from forge_kernel.config.use import (
    Use,
    UseData,
    UseExporter,
    UseGradients,
    UseLoss,
    UseModel,
    UseObserver,
    UseOptimizer,
    UsePenalty,
    UsePolicy,
    UseSchedule,
    UseValidator,
)
from forge_kernel.data import Data, DataSpec, TensorData, stream_seed
from forge_kernel.errors import ForgeError, PluginError, RunError
from forge_kernel.hookspecs import hookimpl
from forge_kernel.lazy import LazyModule
from forge_kernel.plugin import API_VERSION, Kind, Order, PluginInfo
from forge_kernel.result import RunResult
from forge_kernel.state import Batch, Event, Goal, LogRecord, Meter, Progress, Rates, Run, Step
from forge_kernel.trained import trained_model

__all__ = [
    "API_VERSION",
    "Batch",
    "Data",
    "DataSpec",
    "Event",
    "ForgeError",
    "Goal",
    "Kind",
    "LazyModule",
    "LogRecord",
    "Meter",
    "Order",
    "PluginError",
    "PluginInfo",
    "Progress",
    "Rates",
    "Run",
    "RunError",
    "RunResult",
    "Step",
    "TensorData",
    "Use",
    "UseData",
    "UseExporter",
    "UseGradients",
    "UseLoss",
    "UseModel",
    "UseObserver",
    "UseOptimizer",
    "UsePenalty",
    "UsePolicy",
    "UseSchedule",
    "UseValidator",
    "hookimpl",
    "stream_seed",
    "trained_model",
]
