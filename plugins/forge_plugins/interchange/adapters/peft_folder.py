"""Adapters of low rank in the layout of the PEFT library: written, and read.

`adapter_config.json` names the base and the layers, `adapter_model.safetensors` has the matrices as
`base_model.model.<layer>.lora_A.weight` and `...lora_B.weight`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from forge_plugins.interchange.llama_names import TRANSFORMERS, translate
from forge_plugins.interchange.model_folder import FolderError
from forge_plugins.interchange.pretrained_folder import is_pretrained_model
from forge_plugins.mathematics.networks import low_rank_adapter
from forge_plugins.mathematics.networks.llama import Llama
from forge_plugins.mathematics.quantization.bit_layer import BitLayer

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_LANGUAGE: Final = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of language models. Of classifiers PEFT is not told the task: it would take
their heads for trained in full, asked for or not."""


def base_folder(model: nn.Module) -> Path | None:
    """The folder of the model that adapters stand beside; None: it is no model of transformers."""
    name = model.config._name_or_path if is_pretrained_model(model) else ""  # type: ignore[union-attr]
    return Path(str(name)) if name else None


def check_base(model: nn.Module) -> None:
    """Refuse adapters whose base is not the one that their folder would name.

    Raises:
        ValueError: the run has changed the base; the message says what.
    """
    folder = base_folder(model)
    if folder is None:
        return
    hint = (
        "PEFT would load another base than the adapters were trained with: write the changed model "
        "first (exporters: transformers, in a run without adapters), and train them on that folder"
    )
    about: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = about.get("quantization_config")
    layers = (name for name, module in model.named_modules() if isinstance(module, BitLayer))
    first = next(layers, None)
    if first is not None and not known:
        raise ValueError(f"{first} is quantized by this run, and not in {folder}. {hint}")
    kind = getattr(model.config, "model_type", None)
    if kind != about.get("model_type"):
        raise ValueError(f"the model is of type {kind} now, which {folder} is not. {hint}")
    state = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    body = f"{getattr(model, 'base_model_prefix', '')}."
    drawn = [name for name in state if not name.startswith(body)]
    if drawn and type(model).__name__ not in about.get("architectures", ()):
        head = drawn[0].partition(".")[0]
        raise ValueError(
            f"{drawn[0]} is not in {folder}: it was drawn for this run, and is frozen. Train it: "
            f"wrappers: [{{use: lora, with: {{also: [{head}]}}}}]"
        )
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys() & state.keys():
                held: Tensor = opened.get_tensor(name)
                own = state[name].detach().cpu()
                # packed levels have another shape, and their layer is unpacked
                alike = held.is_floating_point() and held.shape == own.shape
                packed = f"{name}_scale" in opened.keys()  # noqa: SIM118  no dictionary
                if alike and not packed and not torch.equal(held.to(own.dtype), own):
                    raise ValueError(f"{name} is another than in {folder}. {hint}")


def _outer_name(model: nn.Module, name: str) -> str:
    """A layer's name in the transformers library."""
    return translate(name, TRANSFORMERS, "model.layers.{}") if isinstance(model, Llama) else name


def _full_modules(model: nn.Module) -> list[str]:
    """Modules that are trained in full, by the names that hold their parameters."""
    parts = low_rank_adapter.adapters(model)
    names = {
        name.rpartition(".")[0]: None
        for name, value in model.named_parameters()
        if value.requires_grad and not low_rank_adapter.is_of_adapter(name, parts)
    }
    return list(names)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in low_rank_adapter.adapters(model).items():
        outer = f"{_PREFIX}{_outer_name(model, name)}"
        tensors[f"{outer}.lora_A.weight"] = adapter.A
        tensors[f"{outer}.lora_B.weight"] = adapter.B
    for name in _full_modules(model):
        outer = f"{_PREFIX}{_outer_name(model, name)}"
        for own, value in model.get_submodule(name).state_dict().items():
            tensors[f"{outer}.{own}"] = value
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    layers = low_rank_adapter.adapters(model)
    one = next(iter(layers.values()))
    folder, kind = base_folder(model), type(model).__name__
    language = isinstance(model, Llama) or kind.endswith(_LANGUAGE)
    full = [_outer_name(model, name) for name in _full_modules(model)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if language else None,
        "auto_mapping": None
        if language
        else {"base_model_class": kind, "parent_library": type(model).__module__},
        "base_model_name_or_path": None if folder is None else folder.as_posix(),
        "inference_mode": True,
        "r": one.rank,
        "lora_alpha": int(one.alpha) if one.alpha == int(one.alpha) else one.alpha,
        "lora_dropout": one.dropout,
        "bias": "none",
        "fan_in_fan_out": low_rank_adapter.is_transposed(model.get_submodule(next(iter(layers)))),
        "target_modules": [_outer_name(model, name) for name in layers],
        "modules_to_save": full or None,
    }


def unread_by_peft(model: nn.Module) -> str | None:
    """Why PEFT cannot set the adapters beside the base; None: it can."""
    folder = base_folder(model)
    if folder is None:
        return f"{type(model).__name__} is not loaded from a folder of transformers"
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = about.get("quantization_config") or {}
    if packed.get("quant_method") == "bitnet" and packed.get("linear_class") != "autobitlinear":
        return (
            f"PEFT sets adapters beside nn.Linear alone, and {folder} has the layout bitlinear: "
            "export the base with layout: autobitlinear"
        )
    return None


@dataclass(frozen=True)
class StoredAdapter:
    """Adapters as a folder has them.

    Args:
        base: the folder of the model that they stand beside.
        alpha: numerator of the product's factor.
        by_root: its denominator is the root of the rank (rsLoRA, arXiv 2312.03732).
        layers: A and B by the layer's name.
        full: tensors of the model that the folder has others for.
    """

    base: Path
    alpha: float
    by_root: bool
    layers: dict[str, tuple[Tensor, Tensor]]
    full: dict[str, Tensor]


def read_adapter(folder: Path) -> StoredAdapter:
    """Read adapters that PEFT or the exporter `lora` has written.

    Raises:
        FolderError: the files are broken, or the adapters are of another kind.
    """
    about = _read_config(folder)
    base = about.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise FolderError(
            f"{folder / CONFIG}: its base is {base!r}, which is no folder here: set "
            "base_model_name_or_path to the folder of the model (a relative path begins where the "
            "command runs)"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(_PREFIX)
        layer, _, end = own.rpartition(".lora_")
        if end in {"A.weight", "B.weight"}:
            pairs.setdefault(layer, {})[end[0]] = tensor
        else:
            full[own] = tensor
    broken = [name for name, pair in pairs.items() if not _is_pair(pair)]
    if broken or not pairs:
        what = f"{broken[0]} has not two matrices that fit" if broken else "there is no adapter"
        raise FolderError(f"{folder / WEIGHTS}: {what}")
    layers = {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}
    by_root = bool(about.get("use_rslora"))
    return StoredAdapter(Path(base), float(about["lora_alpha"]), by_root, layers, full)


def _is_pair(pair: Mapping[str, Tensor]) -> bool:
    if pair.keys() != {"A", "B"} or any(tensor.ndim != 2 for tensor in pair.values()):
        return False
    return pair["A"].shape[0] == pair["B"].shape[1]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{file} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("peft_type") != "LORA":
        kind = about.get("peft_type") if isinstance(about, dict) else None
        raise FolderError(f"{file}: adapters of the kind {kind} are not read, LORA is")
    lacking = [name for name in ("r", "lora_alpha") if not _is_number(about.get(name))]
    if lacking:
        raise FolderError(f"{file}: {lacking[0]} is no number above 0")
    other = [name for name in ("use_dora", "alpha_pattern", "use_qalora") if about.get(name)]
    other += ["bias"] if about.get("bias", "none") != "none" else []
    if other:
        raise FolderError(f"{file}: {other[0]} asks for other arithmetic than alpha / r * B A x")
    return about


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def set_adapters(model: nn.Module, stored: StoredAdapter, folder: Path) -> None:
    """Set stored adapters beside the layers of their base, for evaluation.

    Args:
        model: the base, changed in place.
        stored: of `read_adapter`.
        folder: that they are from, for messages.

    Raises:
        FolderError: the base has no such layer or tensor, or one of another shape.
    """
    state = dict(model.state_dict())
    for name, tensor in stored.full.items():
        if name not in state or state[name].shape != tensor.shape:
            raise FolderError(f"{folder}: {stored.base} has no place for {name}")
        state[name].copy_(tensor)
    modules = dict(model.named_modules())
    for name, (wide, tall) in stored.layers.items():
        layer = modules.get(name)
        shape = (int(wide.shape[1]), int(tall.shape[0]))
        if layer is None or not low_rank_adapter.takes_adapter(modules, name):
            raise FolderError(f"{folder}: {stored.base} has no linear layer {name}")
        if low_rank_adapter.features_of(layer) != shape:
            raise FolderError(
                f"{folder}: {name} of {stored.base} is of {low_rank_adapter.features_of(layer)} "
                f"numbers, and its adapter of {shape}: they are of different models"
            )
        rank = len(wide)
        alpha = stored.alpha * math.sqrt(rank) if stored.by_root else stored.alpha
        adapter = low_rank_adapter.LowRankAdapter(shape, rank, alpha)
        adapter.load_state_dict({"A": wide.float(), "B": tall.float()})
        low_rank_adapter.set_beside(layer, adapter.eval())
