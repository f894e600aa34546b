"""Names, modules, layers of the package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agent_forge.phases.phase5_training as phase5

FOLDER = Path(phase5.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "data_loader": "DataFormat DataConfig QualityValidator CachedDataset StreamingDataset "
    "DataLoaderFactory DataLoadingProfiler create_optimized_loader",
    "training_loop": "TrainingState TrainingConfig GradientAccumulator MemoryMonitor "
    "TrainingMetrics CheckpointManager EarlyStopping TrainingLoop",
    "bitnet_optimizer": "QuantizationMode BitNetConfig StraightThroughEstimator BitNetQuantizer "
    "BitNetLayer BitNetOptimizer BitNetLossFunction convert_model_to_bitnet",
    "grokfast_trainer": "GrokfastPhase GrokfastConfig CapabilityTracker KnowledgeConsolidation "
    "GrokfastOptimizer GrokfastScheduler GrokfastTrainer",
    "loss_functions": "LossType LossConfig BaseLoss ClassificationLoss BitNetLoss GrokfastLoss "
    "ContrastiveLoss MultiTaskLoss AdaptiveLoss LossManager create_loss_function",
    "scheduler": "SchedulerType SchedulerConfig CompositeScheduler SchedulerFactory "
    "SchedulerMonitor GrokfastScheduler",
    "validation": "ValidationMode MetricType ValidationConfig MetricCalculator PerformanceMonitor "
    "RealTimeValidator",
    "pipeline_coordinator": "PipelineState PipelinePhase PipelineConfig PipelineMetrics "
    "TrainingPipeline create_training_pipeline",
}


def test_importing_costs_no_thread_no_handler_and_no_random_state() -> None:
    """Spec: A1"""
    code = (
        "import torch, logging, threading, random\n"
        "before = (torch.get_rng_state(), random.getstate(), list(logging.root.handlers))\n"
        "import agent_forge.phases.phase5_training\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1:] == (random.getstate(), list(logging.root.handlers))\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_its_names_and_they_are_the_packages(module: str) -> None:
    """Spec: A2, A3, A4, A5, A6, A7, A8, A9, A10, A11, A12"""
    found = importlib.import_module(f"agent_forge.phases.phase5_training.pipeline.{module}")
    for name in MODULES[module].split():
        assert getattr(found, name) is getattr(phase5, name)
        assert name in phase5.__all__


def test_the_package_exports_public_names_that_are_there() -> None:
    """Spec: A13, A14"""
    assert len(set(phase5.__all__)) == len(phase5.__all__)
    for name in phase5.__all__:
        assert not name.startswith("_")
        assert getattr(phase5, name) is not None
    assert (FOLDER / "README.md").is_file()


def test_other_phases_fit_beside_it() -> None:
    """Spec: A15. The folders above are namespaces."""
    assert not (FOLDER.parent / "__init__.py").exists()
    assert not (FOLDER.parents[1] / "__init__.py").exists()
    for folder in ("forge_kernel", "plugins", "pipelines", "schemas", "tests"):
        assert (ROOT / folder).is_dir()


def test_the_face_holds_no_backward_and_no_loop_of_its_own() -> None:
    """Spec: A15. It drives the kernel's session; red when a call of backward is planted."""
    for file in FOLDER.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in calls
        }
        assert "backward" not in names, file
        assert not {"autograd.grad", "GradScaler", "autocast"} & names, file


def test_nothing_imports_the_face() -> None:
    """Spec: A15. The linter holds the contract; this test, that it is there."""
    assert "Nothing imports the Phase 5 face" in (ROOT / "pyproject.toml").read_text()


def test_an_enum_is_one_and_the_same_everywhere() -> None:
    """Spec: A6"""
    from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import QuantizationMode

    assert phase5.QuantizationMode is QuantizationMode
    assert torch.serialization.get_safe_globals()
