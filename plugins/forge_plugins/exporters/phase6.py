"""The folder that Agent Forge's Phase 6 (baking) reads."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl
from forge_plugins.exporters.phase6_records import RECORDS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.interchange import grid_weight
    from forge_plugins.mathematics.optimizers import tied_tensors
    from forge_plugins.mathematics.quantization import bit_layer, weight_statistics
else:
    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")
    bit_layer = LazyModule("forge_plugins.mathematics.quantization.bit_layer")
    grid_weight = LazyModule("forge_plugins.interchange.grid_weight")
    weight_statistics = LazyModule("forge_plugins.mathematics.quantization.weight_statistics")
    tied_tensors = LazyModule("forge_plugins.mathematics.optimizers.tied_tensors")

TRAINED, PLAIN = "trained_model.pt", "model.pth"


@dataclass(frozen=True, kw_only=True)
class Phase6Config:
    """Which weights `trained_model.pt` holds."""

    weights: Annotated[
        Literal["latent", "applied"],
        Meta(
            description="of quantized layers: the trained ones (quantized again by the same "
            "layers), or the ones multiplied with, for plain linear layers; model.pth always "
            "holds the latter"
        ),
    ] = "latent"


class Phase6:
    """The folder that Agent Forge's Phase 6 (baking) reads.

    Writes `trained_model.pt`, `model.pth` and three JSON files; unmeasured metrics are null.

    `trained_model.pt` is a dictionary of `model_state_dict`, `training_config` and `final_metrics`
    in plain types, so that the default `torch.load` takes it. `model.pth` is the state dictionary
    of a model of plain layers: the weights that the quantized layers apply.
    """

    info = PluginInfo(name="phase6", kind=Kind.EXPORTERS, config=Phase6Config, records=RECORDS)

    def __init__(self, config: Phase6Config) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """What modules keep beside their tensors, and the default loader would not take."""
        for name, value in run.model.state_dict().items():
            if not isinstance(value, torch.Tensor) and not _loads(value):
                return (
                    f"{name} is a {type(value).__name__} that torch.load refuses by default: let "
                    "get_extra_state give numbers, texts, lists, dictionaries and tensors"
                )
        return None

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the folder and read both weight files back with the default loader.

        Raises:
            PluginError: a file gave other weights back.
        """
        assert run.folder is not None, "exporters are asked in a run with a folder"
        facts = TrainingFacts(
            folder=run.folder,
            steps=run.progress.step,
            epochs=run.progress.epoch,
            seconds=run.progress.seconds,
            samples=run.data.spec.samples,
            training=dict(run.metrics.latest),
            validation=dict(run.metrics.validation),
        )
        return write_phase6(folder, run.active_model, facts, self.config.weights)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a finished run knows of itself.

    Args:
        folder: the run folder, with its `config.yaml`.
        steps, epochs, seconds: of the training.
        samples: training samples in an epoch, if known.
        training: the last metrics of the training; None: not measured.
        validation: of the last validation; empty if there was none.
    """

    folder: Path
    steps: int
    epochs: int
    seconds: float
    samples: int | None
    training: Mapping[str, float | None]
    validation: Mapping[str, float | None]


def write_phase6(
    folder: Path, model: nn.Module, facts: TrainingFacts, weights: str = "latent"
) -> dict[str, Any]:
    """Write the files into a folder that is there; what the exporter's manifest says of them.

    Args:
        folder: where to.
        model: the trained model.
        facts: of the run.
        weights: see `Phase6Config`.

    Raises:
        PluginError: a file gave other weights back.
    """
    settings = yaml.safe_load((facts.folder / "config.yaml").read_text(encoding="utf-8"))
    plain = plain_state(model)
    final = dict(facts.training)
    final |= {f"validation_{name}": value for name, value in facts.validation.items()}
    trained = {
        "model_state_dict": _on_cpu(model.state_dict()) if weights == "latent" else plain,
        "training_config": settings,
        "final_metrics": final,
    }
    for name, content in ((TRAINED, trained), (PLAIN, plain)):
        torch.save(content, folder / name)
        again = torch.load(folder / name, map_location="cpu")
        written, read = (
            part["model_state_dict"] if name == TRAINED else part for part in (content, again)
        )
        for key, value in written.items():
            if not _same(read[key], value):
                raise PluginError(f"phase6: {key} came back from {name} with other values")
    bytes_written = (folder / TRAINED).stat().st_size
    for name, record in _records(model, facts, settings, bytes_written).items():
        text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return {
        "format": "phase6",
        "weights": weights,
        "step": facts.steps,
        "verified": {"read_back_bit_equal": True, "loader": "torch.load, default arguments"},
    }


def _records(
    model: nn.Module, facts: TrainingFacts, settings: Mapping[str, Any], weight_bytes: int
) -> dict[str, Any]:
    validation, optimizer = facts.validation, settings.get("optimizer")
    return {
        "training_metadata": {
            "architecture": type(model).__name__,
            "epochs": facts.epochs,
            "final_accuracy": validation.get("accuracy"),
            "validation_loss": validation.get("loss"),
            "optimizer_config": optimizer if isinstance(optimizer, Mapping) else None,
            "training_time": round(facts.seconds, 3),
            "dataset_size": facts.samples,
            "hyperparameters": dict(settings),
            "checkpoint_path": TRAINED,
        },
        "metadata": {
            "model_architecture": architecture(model),
            "training_metrics": dict(facts.training) or None,
            "quantization_info": quantization_info(model),
            "performance_stats": {
                "steps": facts.steps,
                "seconds": round(facts.seconds, 3),
                "steps_per_second": facts.steps / facts.seconds if facts.seconds > 0 else None,
                "weight_bytes": weight_bytes,
            },
            "validation_results": dict(validation) or None,
        },
        "training_history": {"entries": _history(facts.folder)},
    }


def _loads(value: Any) -> bool:
    """Whether the default `torch.load` reads a value back."""
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        _ = torch.load(io.BytesIO(stream.getvalue()), map_location="cpu")
    except Exception:  # noqa: BLE001  whatever a foreign object or its pickle raises
        return False
    return True


def _same(left: Any, right: Any) -> bool:
    """Whether two values are equal; tensors to the bit, also within lists and dictionaries."""
    pairs = [(left, right)]
    while pairs:
        one_side, other = pairs.pop()
        if isinstance(one_side, torch.Tensor) and isinstance(other, torch.Tensor):
            if not tied_tensors.same_bits(one_side, other):
                return False
        elif isinstance(one_side, Mapping) and isinstance(other, Mapping):
            if one_side.keys() != other.keys():
                return False
            pairs += [(one_side[key], other[key]) for key in one_side]
        elif isinstance(one_side, list | tuple) and isinstance(other, list | tuple):
            if len(one_side) != len(other):
                return False
            pairs += list(zip(one_side, other, strict=True))
        elif one_side != other:
            return False
    return True


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy on the CPU, in which tensors that are one stay one."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tied = tied_tensors.tied_names(tensors)
    copies = {
        name: value.detach().cpu().clone() for name, value in tensors.items() if name not in tied
    }
    return {
        name: copies[tied.get(name, name)] if name in tensors else value
        for name, value in state.items()
    }


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The state of the same model with plain layers, whose weights are those that are applied."""
    return _on_cpu(grid_weight.applied_state(model))


def architecture(model: nn.Module) -> dict[str, Any]:
    """Class, number of parameters, and the layers that have parameters of their own."""
    layers = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            weight = own.get("weight")
            shape = None if weight is None else list(weight.shape)
            layers[name] = {"kind": type(module).__name__, "shape": shape}
    kind = type(model)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": layers,
    }


def quantization_info(model: nn.Module) -> dict[str, Any] | None:
    """Bits, and metrics measured on the weights; None without a quantized layer."""
    result = {
        name: module for name, module in model.named_modules()
        if isinstance(module, bit_layer.BitLayer) and module.scheme.quantizes_weight
    }  # fmt: skip
    if not result:
        return None
    schemes = {layer.scheme for layer in result.values()}
    first = next(iter(result.values())).scheme
    weights = sum(layer.weight.numel() for layer in result.values())
    info: dict[str, Any] = {
        "layers": sorted(result),
        "weights": weights,
        "weight_bits": first.weight_bits if len(schemes) == 1 else None,
        "activation_bits": first.activation_bits if len(schemes) == 1 else None,
        "blend": min(layer.warmup_lambda for layer in result.values()),
    }
    if len(schemes) == 1:
        sums = [weight_statistics.weight_sums(layer, None).cpu() for layer in result.values()]
        metrics = weight_statistics.weight_metrics(torch.stack(sums).sum(0), first.qmax)
        del metrics["weight_flips"]  # of an update: there is none here
        info |= {name: float(value) for name, value in metrics.items()}
    return info


def _history(folder: Path) -> list[Any] | None:
    """The lines of `metrics.jsonl`, when the run wrote them."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
