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
from forge_kernel.counting import Counted, LossAnswer, LossTerm, loss_terms, loss_weights
from forge_kernel.data import Data, DataSpec, TensorData
from forge_kernel.errors import ForgeError, PluginError, RunError
from forge_kernel.hookspecs import hookimpl
from forge_kernel.lazy import LazyModule
from forge_kernel.model_call import call_model
from forge_kernel.plugin import API_VERSION, Kind, Order, PluginInfo
from forge_kernel.precision import fast_precision
from forge_kernel.result import RunResult
from forge_kernel.seeds import stream_seed
from forge_kernel.state import Batch, Event, Goal, LogRecord, Meter, Progress, Rates, Run, Step
from forge_kernel.trained import trained_model

__all__ = [
    "API_VERSION",
    "Batch",
    "Counted",
    "Data",
    "DataSpec",
    "Event",
    "ForgeError",
    "Goal",
    "Kind",
    "LazyModule",
    "LogRecord",
    "LossAnswer",
    "LossTerm",
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
    "call_model",
    "fast_precision",
    "hookimpl",
    "loss_terms",
    "loss_weights",
    "stream_seed",
    "trained_model",
]
