"""A trained model of the transformers library as a folder of its own architecture.

Names, configuration, tokenizer and templates are those of the folder that it came from; the linear
layers on levels are written as a layout says (see `packed_layout`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from forge_plugins.interchange.grid_weight import need_grid_layers
from forge_plugins.interchange.packed_layout import (
    Layout,
    check_layouts,
    quantization_entry,
    ternary_tensors,
    wrong_tensors,
)
from forge_plugins.mathematics.quantization.bit_conv1d import BitConv1D
from forge_plugins.mathematics.quantization.ternary_layers import read_layers

Dtype = Literal["float32", "bfloat16"]
KEPT: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json",
)  # fmt: skip
"""Files of the folder that it came from, which training does not change."""


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether a model is one of transformers, which need not be installed."""
    names = {f"{base.__module__}.{base.__name__}" for base in type(model).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in names


def check_pretrained_model(model: nn.Module, layout: Layout) -> None:
    """Refuse, before anything is trained, what the library cannot compute.

    Raises:
        ValueError: no ternary layer, or one that the layout or the library cannot hold.
    """
    for name, layer in need_grid_layers(model).items():
        if isinstance(layer, BitConv1D):
            raise ValueError(  # noqa: TRY004  a network of the user's
                f"{name} is a Conv1D, of which transformers has no quantized form: export with "
                "state_dict (weights: applied)"
            )
    check_layouts(model, layout)


def pretrained_tensors(model: nn.Module, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the weight files, by the names that the library's files have.

    Raises:
        ValueError: see `check_pretrained_model`; or the levels are not there yet.
    """
    check_pretrained_model(model, layout)
    layers = read_layers(model)
    ties = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {
        name: value.detach().cpu() for name, value in model.state_dict().items() if name not in ties
    }
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module not in layers or layout == "online":
            tensors[name] = value.to(dtype) if value.is_floating_point() else value
        elif kind == "weight":
            bias = state.get(f"{module}.bias")
            tensors |= ternary_tensors(module, layers[module], bias, layout, dtype)
    return {
        name: value.contiguous().clone() for name, value in _as_in_files(model, tensors).items()
    }


def pretrained_config(model: Any, layout: Layout, dtype: Dtype) -> dict[str, Any]:
    """The content of `config.json`: the model's own, with its quantization."""
    ternary = need_grid_layers(model)
    plain = [
        _exactly(name) if any(other.endswith(name) for other in ternary) else name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in ternary
    ]
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    if config.get("pad_token_id") == -1:
        del config["pad_token_id"]  # none: the last token is read
    return config | {
        "architectures": [type(model).__name__],
        "dtype": dtype,
        "quantization_config": quantization_entry(layout, plain),
    }


def plain_tensors(
    model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of the weight files of a model that has no levels, by the files' names.

    Args:
        model: what the state is of.
        state: its tensors by its own names, without adapters.
        dtype: of floating tensors; None: their own.
    """
    ties = set(getattr(model, "all_tied_weights_keys", None) or ())
    own = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None)
        for name, value in state.items()
        if name not in ties
    }
    return {name: value.contiguous().clone() for name, value in _as_in_files(model, own).items()}


def plain_config(model: Any) -> dict[str, Any]:
    """The content of the `config.json` of a model that has no levels."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    if config.get("pad_token_id") == -1:
        del config["pad_token_id"]  # none: the last token is read
    return config | {"architectures": [type(model).__name__]}


def _exactly(name: str) -> str:
    """A name that the library takes for no ending of a longer one: it reads patterns too."""
    return f"^{re.escape(name)}$"


def kept_files(model: Any) -> dict[str, bytes]:
    """The files of the folder that a model came from which go with it, by name."""
    folder = Path(str(model.config._name_or_path))
    return {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}


def wrong_names(
    model: nn.Module, layout: Layout, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> list[str]:
    """The tensors of a file that are not what was meant, the levels of packed ones unpacked.

    Args:
        model: what the file was written from.
        layout: of the file.
        tensors: what was to be written.
        stored: what was read.
    """
    levels = {f"{name}.weight": layer.levels for name, layer in read_layers(model).items()}
    return wrong_tensors(layout, tensors, stored, _as_in_files(model, levels))


def _as_in_files(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names, and in the parts, that the library's files have."""
    from transformers.core_model_loading import revert_weight_conversion

    written: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return written
