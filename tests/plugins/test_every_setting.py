"""Law 7, by trying: each setting changes what a run does, or another test shows that it does.

Two short runs for each setting, one with the default and one with another value, both with what
the setting needs beside it; weights, memories, metrics, events and files must not be the same.
Planted fault: `focal_gamma` not handed to the mathematics.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_kernel.config.schema import config_schema
from forge_kernel.contract.plugin import Kind
from forge_kernel.planning.catalog import Catalog
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.trial import Trial
from forge_plugins.mathematics.quantization.quantized_linear import lacks_int8

ROOT = Path(__file__).resolve().parents[2]
TRIED = {
    Kind.MODEL, Kind.QUANTIZER, Kind.OPTIMIZER, Kind.LOSS, Kind.REGULARIZERS, Kind.GRADIENTS,
    Kind.PHASES, Kind.SCHEDULE, Kind.CALLBACKS, Kind.VALIDATORS,
}  # fmt: skip
"""Kinds whose settings show in a short run."""
LISTED = {Kind.OBSERVERS}
"""Kinds whose settings show in what others read: each is in ELSEWHERE."""

Settings = dict[str, Any]
CONSTANT: Settings = {"use": "constant", "with": {"factor": 0.5}}
GRADUAL: Settings = {"warmup_steps": 0}

# The setting, what it needs beside it, and the value that is tried instead of the default (or of
# the one beside it). `kind.*` stands for every plugin of the kind that has the setting.
BESIDE: dict[str, tuple[Settings, Any]] = {
    "model.decoder_transformer.width": ({}, 64),
    "model.decoder_transformer.heads": ({}, 2),
    "model.llama_decoder.width": ({}, 128),
    "model.llama_decoder.heads": ({}, 8),
    "model.mlp.hidden": ({}, [5]),
    "quantizer.bitnet.scale_statistic": ({}, "absmedian"),
    "quantizer.bitnet.granularity": ({}, "row"),
    "quantizer.bitnet.group_size": ({"granularity": "group", "group_size": 8}, 4),
    "quantizer.bitnet.threshold_rate": ({"rounding": "learned_threshold"}, 100.0),
    "quantizer.bitnet.warmup_curve": ({"warmup_steps": 4}, "sigmoid"),
    "quantizer.bitnet.warmup_order": ({"warmup_steps": 4}, "last_to_first"),
    "quantizer.bitnet.warmup_fraction": ({"warmup_steps": 8}, 0.2),
    "quantizer.bitnet.target_sparsity": ({}, 0.8),
    "quantizer.bitnet.sparsity_warmup_steps": ({"target_sparsity": 0.8}, 5),
    "quantizer.bitnet.sub_norm": ({}, ["*"]),
    "quantizer.bitnet.skip": ({}, ["0"]),
    "optimizer.*.decay": ({"weight_decay": 0.5}, "matrices"),
    "optimizer.muon.decay": ({"adamw_weight_decay": 0.5}, "matrices"),
    "optimizer.*.groups": ({}, [{"parameters": ["*"], "lr": 0.3}]),
    "optimizer.*.betas": ({}, [0.5, 0.6]),
    "optimizer.muon.adamw": ({}, ["3.*"]),
    "optimizer.muon.adamw_betas": ({}, [0.5, 0.6]),
    "optimizer.schedule_free.warmup_steps": ({}, 5),
    "optimizer.sgd.dampening": ({"momentum": 0.9}, 0.5),
    "optimizer.sgd.nesterov": ({"momentum": 0.9}, True),
    "loss.cross_entropy.class_weights": ({}, [1.0, 2.0, 3.0, 4.0, 5.0]),
    "loss.consistency.loss": ({}, {"use": "cross_entropy", "with": {"label_smoothing": 0.3}}),
    "loss.distillation.hidden": ({}, ["1"]),
    "loss.distillation.hidden_weight": ({"hidden": ["1"]}, 9.0),
    "loss.distillation.loss": ({}, {"use": "cross_entropy", "with": {"label_smoothing": 0.3}}),
    "loss.language_model.piece": ({"head": "4"}, 512),
    "loss.language_model.label_smoothing": ({"head": "4"}, 0.2),
    "loss.regression.delta": ({"distance": "huber"}, 0.1),
    "regularizers.delayed_compression.strength": ({"threshold": 99.0}, 0.3),
    "regularizers.delayed_compression.threshold": ({}, 99.0),
    "regularizers.delayed_compression.metric": ({"threshold": 0.06}, "learning_rate"),
    "regularizers.delayed_compression.names": ({"threshold": 99.0}, ["*bias"]),
    "gradients.grokfast.window": ({"filter": "ma", "window": 2}, 3),
    "gradients.grokfast.wait_until_full": ({"filter": "ma", "window": 3}, False),
    "gradients.grokfast.lambda_schedule": ({}, CONSTANT),
    "gradients.grokfast.alpha_schedule": ({}, CONSTANT),
    "gradients.grokfast.phase_lambda": ({}, {"warmup": 0.0}),
    "gradients.grokfast.adapt": ({}, {"source": "log", "window": 1}),
    "phases.grokfast.fit": ({}, False),
    "schedule.bitnet.quantization_steps": ({"quantization_steps": 3}, 5),
    "schedule.bitnet.smoothing_steps": ({"quantization_steps": 3, "smoothing_steps": 0}, 4),
    "schedule.bitnet.schedule": ({"quantization_steps": 1, "smoothing_steps": 0}, CONSTANT),
    "schedule.composite.schedules": (
        {"schedules": [{"use": "constant"}, {"use": "constant"}], "until": [{"step": 3}]},
        [CONSTANT, {"use": "linear_warmup"}],
    ),
    "schedule.composite.until": (
        {"schedules": [{"use": "linear_warmup"}, {"use": "constant"}], "until": [{"step": 3}]},
        [{"step": 5}],
    ),
    "schedule.composite.clock": (
        {"schedules": [CONSTANT, {"use": "linear_warmup"}], "until": [{"step": 3}]}, "switch",
    ),
    "schedule.composite.join": (
        {"schedules": [CONSTANT, {"use": "constant"}], "until": [{"step": 3}]}, "jump",
    ),
    "schedule.weight_decay.schedule": ({"schedule": {"use": "constant"}}, CONSTANT),
    "schedule.weight_decay.decay": ({"decay": {"use": "constant"}}, CONSTANT),
    "schedule.two_stage.floor": (GRADUAL, 0.5),
    "schedule.*.warmup_steps": ({}, 4),
    "schedule.*.total_steps": (GRADUAL, 7),
    "schedule.*.floor": (GRADUAL, 0.5),
    "schedule.polynomial.power": (GRADUAL, 3.0),
    "schedule.cosine_restarts.growth": ({"warmup_steps": 0, "first_cycle_steps": 2}, 2.0),
    "schedule.cosine_restarts.peak_decay": ({"warmup_steps": 0, "first_cycle_steps": 2}, 0.5),
    "schedule.cosine_restarts.first_cycle_steps": ({"warmup_steps": 0}, 3),
    "schedule.cosine_restarts.floor": ({"warmup_steps": 0, "first_cycle_steps": 4}, 0.5),
    "schedule.cyclic.fall_steps": ({"rise_steps": 2}, 5),
    "schedule.cyclic.mode": ({"rise_steps": 2, "fall_steps": 2}, "triangular2"),
    "schedule.cyclic.gamma": ({"rise_steps": 2, "mode": "exponential"}, 0.5),
    "schedule.exponential.decay_steps": (GRADUAL, 2),
    "schedule.exponential.staircase": ({"warmup_steps": 0, "decay_steps": 3}, True),
    "schedule.exponential.decay_rate": ({"warmup_steps": 0, "decay_steps": 3}, 0.2),
    "schedule.exponential.floor": ({"warmup_steps": 0, "decay_steps": 1, "decay_rate": 0.1}, 0.5),
    "schedule.warmup_stable_decay.decay_fraction": (GRADUAL, 0.8),
    "schedule.warmup_stable_decay.fall": ({"warmup_steps": 0, "decay_fraction": 0.8}, "cosine"),
    "schedule.warmup_stable_decay.floor": ({"warmup_steps": 0, "decay_fraction": 0.5}, 0.5),
    "schedule.warmup_stable_decay.total_steps": ({"warmup_steps": 0, "decay_fraction": 0.5}, 7),
    "validators.classification.top_k": ({}, [2]),
    "validators.classification.by_class": ({}, ["f1"]),
    "callbacks.early_stopping.patience": ({"patience": 1, "min_delta": 9.0}, 2),
    "callbacks.best_checkpoint.metric": ({}, "accuracy"),
    "callbacks.short_validation.batches": ({}, 1),
    "callbacks.row_norm.max_norm": ({"max_norm": 0.1}, 0.2),
    "callbacks.row_norm.names": ({"max_norm": 0.1}, ["0.*"]),
    "callbacks.stop_at.metric": ({"threshold": 0.5, "metric": "accuracy"}, "loss"),
    "callbacks.stop_at.threshold": ({"threshold": 1.0, "metric": "accuracy", "mode": "min"}, -1.0),
    "callbacks.weight_average.decay": ({"warm": False}, 0.1),
    "callbacks.capabilities.capabilities": (
        {}, {"skill": {"metric": "accuracy", "threshold": 0.0, "duration": 1}},
    ),
}  # fmt: skip

NEEDS_INT8 = {"quantizer.bitnet.arithmetic"}
"""Settings that change nothing on a processor that multiplies no int8."""

# Settings that a trial of ten steps cannot show, and the tests that show them.
ELSEWHERE: dict[str, str] = {
    "validators.classification.confusion_classes": "tests/plugins/reports/test_confusion.py",
    "model.mlp.embedding": "tests/plugins/test_data_models_validators.py",
    "model.python_class.factory": "tests/plugins/test_train_validation_and_python_class.py",
    "model.python_class.arguments": "tests/plugins/test_train_validation_and_python_class.py",
    "model.python_class.state": "tests/plugins/test_train_validation_and_python_class.py",
    "data.file.input_column": "tests/plugins/formats/test_users_columns.py",
    "data.file.target_column": "tests/plugins/formats/test_users_columns.py",
    **{
        f"data.image_folder.{name}": "tests/plugins/data/test_image_folder.py"
        for name in ("path", "size", "channels", "file_column", "label_column", "flip", "shift",
                     "unreadable")
    },
    **{
        f"model.conv_net.{name}": "tests/plugins/data/test_image_folder.py"
        for name in ("widths", "depth", "dropout", "layout", "shape")
    },
    **{
        f"data.file.{name}": "tests/plugins/data/test_named_columns.py"
        for name in ("missing", "scale", "target_scale", "stratified")
    },
    "quantizer.bitnet.convolutions": "tests/plugins/test_bitnet_conversion.py",
    "optimizer.sgd.fused": "tests/plugins/optimizers/test_torch_optimizers.py",
    "optimizer.adamw_8bit.block_size": "tests/plugins/optimizers/test_adamw_8bit.py",
    "optimizer.adamw_8bit.decay": "tests/plugins/optimizers/test_adamw_8bit.py",
    "optimizer.grokfast_adamw.compile": "tests/plugins/optimizers/test_grokfast_adamw.py",
    "loss.distillation.teacher": "tests/plugins/test_transfer.py",
    **{
        f"loss.distillation.{name}": "tests/plugins/losses/test_teacher.py"
        for name in ("relations", "relation_heads", "relation_weight", "cache", "cache_top_k")
    },
    "loss.language_model.head": "tests/plugins/losses/test_language_model.py",
    "loss.language_model.piece": "tests/plugins/losses/test_language_model.py",
    "loss.multi_task.tasks": "tests/plugins/losses/test_losses.py",
    "loss.multi_task.weights": "tests/plugins/losses/test_losses.py",
    "loss.multi_task.temperature": "tests/plugins/losses/test_losses.py",
    "loss.multi_task.decay": "tests/plugins/losses/test_losses.py",
    "schedule.grokfast.completed_multiplier": "tests/plugins/test_schedules.py",
    **{
        f"schedule.plateau.{name}": "tests/plugins/test_schedules.py"
        for name in ("metric", "mode", "factor", "patience", "threshold", "threshold_mode",
                     "cooldown", "floor")
    },
    **{
        f"validators.bleu.{name}": "tests/plugins/validators/test_bleu.py"
        for name in ("prompt", "tokens", "sequences", "words", "smoothing")
    },
    **{
        f"callbacks.consolidation.{name}": "tests/plugins/test_capabilities_and_consolidation.py"
        for name in ("fraction", "every", "phase", "metric", "mode")
    },
    **{  # by a clock of the test's own: time itself differs from run to run
        f"callbacks.real_time_validation.{name}":
            "tests/plugins/callbacks/test_real_time_validation.py"
        for name in ("every_steps", "every_seconds", "time_fraction")
    },
    **{
        f"observers.mlflow.{name}": "tests/plugins/observers/test_mlflow.py"
        for name in ("tracking_uri", "experiment", "flush_seconds")
    },
    **{
        f"observers.resources.{name}": "tests/plugins/observers/test_resources.py"
        for name in ("flops_per_sample", "peak_flops", "throughput", "memory", "device")
    },
    **{
        f"observers.memory_profile.{name}": "tests/plugins/observers/test_memory_profile.py"
        for name in ("step", "depth")
    },
    **{
        f"model.transformers.{name}": "tests/plugins/models/test_transformers.py"
        for name in ("path", "task", "random", "attention", "dtype")
    },
    "model.transformers.sub_norms": "tests/plugins/models/test_sub_norms.py",
    "observers.progress_bar.refresh_seconds": "tests/plugins/observers/test_progress_bar.py",
    "observers.prometheus.port": "tests/plugins/test_loggers.py",
    "observers.prometheus.host": "tests/plugins/test_loggers.py",
    "observers.tensorboard.flush_seconds": "tests/plugins/test_loggers.py",
    "callbacks.early_stopping.metric": "tests/plugins/test_callbacks.py",
    **{
        f"callbacks.{name}.not_before": "tests/kernel/test_endings.py"
        for name in ("early_stopping", "stop_at", "best_checkpoint", "capabilities", "consolidation")
    },
}  # fmt: skip


def another(schema: dict[str, Any]) -> Any:
    """A value that is not the default, read off the field's schema."""
    default = schema.get("default")
    if "anyOf" in schema:
        inner = next(branch for branch in schema["anyOf"] if branch.get("type") != "null")
        return another({**inner, "default": default})
    if "enum" in schema:
        return next(value for value in schema["enum"] if value != default)
    kind = schema.get("type")
    if kind == "boolean":
        return not default
    if kind == "integer":
        return (default or schema.get("minimum", 0)) + 1
    if kind == "number":
        top = schema.get("maximum", schema.get("exclusiveMaximum"))
        value = (default or 0.0) * 0.5 + 0.2
        return value if top is None or value < top else default * 0.5
    raise LookupError(f"say in BESIDE what else this may be: {schema}")


CATALOG = Catalog.installed()


@functools.cache
def fields(key: str) -> dict[str, Any]:
    """The settings of a plugin with their schemas."""
    kind, _, name = key.partition(".")
    plugin = CATALOG.load(Kind(kind), name)
    found: dict[str, Any] = config_schema(plugin.info.config, key)[0].get("properties", {})
    return found


OFFERS = [offer for offer in CATALOG.offers() if offer.distribution == "forge-kernel"]
CASES = [
    f"{offer.key}.{field}"
    for offer in OFFERS
    if offer.kind in TRIED
    for field in fields(offer.key)
    if f"{offer.key}.{field}" not in ELSEWHERE
]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each value of a tree by its path; tensors by their content."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{path}/{name}")
    elif isinstance(tree, torch.Tensor):
        content = tree.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield path, f"{hashlib.sha256(content).hexdigest()} {tuple(tree.shape)}"
    else:
        yield path, repr(tree)


def seen(key: str, settings: Settings, folder: Path) -> Any:
    """What can be seen of a run, without its times, its memory and its settings."""
    kind, _, name = key.partition(".")
    result = Trial(Catalog.installed(), Kind(kind), name, settings).run(folder)
    snapshot, _, _ = CheckpointStore(folder / "checkpoints").newest()
    trees = {part: snapshot.trees[part] for part in ("optimizer", "plugins", "random")}
    told = json.loads((folder / "status.json").read_text())["events"]
    final = {name: value for name, value in result.final.items() if "second" not in name}
    return (
        dict(leaves(snapshot.model)), dict(leaves(trees)), final, result.best,
        result.stop_reason, result.steps, [(event["event"], event["message"]) for event in told],
        sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)  # the settings of a plugin follow one another
def seen_without(key: str, base: str) -> Any:
    """What can be seen of a run without the setting: the same for most settings of a plugin."""
    with tempfile.TemporaryDirectory() as folder:
        return seen(key, json.loads(base), Path(folder) / "default")


@pytest.mark.parametrize("place", CASES)
def test_a_setting_changes_what_a_run_does(place: str, tmp_path: Path) -> None:
    if place in NEEDS_INT8 and (lacking := lacks_int8("cpu")):
        pytest.skip(f"{lacking}; what is done instead: tests/plugins/test_smaller_processor.py")
    key, _, field = place.rpartition(".")
    general = f"{key.partition('.')[0]}.*.{field}"
    beside, value = BESIDE.get(place) or BESIDE.get(general) or ({}, None)
    if value is None:
        value = another(fields(key)[field])
    known = fields(key)
    base = {name: given for name, given in beside.items() if name in known}
    assert base.get(field, known[field].get("default")) != value, "the same value"
    without = seen_without(key, json.dumps(base, sort_keys=True))
    with_it = seen(key, {**base, field: value}, tmp_path / "changed")
    assert without != with_it, f"{place} = {value!r} changes nothing"


def test_every_setting_of_the_listed_kinds_is_shown_elsewhere() -> None:
    found = {
        f"{offer.key}.{field}"
        for offer in OFFERS
        if offer.kind in LISTED
        for field in fields(offer.key)
    }
    assert found <= ELSEWHERE.keys(), found - ELSEWHERE.keys()


def test_what_is_shown_elsewhere_is_a_setting_and_named_there() -> None:
    for place, file in ELSEWHERE.items():
        key, _, field = place.rpartition(".")
        assert field in fields(key), place
        assert field in (ROOT / file).read_text(), f"{file} does not name {field}"
    for place in BESIDE:
        key, _, field = place.rpartition(".")
        if not key.endswith("*"):
            assert field in fields(key), place
