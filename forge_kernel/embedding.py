"""The face of the kernel for programs that drive it: sessions, parts in memory, files of a run.

What the author of a plugin needs is in `api`. The names are imported when first used: a program
that only reads a run's record pays for no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forge_kernel.config.pipeline import PipelineConfig
    from forge_kernel.config.spelling import did_you_mean
    from forge_kernel.config.use import UsePhases, UseQuantizer, UseWrapper
    from forge_kernel.config.yaml_file import read_yaml, write_yaml
    from forge_kernel.contract.counting import IGNORE_INDEX
    from forge_kernel.contract.data import INPUTS, TARGETS, WEIGHTS
    from forge_kernel.contract.run_config import RunConfig
    from forge_kernel.errors import ConfigError, Fault
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.path_settings import with_absolute_paths
    from forge_kernel.planning.pipeline_file import check_pipeline, fill
    from forge_kernel.planning.plan import plan
    from forge_kernel.recorded_run import result_of
    from forge_kernel.run_folder.folder import RunFolder
    from forge_kernel.storage.atomic_files import write_bytes, write_json, write_text
    from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot
    from forge_kernel.storage.random_state import process_state_kept
    from forge_kernel.training.device import resolve_device
    from forge_kernel.training.loaders.data_loaders import LoaderData, batch_from
    from forge_kernel.training.loaders.in_memory import InMemoryData, InMemoryModel, NoConfig
    from forge_kernel.training.one_process import OneProcess
    from forge_kernel.training.optimizer_state import optimizer_state
    from forge_kernel.training.param_group_schedule import (
        initial_momentum,
        initial_rate,
        write_momentum,
        write_rate,
    )
    from forge_kernel.training.session import Session
    from forge_kernel.trust import code_allowed

__all__ = [
    "IGNORE_INDEX",
    "INPUTS",
    "TARGETS",
    "WEIGHTS",
    "Catalog",
    "CheckpointStore",
    "ConfigError",
    "Fault",
    "InMemoryData",
    "InMemoryModel",
    "LoaderData",
    "NoConfig",
    "OneProcess",
    "PipelineConfig",
    "RunConfig",
    "RunFolder",
    "Session",
    "Snapshot",
    "UsePhases",
    "UseQuantizer",
    "UseWrapper",
    "batch_from",
    "check_pipeline",
    "code_allowed",
    "did_you_mean",
    "fill",
    "initial_momentum",
    "initial_rate",
    "optimizer_state",
    "plan",
    "process_state_kept",
    "read_yaml",
    "resolve_device",
    "result_of",
    "with_absolute_paths",
    "write_bytes",
    "write_json",
    "write_momentum",
    "write_rate",
    "write_text",
    "write_yaml",
]

_HOMES: Final = {
    "Catalog": "forge_kernel.planning.catalog",
    "CheckpointStore": "forge_kernel.storage.checkpoint_store",
    "ConfigError": "forge_kernel.errors",
    "Fault": "forge_kernel.errors",
    "IGNORE_INDEX": "forge_kernel.contract.counting",
    "INPUTS": "forge_kernel.contract.data",
    "LoaderData": "forge_kernel.training.loaders.data_loaders",
    "InMemoryData": "forge_kernel.training.loaders.in_memory",
    "InMemoryModel": "forge_kernel.training.loaders.in_memory",
    "NoConfig": "forge_kernel.training.loaders.in_memory",
    "OneProcess": "forge_kernel.training.one_process",
    "PipelineConfig": "forge_kernel.config.pipeline",
    "RunConfig": "forge_kernel.contract.run_config",
    "RunFolder": "forge_kernel.run_folder.folder",
    "Session": "forge_kernel.training.session",
    "Snapshot": "forge_kernel.storage.checkpoint_store",
    "TARGETS": "forge_kernel.contract.data",
    "UsePhases": "forge_kernel.config.use",
    "UseQuantizer": "forge_kernel.config.use",
    "UseWrapper": "forge_kernel.config.use",
    "WEIGHTS": "forge_kernel.contract.data",
    "batch_from": "forge_kernel.training.loaders.data_loaders",
    "code_allowed": "forge_kernel.trust",
    "check_pipeline": "forge_kernel.planning.pipeline_file",
    "did_you_mean": "forge_kernel.config.spelling",
    "fill": "forge_kernel.planning.pipeline_file",
    "initial_momentum": "forge_kernel.training.param_group_schedule",
    "initial_rate": "forge_kernel.training.param_group_schedule",
    "optimizer_state": "forge_kernel.training.optimizer_state",
    "plan": "forge_kernel.planning.plan",
    "process_state_kept": "forge_kernel.storage.random_state",
    "read_yaml": "forge_kernel.config.yaml_file",
    "resolve_device": "forge_kernel.training.device",
    "result_of": "forge_kernel.recorded_run",
    "with_absolute_paths": "forge_kernel.planning.path_settings",
    "write_bytes": "forge_kernel.storage.atomic_files",
    "write_json": "forge_kernel.storage.atomic_files",
    "write_momentum": "forge_kernel.training.param_group_schedule",
    "write_rate": "forge_kernel.training.param_group_schedule",
    "write_text": "forge_kernel.storage.atomic_files",
    "write_yaml": "forge_kernel.config.yaml_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forge_kernel.embedding' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
