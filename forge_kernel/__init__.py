"""forge-kernel: an event-bus kernel that trains what a YAML file declares.

The names here are imported when first used, so that importing the package costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge_kernel.config.pipeline import PipelineConfig, RunConfig
    from forge_kernel.loading import load_pipeline
    from forge_kernel.loop import Session
    from forge_kernel.planner import plan
    from forge_kernel.result import RunResult
    from forge_kernel.runner import resume, run, run_async

__all__ = [
    "PipelineConfig",
    "RunConfig",
    "RunResult",
    "Session",
    "load_pipeline",
    "plan",
    "resume",
    "run",
    "run_async",
]

_HOMES = {
    "PipelineConfig": "forge_kernel.config.pipeline",
    "RunConfig": "forge_kernel.config.pipeline",
    "RunResult": "forge_kernel.result",
    "Session": "forge_kernel.loop",
    "load_pipeline": "forge_kernel.loading",
    "plan": "forge_kernel.planner",
    "resume": "forge_kernel.runner",
    "run": "forge_kernel.runner",
    "run_async": "forge_kernel.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forge_kernel' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
