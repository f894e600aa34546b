"""A model of the transformers library as a GGUF file, in llama.cpp's architecture for it.

Names, norms and rotary positions are those of llama.cpp's converter. What the architecture there
does not compute, or computes otherwise, is refused with the setting that means it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from forge_plugins.interchange.gguf_families import FAMILIES, Family, activation_of
from forge_plugins.interchange.gguf_parts import (
    Other,
    Part,
    check_rows,
    interleave,
    level_parts,
    number_part,
)
from forge_plugins.interchange.ternary_blocks import BlockType
from forge_plugins.mathematics.quantization.ternary_layers import check_layers, read_layers

ELSEWHERE: Final = "export with transformers or packed_ternary"
_LARGEST_GEMMA: Final = 62
"""Layers of the one Gemma 3 whose queries llama.cpp scales by the width of the model."""
_PATTERN: Final = 6
"""Gemma 3's period of layers with a sliding window and one without."""


def family_of(model: nn.Module) -> Family:
    """The architecture for a model.

    Raises:
        ValueError: llama.cpp has none.
    """
    name = type(model).__name__
    for family in FAMILIES.values():
        if family.model_class == name:
            return family
    known = ", ".join(family.model_class for family in FAMILIES.values())
    raise ValueError(
        f"{name} is no architecture that this exporter writes for llama.cpp ({known}): {ELSEWHERE}"
    )


def check_pretrained(model: nn.Module, kind: BlockType, *, scale_tensors: bool) -> None:
    """Refuse, before anything is trained, what llama.cpp cannot compute or computes otherwise.

    Raises:
        ValueError: another architecture, no ternary layer, or a part that llama.cpp does not know.
    """
    family, config = family_of(model), _config(model)
    activation = activation_of(config)
    if activation != family.activation:
        raise ValueError(
            f"llama.cpp computes {family.activation} in its architecture '{family.architecture}' "
            f"where this model computes {activation}, so it would give other answers: {ELSEWHERE}"
        )
    if scale_tensors and not family.scale_tensors:
        raise ValueError(
            f"llama.cpp reads no scales beside the weights of '{family.architecture}': set scale: "
            "block"
        )
    for wrong, what in _faults(family, config):
        if wrong:
            raise ValueError(
                f"llama.cpp's architecture '{family.architecture}' has {what}: {ELSEWHERE}"
            )
    _ = _rotary(family, model)
    _check_modules(family, model)
    check_rows(model, kind)


def _config(model: Any) -> dict[str, Any]:
    result: dict[str, Any] = model.config.to_dict()
    return result


def _faults(family: Family, config: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What an architecture has otherwise than a configuration, each with whether it is so."""
    heads, width, head = config["num_attention_heads"], config["hidden_size"], _head_width(config)
    result = [
        (
            family.square and heads * head != width,
            f"heads that are together as wide as the model ({width}), not {heads} of {head}",
        ),
        (
            not family.own_head and not config.get("tie_word_embeddings"),
            "no head of its own (tie_word_embeddings)",
        ),
    ]
    if family.windowed:
        scalar = width / heads if config["num_hidden_layers"] == _LARGEST_GEMMA else head
        result += [
            (
                config.get("query_pre_attn_scalar") != scalar,
                f"queries scaled by {scalar:g}, not {config.get('query_pre_attn_scalar')} "
                "(query_pre_attn_scalar)",
            ),
            (bool(config.get("attn_logit_softcapping")), "no attn_logit_softcapping"),
            (bool(config.get("final_logit_softcapping")), "no final_logit_softcapping"),
            (bool(config.get("use_bidirectional_attention")), "no bidirectional attention"),
            (
                config["layer_types"] != _layer_types(config["num_hidden_layers"]),
                f"a sliding window in all layers but each {_PATTERN}th (layer_types)",
            ),
        ]
    return result


def _layer_types(count: int) -> list[str]:
    kinds = ("sliding_attention", "full_attention")
    return [kinds[(index + 1) % _PATTERN == 0] for index in range(count)]


def _head_width(config: Mapping[str, Any]) -> int:
    width: int = config["hidden_size"] // config["num_attention_heads"]
    own = config.get("head_dim")
    return width if own is None else int(own)


def _check_modules(family: Family, model: nn.Module) -> None:
    """Refuse a tensor that has no place in the architecture.

    Raises:
        ValueError: there is one; its name.
    """
    tied, layers = bool(_config(model).get("tie_word_embeddings")), check_layers(model)
    if tied and "lm_head" in layers and not family.own_head:
        raise ValueError(
            "lm_head is quantized and the embedding, which is the same weight (tied), is not: "
            f"llama.cpp's '{family.architecture}' has one of them; leave the head out "
            "(quantizer.with.skip)"
        )
    for name in model.state_dict():
        module, _, part = name.rpartition(".")
        if part in ("threshold", "reference_scale"):
            continue
        inner = module.partition("layers.")[2].partition(".")[2]
        has_place = part == "weight" or (part == "bias" and inner.startswith(family.biases))
        if family.tensor_name(module) is None or not has_place:
            raise ValueError(
                f"llama.cpp's architecture '{family.architecture}' has no place for {name}: "
                f"{ELSEWHERE}"
            )


def _rotary(family: Family, model: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Metadata of the rotary positions, and what their frequencies are divided by.

    Raises:
        ValueError: they are stretched in a way that llama.cpp does not know of this architecture.
    """
    config = _config(model)
    about = config["rope_parameters"]
    main = about.get("full_attention", about)
    near = about.get("sliding_attention", main)
    width = _head_width(config)
    share = float(main.get("partial_rotary_factor", 1.0))
    turned = int(width * share)
    if turned != width and not family.partial_rotary:
        raise ValueError(
            f"llama.cpp's architecture '{family.architecture}' turns whole heads, not {share:g} of "
            f"one (partial_rotary_factor): {ELSEWHERE}"
        )
    result: dict[str, Any] = {
        "rope.dimension_count": turned,
        "rope.freq_base": float(main["rope_theta"]),
    }
    if near is not main:
        result["rope.freq_base_swa"] = float(near["rope_theta"])
    kind = main.get("rope_type", "default")
    if near.get("rope_type", "default") != "default" and near is not main:
        kind = f"{near['rope_type']} of the layers with a sliding window"
    if kind == "linear":
        result |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(main["factor"])}
        return result, None
    if kind == "llama3" and family.turned:
        frequencies: Tensor = model.model.rotary_emb.inv_freq.detach().cpu().double()
        places = torch.arange(0, turned, 2, dtype=torch.float64) / turned
        return result, (float(main["rope_theta"]) ** -places / frequencies).float()
    if kind != "default":
        raise ValueError(
            f"the rotary positions are stretched ({kind}), which this exporter does not write for "
            f"llama.cpp's architecture '{family.architecture}': {ELSEWHERE}"
        )
    return result, None


def pretrained_parts(
    model: nn.Module, kind: BlockType, *, scale_tensors: bool, other: Other
) -> dict[str, Part]:
    """The tensors by llama.cpp's names; arguments as of `gguf_model.gguf_tensors`."""
    check_pretrained(model, kind, scale_tensors=scale_tensors)
    family, config, layers = family_of(model), _config(model), read_layers(model)
    result: dict[str, Part] = {}
    divisors = _rotary(family, model)[1]
    if divisors is not None:
        result["rope_freqs.weight"] = number_part("rope_freqs", divisors, other)
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        layer = layers.get(module) if part == "weight" else None
        tied = module == "lm_head" and config.get("tie_word_embeddings") and layer is None
        if tied or part in ("threshold", "reference_scale"):
            continue
        theirs = str(family.tensor_name(module))
        values = _arranged(family, config, module, value if layer is None else layer.levels)
        if layer is not None:
            result |= level_parts(theirs, layer, values, kind, scale_tensors=scale_tensors)
            continue
        if theirs.endswith("_norm"):
            values = values.detach().cpu().float() + family.norm_offset
        if scale_tensors and part == "bias" and ".mlp." in module and module in layers:
            # the perceptron there adds the bias before it multiplies by `.scale`
            values = values.detach().cpu().float() * layers[module].scale
        result[f"{theirs}.{part}"] = number_part(name, values, other)
    return result


def _arranged(family: Family, config: Mapping[str, Any], module: str, values: Tensor) -> Tensor:
    """Rows in the order of the architecture."""
    place = module.rpartition(".")[2]
    if not family.turned or place not in ("q_proj", "k_proj"):
        return values
    heads = config["num_attention_heads" if place == "q_proj" else "num_key_value_heads"]
    return interleave(values, heads)


def context_of(model: nn.Module) -> int:
    """Tokens of the longest sequence that llama.cpp computes as the model does.

    Where layers have a sliding window that the architecture has not, the window: within it both
    see all tokens.
    """
    family, config = family_of(model), _config(model)
    longest = int(config["max_position_embeddings"])
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    slides = kinds is None or "sliding_attention" in kinds
    return longest if family.windowed or not window or not slides else min(longest, int(window))


def pretrained_metadata(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The architecture, and what its computation needs to know."""
    family, config = family_of(model), _config(model)
    width = _head_width(config)
    result = {
        "context_length": context_of(model),
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        **_rotary(family, model)[0],
    }
    if family.windowed:
        result["attention.sliding_window"] = int(config["sliding_window"])
    return family.architecture, result
