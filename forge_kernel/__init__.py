"""forge-kernel: an event-bus kernel that trains what a YAML file declares.

The names here are imported when first used, so that importing the package costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge_kernel.config.pipeline import PipelineConfig
    from forge_kernel.contract.result import RunResult
    from forge_kernel.contract.run_config import RunConfig
    from forge_kernel.fitting import fit
    from forge_kernel.planning.pipeline_file import load_pipeline
    from forge_kernel.planning.plan import plan
    from forge_kernel.runner import resume, run, run_async
    from forge_kernel.trained_run import TrainedRun, evaluate_clients, evaluate_run, load_run
    from forge_kernel.training.loaders.samples import as_data
    from forge_kernel.training.session import Session

__all__ = [
    "PipelineConfig",
    "RunConfig",
    "RunResult",
    "Session",
    "TrainedRun",
    "as_data",
    "evaluate_clients",
    "evaluate_run",
    "fit",
    "load_pipeline",
    "load_run",
    "plan",
    "resume",
    "run",
    "run_async",
]

_HOMES = {
    "PipelineConfig": "forge_kernel.config.pipeline",
    "RunConfig": "forge_kernel.contract.run_config",
    "RunResult": "forge_kernel.contract.result",
    "Session": "forge_kernel.training.session",
    "TrainedRun": "forge_kernel.trained_run",
    "as_data": "forge_kernel.training.loaders.samples",
    "evaluate_clients": "forge_kernel.trained_run",
    "evaluate_run": "forge_kernel.trained_run",
    "fit": "forge_kernel.fitting",
    "load_pipeline": "forge_kernel.planning.pipeline_file",
    "load_run": "forge_kernel.trained_run",
    "plan": "forge_kernel.planning.plan",
    "resume": "forge_kernel.runner",
    "run": "forge_kernel.runner",
    "run_async": "forge_kernel.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forge_kernel' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
