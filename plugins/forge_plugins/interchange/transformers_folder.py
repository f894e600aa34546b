"""A `Llama` as a folder that `AutoModelForCausalLM.from_pretrained` of transformers loads.

The layouts are those of `packed_layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from forge_plugins.interchange import packed_layout
from forge_plugins.interchange.grid_weight import need_grid_layers
from forge_plugins.interchange.llama_names import TRANSFORMERS, translate
from forge_plugins.interchange.packed_layout import (
    Layout,
    check_layouts,
    quantization_entry,
    ternary_tensors,
)
from forge_plugins.mathematics.networks.llama import Llama
from forge_plugins.mathematics.quantization.ternary_layers import read_layers

_BLOCK: Final = "model.layers.{}"


def check_folder(model: nn.Module, layout: Layout) -> Llama:
    """Refuse, before anything is trained, what the client cannot compute.

    Returns:
        The model, which is a Llama.

    Raises:
        ValueError: another architecture, no ternary layer, or one that the layout cannot hold.
    """
    llama = check_architecture(model)
    check_layouts(llama, layout)
    return llama


def check_architecture(model: nn.Module) -> Llama:
    """Refuse a network that the client has no class for, whatever its weights are.

    Returns:
        The model, which is a Llama.

    Raises:
        ValueError: another architecture.
    """
    if not isinstance(model, Llama):
        raise ValueError(  # noqa: TRY004  a network of the user's
            f"{type(model).__name__} is no architecture that this exporter knows; use model: "
            "{use: llama_decoder}, or export with packed_ternary"
        )
    if model.shape.sub_norms and model.shape.feed_bias:
        raise ValueError(
            "BitNetForCausalLM has no bias in its perceptron: set model.with.feed_bias: false, or "
            "model.with.sub_norms: false"
        )
    return model


def folder_tensors(
    model: Llama, layout: Layout, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`.

    Raises:
        ValueError: there is no ternary layer, or the client cannot compute this network.
    """
    layers = read_layers(check_folder(model, layout))
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if model.shape.tied:
        del state["head.weight"]  # the client ties it again
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        theirs = translate(module, TRANSFORMERS, _BLOCK)
        if module not in layers or layout == "online":
            tensors[f"{theirs}.{kind}"] = value.to(dtype).contiguous().clone()
        elif kind == "weight":
            bias = state.get(f"{module}.bias")
            tensors |= ternary_tensors(theirs, layers[module], bias, layout, dtype)
    return tensors


def plain_tensors(model: Llama, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` of a network without levels, in their precision."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if model.shape.tied:
        del state["head.weight"]  # the client ties it again
    names = ((name.rpartition("."), value) for name, value in state.items())
    return {
        f"{translate(module, TRANSFORMERS, _BLOCK)}.{kind}": value.to(dtype).contiguous().clone()
        for (module, _, kind), value in names
    }


def wrong_tensors(
    model: Llama, layout: Layout, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> list[str]:
    """The tensors of a file that are not what was meant, the levels of packed ones unpacked.

    Args:
        model: what the file was written from.
        layout: of the file.
        tensors: what was to be written.
        stored: what was read.
    """
    levels = {
        f"{translate(name, TRANSFORMERS, _BLOCK)}.weight": layer.levels
        for name, layer in read_layers(model).items()
    }
    return packed_layout.wrong_tensors(layout, tensors, stored, levels)


def folder_config(model: Llama, layout: Layout, dtype: str, end: int | None) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model: the network.
        layout: of its file.
        dtype: `"float32"` or `"bfloat16"`.
        end: the token that ends a text, if there is one.
    """
    ternary = need_grid_layers(model)
    plain = [
        translate(name, TRANSFORMERS, _BLOCK)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in ternary
    ]
    return plain_config(model, dtype, end) | {
        "quantization_config": quantization_entry(layout, plain)
    }


def plain_config(model: Llama, dtype: str, end: int | None) -> dict[str, Any]:
    """The content of the `config.json` of a network without levels; see `folder_config`."""
    shape = model.shape
    config: dict[str, Any] = {
        "architectures": ["BitNetForCausalLM" if shape.sub_norms else "LlamaForCausalLM"],
        "model_type": "bitnet" if shape.sub_norms else "llama",
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "hidden_act": shape.activation,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        "attention_bias": shape.attention_bias,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if not shape.sub_norms:
        config |= {"mlp_bias": shape.feed_bias, "head_dim": shape.head_width}
    return config
