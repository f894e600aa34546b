"""The plugin author's face of the kernel: what a plugin may import. Imports no torch."""

from forge_kernel.config.use import (
    Use,
    UseCallback,
    UseData,
    UseExporter,
    UseGradients,
    UseLoss,
    UseModel,
    UseObserver,
    UseOptimizer,
    UseRegularizer,
    UseSchedule,
    UseValidator,
)
from forge_kernel.contract.counting import Counted, LossAnswer, LossTerm, loss_terms, loss_weights
from forge_kernel.contract.data import Data, DataSpec
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.lazy_module import LazyModule
from forge_kernel.contract.metric_info import Goal, MetricInfo, MetricInfos
from forge_kernel.contract.metrics import Metric
from forge_kernel.contract.model_call import call_model
from forge_kernel.contract.plugin import API_VERSION, Kind, Order, PluginInfo
from forge_kernel.contract.plugin_rules import may_be_imported
from forge_kernel.contract.result import RunResult
from forge_kernel.contract.run import Run
from forge_kernel.contract.seeds import stream_seed
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.contract.values import (
    Batch,
    Event,
    LogRecord,
    Progress,
    ScheduleFactors,
    Step,
)
from forge_kernel.errors import ConfigError, Fault, ForgeError, PluginError, RunError
from forge_kernel.secrecy import without_secrets
from forge_kernel.trained_model import trained_model
from forge_kernel.trained_run import TrainedRun, load_run
from forge_kernel.training.precision import fast_precision
from forge_kernel.trust import HINT as ALLOW_CODE_HINT
from forge_kernel.trust import code_is_allowed

__all__ = [
    "ALLOW_CODE_HINT",
    "API_VERSION",
    "Batch",
    "ConfigError",
    "Counted",
    "Data",
    "DataSpec",
    "Event",
    "Fault",
    "ForgeError",
    "Goal",
    "Kind",
    "LazyModule",
    "LogRecord",
    "LossAnswer",
    "LossTerm",
    "Metric",
    "MetricInfo",
    "MetricInfos",
    "Order",
    "PluginError",
    "PluginInfo",
    "Progress",
    "Run",
    "RunError",
    "RunResult",
    "ScheduleFactors",
    "Step",
    "TensorData",
    "TrainedRun",
    "Use",
    "UseCallback",
    "UseData",
    "UseExporter",
    "UseGradients",
    "UseLoss",
    "UseModel",
    "UseObserver",
    "UseOptimizer",
    "UseRegularizer",
    "UseSchedule",
    "UseValidator",
    "call_model",
    "code_is_allowed",
    "fast_precision",
    "hookimpl",
    "load_run",
    "loss_terms",
    "loss_weights",
    "may_be_imported",
    "stream_seed",
    "trained_model",
    "without_secrets",
]
