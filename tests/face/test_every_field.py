"""Law 7 in the face: each field of each group changes the declared run, or a result, or is refused.

The fields are found by reflection. `SHOWN` says of each how its effect is shown; a field without a
row is red, and so is a row without a field. Planted: a field that nothing reads in each group.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from phase5_parts import network, write_samples
from torch.nn import functional

import agent_forge.phases.phase5_training as phase5
from agent_forge.phases.phase5_training import (
    CapabilityTracker,
    DataConfig,
    DataLoaderFactory,
    GrokfastConfig,
    SchedulerConfig,
    SchedulerFactory,
    TrainingConfig,
    TrainingLoop,
    create_training_pipeline,
)
from agent_forge.phases.phase5_training.configuration import Configuration, SettingError
from forge_kernel.errors import ForgeError
from forge_kernel.planning.pipeline_file import fill

GROUPS = {
    value.__name__: value
    for name in phase5.__all__
    if inspect.isclass(value := getattr(phase5, name)) and issubclass(value, Configuration)
}
PLACES = {
    "DataConfig": "data_config", "TrainingConfig": "training_config", "LossConfig": "loss_config",
    "SchedulerConfig": "scheduler_config", "ValidationConfig": "validation_config",
    "BitNetConfig": "bitnet_config", "GrokfastConfig": "grokfast_config",
}  # fmt: skip
"""Where a pipeline's configuration has each group."""


@dataclass(frozen=True)
class Declares:
    """The declared run is another one.

    Args:
        value: in place of the default.
        beside: what the field needs, by group and field ("LossConfig.loss_type").
        bitnet, grokfast: switches of the pipeline.
        validation: whether there is a file to validate with.
    """

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    bitnet: bool = False
    grokfast: bool = False
    validation: bool = True


@dataclass(frozen=True)
class Refuses:
    """The set-up of a pipeline fails with the field's name."""

    value: Any


@dataclass(frozen=True)
class Gives:
    """A small call gives something else; the probe takes the field's value, None: its default."""

    value: Any
    probe: Callable[[Path, Any], Any]


def settings(group: str, name: str, value: Any, row: Any) -> dict[str, Any]:
    """The pipeline's configuration with one field set."""
    found: dict[str, Any] = {"training_config": {"epochs": 3}}
    chosen = {f"{group}.{name}": value} if value is not None else {}
    for place, given in {**getattr(row, "beside", {}), **chosen}.items():
        owner, _, key = place.partition(".")
        if owner == "PipelineConfig":
            found[key] = given
        else:
            found.setdefault(PLACES[owner], {})[key] = given
    return found


def declared(row: Any, options: dict[str, Any]) -> Any:
    pipeline = create_training_pipeline(
        network(), "train.json", val_data_path="val.json" if getattr(row, "validation", True) else None,
        use_bitnet=getattr(row, "bitnet", False), use_grokfast=getattr(row, "grokfast", False),
        **{"output_dir": "out", **options},
    )  # fmt: skip
    pipeline.setup()
    return json.loads(json.dumps(fill(pipeline._pipeline)).replace(str(Path.cwd()), "<here>"))


WITHOUT: dict[str, Any] = {}
"""Declared runs in which the field under test is at its default: hundreds of tests, few runs."""


def declared_once(row: Any, options: dict[str, Any]) -> Any:
    """`declared`, which gives the same wherever it stands: each test's folder has the same files."""
    flags = [getattr(row, name, None) for name in ("held_out", "bitnet", "grokfast")]
    key = repr((flags, options))
    if key not in WITHOUT:
        WITHOUT[key] = declared(row, options)
    return WITHOUT[key]


# -- probes ------------------------------------------------------------------------------------


def trained(name: str) -> Callable[[Path, Any], Any]:
    """The weights after a short training of a loop."""

    def probe(folder: Path, value: Any) -> Any:
        del folder
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        batches = [(torch.randn(4, 6), torch.arange(4) % 3) for _ in range(6)]
        options: dict[str, Any] = {"epochs": 2, "use_amp": False, "learning_rate": 0.1}
        if value is not None:
            options[name] = value
        TrainingLoop(model, TrainingConfig(**options)).train(batches, functional.cross_entropy)
        return [one.detach().tolist() for one in model.parameters()]

    return probe


def windows(folder: Path, value: Any) -> Any:
    file = folder / "rows.json"
    file.write_text(json.dumps([{"input": list(range(9))}] * 4))
    chosen = {} if value is None else {"max_sequence_length": value}
    config = DataConfig(num_workers=0, quality_threshold=0.0, cache_dir=str(folder), **chosen)
    return next(iter(DataLoaderFactory.create_loader(file, config)))["input"].shape


def acquired(name: str, beside: dict[str, Any]) -> Callable[[Path, Any], Any]:
    def probe(folder: Path, value: Any) -> Any:
        del folder
        chosen = {**beside, **({} if value is None else {name: value})}
        tracker = CapabilityTracker(GrokfastConfig(**chosen))
        tracker.register_capability("skill", lambda metrics: 0.95)
        return [tracker.update({}, step) for step in range(6)]

    return probe


def falls(folder: Path, value: Any) -> Any:
    del folder
    chosen = {} if value is None else {"performance_window": value}
    config = SchedulerConfig(
        scheduler_type="adaptive", warmup_steps=0, patience=1, base_lr=1e-3, **chosen
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = SchedulerFactory.create_scheduler(torch.optim.SGD([parameter], lr=0.1), config)
    for loss in (5.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        scheduler.step(loss)
    return scheduler.get_last_lr()


def resumed(folder: Path, value: Any) -> Any:
    """How many runs a folder has after a run that was stopped and another pipeline."""

    def made() -> Any:
        torch.manual_seed(5)
        options = {} if value is None else {"auto_resume": value}
        return create_training_pipeline(
            network(), "train.json", "again", "val.json", output_dir=str(folder / "runs"),
            training_config={"epochs": 4}, **options,
        )  # fmt: skip

    first = made()
    first.validator.record = lambda *a: first.cancel()
    first.train()
    made().train()
    return len(list((folder / "runs" / "runs").iterdir()))


def warned(folder: Path, value: Any) -> Any:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("agent_forge.phase5_training")
    logger.addHandler(handler)
    try:
        chosen = {} if value is None else {"max_memory_usage": value}
        create_training_pipeline(
            network(), "train.json", output_dir=str(folder / "memory"),
            training_config={"epochs": 1, **chosen},
        ).train()  # fmt: skip
    finally:
        logger.removeHandler(handler)
    return [line for line in told if line.startswith("memory:")]


def placed(folder: Path, value: Any) -> Any:
    try:
        declared(Declares(None), {"device": value} if value else {})
    except ForgeError:
        return "refused"
    return "accepted"


# -- the table ---------------------------------------------------------------------------------

BITNET = {"bitnet": True}
PHASES = {"grokfast": True}
CYCLE = {"SchedulerConfig.scheduler_type": "cyclic", "SchedulerConfig.cycle_length": 4}
PLATEAU = {"SchedulerConfig.scheduler_type": "adaptive"}


def of_type(kind: str) -> dict[str, Any]:
    return {"SchedulerConfig.scheduler_type": kind}


SHOWN: dict[str, Any] = {
    "PipelineConfig.experiment_name": Declares("another"),
    "PipelineConfig.output_dir": Declares("elsewhere"),
    "PipelineConfig.device": Gives("cuda:99", placed),
    "PipelineConfig.seed": Declares(7),
    "PipelineConfig.mixed_precision": Declares(False),
    "PipelineConfig.distributed": Refuses(True),
    "PipelineConfig.model_config": Declares({"num_classes": 12}),
    "PipelineConfig.max_training_time": Declares(60.0),
    "PipelineConfig.save_intermediate_checkpoints": Declares(False),
    "PipelineConfig.auto_resume": Gives(False, resumed),
    "PipelineConfig.performance_profiling": Declares(False),
    "DataConfig.batch_size": Declares(16),
    "DataConfig.num_workers": Declares(1),
    "DataConfig.shuffle": Declares(False),
    "DataConfig.drop_last": Declares(True),
    "DataConfig.prefetch_factor": Declares(3),
    "DataConfig.pin_memory": Refuses(True),  # of loaders, where CUDA is
    "DataConfig.persistent_workers": Declares(False),
    "DataConfig.max_sequence_length": Gives(5, windows),
    "DataConfig.cache_size": Declares(5),
    "DataConfig.streaming": Declares(True),
    "DataConfig.validation_split": Declares(0.3, validation=False),
    "DataConfig.quality_threshold": Declares(0.5),
    "DataConfig.seed": Declares(3),
    "DataConfig.data_format": Declares("json"),
    "DataConfig.input_column": Declares("features"),
    "DataConfig.target_column": Declares("label"),
    "DataConfig.num_classes": Declares(12),
    "DataConfig.cache_dir": Declares("cache"),
    "DataConfig.trust_pickle": Declares(True),
    "TrainingConfig.epochs": Declares(5),
    "TrainingConfig.learning_rate": Declares(0.5),
    "TrainingConfig.weight_decay": Declares(0.5),
    "TrainingConfig.beta1": Declares(0.5),
    "TrainingConfig.beta2": Declares(0.5),
    "TrainingConfig.eps": Declares(0.5),
    "TrainingConfig.max_grad_norm": Declares(0.5),
    "TrainingConfig.gradient_clipping": Declares(False),
    "TrainingConfig.gradient_accumulation_steps": Declares(2),
    "TrainingConfig.use_amp": Declares(False),
    "TrainingConfig.amp_dtype": Declares(torch.float16),
    "TrainingConfig.warmup_steps": Declares(0),
    "TrainingConfig.scheduler_type": Declares("linear"),
    "TrainingConfig.min_lr_ratio": Declares(0.5),
    "TrainingConfig.log_interval": Declares(3),
    "TrainingConfig.eval_interval": Declares(2),
    "TrainingConfig.save_interval": Declares(7),
    "TrainingConfig.max_checkpoints": Declares(9),
    "TrainingConfig.compile_model": Declares(True),
    "TrainingConfig.use_fused_optimizer": Declares(False),
    "TrainingConfig.max_memory_usage": Gives(1e-9, warned),
    "TrainingConfig.validation_patience": Declares(3),
    "TrainingConfig.min_delta": Declares(0.5),
    "TrainingConfig.bitnet_enabled": Gives(True, trained("bitnet_enabled")),
    "TrainingConfig.quantization_schedule": Declares("sigmoid", **BITNET),
    "TrainingConfig.grokfast_enabled": Gives(True, trained("grokfast_enabled")),
    "TrainingConfig.grokfast_alpha": Declares(0.5, **PHASES),
    "TrainingConfig.grokfast_lambda": Declares(0.5, **PHASES),
    "BitNetConfig.quantization_mode": Declares("stochastic", **BITNET),
    "BitNetConfig.weight_bits": Declares(2, **BITNET),
    "BitNetConfig.activation_bits": Declares(4, **BITNET),
    "BitNetConfig.learning_rate": Declares(0.5, **BITNET),
    "BitNetConfig.weight_decay": Declares(0.5, **BITNET),
    "BitNetConfig.momentum": Declares(0.5, **BITNET),
    "BitNetConfig.eps": Declares(0.5, **BITNET),
    "BitNetConfig.straight_through_estimator": Declares(False, **BITNET),
    "BitNetConfig.quantization_warmup_steps": Declares(2, **BITNET),
    "BitNetConfig.full_precision_warmup": Declares(False, **BITNET),
    "BitNetConfig.learnable_threshold": Declares(True, **BITNET),
    "BitNetConfig.threshold_lr_multiplier": Declares(
        5.0, {"BitNetConfig.learnable_threshold": True}, **BITNET
    ),
    "BitNetConfig.gradient_scale_factor": Declares(2.0, **BITNET),
    "BitNetConfig.adaptive_gradient_scaling": Declares(False, **BITNET),
    "BitNetConfig.target_sparsity": Declares(0.5, **BITNET),
    "BitNetConfig.sparsity_warmup_steps": Declares(
        3, {"BitNetConfig.target_sparsity": 0.5}, **BITNET
    ),
    "GrokfastConfig.alpha": Declares(0.5, **PHASES),
    "GrokfastConfig.lambda_reg": Declares(0.5, **PHASES),
    "GrokfastConfig.enable_grokfast": Declares(False, **PHASES),
    "GrokfastConfig.warmup_steps": Declares(3, **PHASES),
    "GrokfastConfig.acceleration_steps": Declares(3, **PHASES),
    "GrokfastConfig.consolidation_steps": Declares(3, **PHASES),
    "GrokfastConfig.refinement_steps": Declares(3, **PHASES),
    "GrokfastConfig.base_learning_rate": Declares(0.5, **PHASES),
    "GrokfastConfig.acceleration_multiplier": Declares(2.0, **PHASES),
    "GrokfastConfig.consolidation_multiplier": Declares(0.5, **PHASES),
    "GrokfastConfig.refinement_multiplier": Declares(0.5, **PHASES),
    "GrokfastConfig.knowledge_retention_weight": Declares(
        0.5, {"TrainingConfig.epochs": 10}, **PHASES
    ),
    "GrokfastConfig.capability_tracking": Gives(
        False, acquired("capability_tracking", {"min_capability_duration": 2})
    ),
    "GrokfastConfig.capability_threshold": Gives(
        0.99, acquired("capability_threshold", {"min_capability_duration": 2})
    ),
    "GrokfastConfig.min_capability_duration": Gives(2, acquired("min_capability_duration", {})),
    "GrokfastConfig.adaptive_alpha": Declares(True, **PHASES),
    "GrokfastConfig.adaptive_lambda": Declares(True, **PHASES),
    "GrokfastConfig.performance_window": Declares(
        50, {"GrokfastConfig.adaptive_alpha": True}, **PHASES
    ),
    "GrokfastConfig.gradient_checkpointing": Declares(True, **PHASES),
    "LossConfig.loss_type": Declares("regression"),
    "LossConfig.label_smoothing": Declares(0.1),
    "LossConfig.class_weights": Declares([1.0, 2.0]),
    "LossConfig.reduction": Refuses("sum"),  # of the losses by name
    "LossConfig.quantization_loss_weight": Declares(0.5, **BITNET),
    "LossConfig.sparsity_loss_weight": Declares(0.5, **BITNET),
    "LossConfig.consistency_loss_weight": Declares(0.5, **BITNET),
    "LossConfig.knowledge_distillation_weight": Declares(0.5, **BITNET),
    "LossConfig.capability_acquisition_weight": Declares(0.5),
    "LossConfig.regularization_weight": Declares(0.5),
    "LossConfig.adaptive_weighting": Declares(
        True, {"LossConfig.capability_acquisition_weight": 0.5}
    ),
    "LossConfig.temperature_scaling": Declares(
        False, {"LossConfig.knowledge_distillation_weight": 0.5}, **BITNET
    ),
    "LossConfig.focal_loss_gamma": Declares(2.0),
    "LossConfig.task_weights": Declares({"classification": 2.0}),
    "LossConfig.uncertainty_weighting": Declares(True),
    "SchedulerConfig.scheduler_type": Declares("linear"),
    "SchedulerConfig.base_lr": Declares(0.5),
    "SchedulerConfig.max_lr": Declares(0.5, CYCLE),
    "SchedulerConfig.min_lr": Declares(3e-5),
    "SchedulerConfig.final_lr": Declares(3e-5, {"TrainingConfig.scheduler_type": "linear"}),
    "SchedulerConfig.warmup_steps": Declares(0),
    "SchedulerConfig.warmup_type": Declares("none"),
    "SchedulerConfig.total_steps": Declares(7),
    "SchedulerConfig.decay_steps": Declares(7, of_type("exponential")),
    "SchedulerConfig.decay_rate": Declares(0.5, of_type("exponential")),
    "SchedulerConfig.power": Declares(3.0, of_type("polynomial")),
    "SchedulerConfig.cycle_momentum": Declares(False, CYCLE),
    "SchedulerConfig.base_momentum": Declares(0.5, CYCLE),
    "SchedulerConfig.max_momentum": Declares(0.97, CYCLE),
    "SchedulerConfig.cycle_length": Declares(6, of_type("cyclic")),
    "SchedulerConfig.patience": Declares(3, PLATEAU),
    "SchedulerConfig.factor": Declares(0.2, PLATEAU),
    "SchedulerConfig.threshold": Declares(0.2, PLATEAU),
    "SchedulerConfig.cooldown": Declares(3, PLATEAU),
    "SchedulerConfig.min_lr_threshold": Declares(3e-5, PLATEAU),
    "SchedulerConfig.monitor_metric": Declares("f1_score", PLATEAU),
    "SchedulerConfig.mode": Declares("max", PLATEAU),
    "SchedulerConfig.performance_window": Gives(1, falls),
    "SchedulerConfig.bitnet_warmup_multiplier": Declares(0.5, of_type("bitnet")),
    "SchedulerConfig.quantization_phase_lr": Declares(0.5, of_type("bitnet")),
    "SchedulerConfig.acceleration_multiplier": Declares(2.0, **PHASES),
    "SchedulerConfig.consolidation_multiplier": Declares(0.5, **PHASES),
    "SchedulerConfig.phase_transition_smoothing": Declares(3, **PHASES),
    "ValidationConfig.validation_frequency": Declares(2),
    "ValidationConfig.validation_steps": Declares(1),
    "ValidationConfig.validation_patience": Declares(3),
    "ValidationConfig.primary_metric": Declares("loss"),
    "ValidationConfig.metrics_to_track": Declares(["loss", "recall"]),
    "ValidationConfig.memory_monitoring": Declares(False),
    "ValidationConfig.gpu_monitoring": Declares(False),
    "ValidationConfig.throughput_monitoring": Declares(False),
    "ValidationConfig.early_stopping_enabled": Declares(False),
    "ValidationConfig.early_stopping_patience": Declares(3),
    "ValidationConfig.early_stopping_min_delta": Declares(0.5),
    "ValidationConfig.save_best_model": Declares(False),
}


def all_fields() -> Iterator[str]:
    """Those that are no groups themselves and are not refused whatever their value is."""
    for group, cls in GROUPS.items():
        for item in fields(cls):  # type: ignore[arg-type]
            if item.name not in PLACES.values() and item.name not in cls.without_meaning:
                yield f"{group}.{item.name}"


@functools.cache
def with_other_names(text: str) -> str:
    """Rows with other names of their columns beside."""
    rows = json.loads(text)
    return json.dumps([{**row, "features": row["input"], "label": row["target"]} for row in rows])


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "train.json", 120, 1)
    write_samples(tmp_path / "val.json", 41, 2)
    for name in ("train.json", "val.json"):
        file = tmp_path / name
        file.write_text(with_other_names(file.read_text()))
    return tmp_path


def test_each_field_has_a_row_and_each_row_a_field() -> None:
    assert set(all_fields()) == SHOWN.keys()
    groups = {item.name for item in fields(phase5.PipelineConfig)}  # type: ignore[arg-type]
    assert set(PLACES.values()) <= groups, "a pipeline has every group"
    assert set(PLACES) | {"PipelineConfig"} == set(GROUPS)


@pytest.mark.parametrize("place", SHOWN)
def test_each_field_does_what_its_row_says(place: str, data: Path) -> None:
    group, _, name = place.partition(".")
    row = SHOWN[place]
    if isinstance(row, Gives):
        first = row.probe(data, None)
        assert row.probe(data, row.value) != first
    elif isinstance(row, Refuses):
        with pytest.raises(SettingError, match=place):
            declared(row, settings(group, name, row.value, row))
    else:
        without = declared_once(row, settings(group, name, None, row))
        assert declared(row, settings(group, name, row.value, row)) != without


@pytest.mark.parametrize("place", [place for place in SHOWN if not place.startswith("Pipeline")])
def test_a_field_that_is_set_alone_is_never_passed_over_in_silence(
    place: str, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: SchedulerConfig's values ignored without a type; workers' settings without workers."""
    group, _, name = place.partition(".")
    row = SHOWN[place]
    elsewhere = isinstance(row, Gives) and place not in ALONE
    if elsewhere or (group in ("BitNetConfig", "GrokfastConfig") and not isinstance(row, Declares)):
        return  # it shows elsewhere than in a pipeline's declaration
    flags = Declares(
        None, bitnet=group == "BitNetConfig", grokfast=group == "GrokfastConfig", validation=True
    )
    without = declared_once(flags, settings(group, name, None, None))
    caplog.clear()
    try:
        changed = declared(flags, settings(group, name, row.value, None)) != without
    except SettingError as error:
        changed = place in str(error)
    told = any(place in record.getMessage() for record in caplog.records)
    assert changed or told or place in SPAN


ALONE = {
    "DataConfig.max_sequence_length", "SchedulerConfig.performance_window",
    "TrainingConfig.bitnet_enabled", "TrainingConfig.grokfast_enabled",
}  # fmt: skip
"""Shown by a call, and told of a pipeline too."""
SPAN = {"GrokfastConfig.performance_window", "GrokfastConfig.knowledge_retention_weight"}
"""Read by what the run is too short for (consolidation), and by the metrics that are kept."""


def test_the_same_run_is_declared_in_another_folder(
    data: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `declared_once` rests on: without it a difference would be that of two folders."""
    row = Declares(None, bitnet=True, grokfast=True)
    first = declared(row, settings("DataConfig", "seed", None, row))
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("train.json", "val.json"):
        (other / name).write_bytes((data / name).read_bytes())
    monkeypatch.chdir(other)
    assert declared(row, settings("DataConfig", "seed", None, row)) == first


def test_nothing_of_a_scheduler_is_assigned_until_it_is() -> None:
    config = SchedulerConfig()
    assert all(getattr(config, item.name) is None for item in fields(config))  # type: ignore[arg-type]


def test_what_was_never_honoured_is_off_until_it_is_set() -> None:
    loss = phase5.LossConfig()
    names = ("sparsity_loss", "consistency_loss", "knowledge_distillation",
             "capability_acquisition", "regularization")  # fmt: skip
    assert [getattr(loss, f"{name}_weight") for name in names] == [0.0] * 5
    assert TrainingConfig().amp_dtype is None
    assert DataConfig().pin_memory is None


def test_a_run_with_every_term_computes_them_all(data: Path) -> None:
    """Planted: a term declared with the strength 0."""
    pipeline = create_training_pipeline(
        network(), "train.json", val_data_path="val.json", use_bitnet=True, output_dir="out",
        training_config={"epochs": 2},
        loss_config={"sparsity_loss_weight": 0.1, "consistency_loss_weight": 0.1,
                     "knowledge_distillation_weight": 0.1, "capability_acquisition_weight": 0.1,
                     "regularization_weight": 0.1, "uncertainty_weighting": True},
        validation_config={"validation_steps": 1},
    )  # fmt: skip
    result = pipeline.train()
    assert result.outcome == "completed"
    logged = [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    metrics = {name for line in logged for name in line}
    assert {"consistency", "distillation", "weight_magnitude", "weight_square",
            "loss/capability_acquisition", "loss/classification"} <= metrics  # fmt: skip
