"""Agent Forge Phase 5: training with BitNet and Grokfast, as a translation onto forge_kernel.

Importing it tells the default `torch.load` of our layers (see `safe_loading`), and changes
nothing else of the process. README.md beside this file is the guide.
"""

from __future__ import annotations

from agent_forge.phases.phase5_training.model_file import load_phase4
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import (
    BitNetConfig,
    BitNetLayer,
    BitNetLossFunction,
    BitNetOptimizer,
    BitNetQuantizer,
    QuantizationMode,
    StraightThroughEstimator,
    convert_model_to_bitnet,
)
from agent_forge.phases.phase5_training.pipeline.data_loader import (
<<<<<<< HEAD
    CachedDataset,
    DataConfig,
    DataFormat,
    DataLoaderFactory,
    DataLoadingProfiler,
    QualityValidator,
    StreamingDataset,
    create_optimized_loader,
=======
    DataConfig,
    DataLoaderFactory,
>>>>>>> dat
)
from agent_forge.phases.phase5_training.pipeline.grokfast_trainer import (
    CapabilityTracker,
    GrokfastConfig,
    GrokfastOptimizer,
    GrokfastPhase,
    GrokfastTrainer,
    KnowledgeConsolidation,
)
from agent_forge.phases.phase5_training.pipeline.loss_functions import (
    AdaptiveLoss,
    BaseLoss,
    BitNetLoss,
    ClassificationLoss,
    ContrastiveLoss,
    GrokfastLoss,
    LossConfig,
    LossManager,
    LossType,
    MultiTaskLoss,
    create_loss_function,
)
from agent_forge.phases.phase5_training.pipeline.pipeline_coordinator import (
    PipelineConfig,
    PipelineMetrics,
    PipelinePhase,
    PipelineState,
    TrainingPipeline,
    create_training_pipeline,
)
from agent_forge.phases.phase5_training.pipeline.scheduler import (
    AdaptiveScheduler,
    BitNetScheduler,
    CompositeScheduler,
    ConstantScheduler,
    CosineScheduler,
    CyclicScheduler,
    ExponentialScheduler,
    GrokfastScheduler,
    LinearScheduler,
    OneCycleScheduler,
    PolynomialScheduler,
    SchedulerConfig,
    SchedulerFactory,
    SchedulerMonitor,
    SchedulerType,
)
from agent_forge.phases.phase5_training.pipeline.training_loop import (
    CheckpointManager,
    EarlyStopping,
    GradientAccumulator,
    MemoryMonitor,
    TrainingConfig,
    TrainingLoop,
    TrainingMetrics,
    TrainingState,
)
from agent_forge.phases.phase5_training.pipeline.validation import (
    MetricCalculator,
    MetricType,
    PerformanceMonitor,
    RealTimeValidator,
    ValidationConfig,
    ValidationMode,
)
from agent_forge.phases.phase5_training.safe_loading import allow_layers

__all__ = [
    "AdaptiveLoss",
    "AdaptiveScheduler",
    "BaseLoss",
    "BitNetConfig",
    "BitNetLayer",
    "BitNetLoss",
    "BitNetLossFunction",
    "BitNetOptimizer",
    "BitNetQuantizer",
    "BitNetScheduler",
    "CachedDataset",
    "CapabilityTracker",
    "CheckpointManager",
    "ClassificationLoss",
    "CompositeScheduler",
    "ConstantScheduler",
    "ContrastiveLoss",
    "CosineScheduler",
    "CyclicScheduler",
    "DataConfig",
    "DataFormat",
    "DataLoaderFactory",
    "DataLoadingProfiler",
    "EarlyStopping",
    "ExponentialScheduler",
    "GradientAccumulator",
    "GrokfastConfig",
    "GrokfastLoss",
    "GrokfastOptimizer",
    "GrokfastPhase",
    "GrokfastScheduler",
    "GrokfastTrainer",
    "KnowledgeConsolidation",
    "LinearScheduler",
    "LossConfig",
    "LossManager",
    "LossType",
    "MemoryMonitor",
    "MetricCalculator",
    "MetricType",
    "MultiTaskLoss",
    "OneCycleScheduler",
    "PerformanceMonitor",
    "PipelineConfig",
    "PipelineMetrics",
    "PipelinePhase",
    "PipelineState",
    "PolynomialScheduler",
    "QualityValidator",
    "QuantizationMode",
    "RealTimeValidator",
    "SchedulerConfig",
    "SchedulerFactory",
    "SchedulerMonitor",
    "SchedulerType",
    "StraightThroughEstimator",
    "StreamingDataset",
    "TrainingConfig",
    "TrainingLoop",
    "TrainingMetrics",
    "TrainingPipeline",
    "TrainingState",
    "ValidationConfig",
    "ValidationMode",
    "convert_model_to_bitnet",
    "create_loss_function",
    "create_optimized_loader",
    "create_training_pipeline",
    "load_phase4",
]

allow_layers()
