"""A ternary `Llama` as a GGUF file.

Without sub-norms it is llama.cpp's architecture `llama`, with them `bitnet`. Conventions:
`llama` turns neighbouring pairs where we turn the two halves of a head, so the rows of queries and
keys (weights and biases) are reordered; `bitnet` turns halves. `bitnet` there computes SiLU and
has no head of its own and no biases. A layer that was not trained ternary stays fp32 or fp16.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from forge_plugins.interchange.gguf_parts import (
    Other,
    Part,
    check_rows,
    interleave,
    level_parts,
    number_part,
)
from forge_plugins.interchange.llama_names import GGUF, translate
from forge_plugins.interchange.ternary_blocks import BlockType
from forge_plugins.mathematics.networks.llama import Llama
from forge_plugins.mathematics.quantization.ternary_layers import check_layers, read_layers


def check_llama(model: nn.Module, kind: BlockType) -> Llama:
    """Refuse, before anything is trained, what llama.cpp cannot compute or computes otherwise.

    Returns:
        The model, which is a Llama.

    Raises:
        ValueError: another architecture, no ternary layer, or one that llama.cpp does not know.
    """
    if not isinstance(model, Llama):
        raise ValueError(  # noqa: TRY004  a network of the user's
            f"{type(model).__name__} is no architecture that llama.cpp knows; use "
            "model: {use: llama_decoder}, or a model of transformers that llama.cpp has, or export "
            "with packed_ternary"
        )
    shape = model.shape
    if shape.activation != "silu":
        raise ValueError(
            f"llama.cpp computes SiLU where this model computes {shape.activation}, so it would "
            "give other answers: train with model.with.activation: silu"
        )
    if shape.sub_norms and not shape.tied:
        raise ValueError(
            "llama.cpp's architecture 'bitnet' (sub-norms) has no head of its own: set "
            "model.with.tied: true, or model.with.sub_norms: false"
        )
    if shape.sub_norms and (shape.attention_bias or shape.feed_bias):
        raise ValueError(
            "llama.cpp's architecture 'bitnet' (sub-norms) has no biases: set "
            "model.with.attention_bias and feed_bias: false, or model.with.sub_norms: false"
        )
    if shape.tied and "head" in check_layers(model):
        raise ValueError(
            "the head is quantized and the embedding, which is the same weight (tied), is not: a "
            "GGUF file of this architecture holds one of them; leave the head out "
            "(quantizer.with.skip), or set model.with.tied: false"
        )
    check_rows(model, kind)
    return model


def llama_parts(
    model: Llama, kind: BlockType, *, scale_tensors: bool, other: Other
) -> dict[str, Part]:
    """The tensors by llama.cpp's names; arguments as of `gguf_model.gguf_tensors`."""
    shape = check_llama(model, kind).shape
    layers = read_layers(model)
    result: dict[str, Part] = {}
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        if (module == "head" and shape.tied) or part in ("threshold", "reference_scale"):
            continue
        theirs = translate(module, GGUF, "blk.{}")
        heads = {"query": shape.heads, "key": shape.groups}.get(module.rpartition(".")[2])
        turned = heads is not None and not shape.sub_norms
        layer = layers.get(module) if part == "weight" else None
        values = value if layer is None else layer.levels
        values = interleave(values, heads) if turned and heads else values
        if layer is not None:
            result |= level_parts(theirs, layer, values, kind, scale_tensors=scale_tensors)
            continue
        if scale_tensors and part == "bias" and ".feed." in module and module in layers:
            # the perceptron there adds the bias before it multiplies by `.scale`
            values = values.detach().cpu().float() * layers[module].scale
        result[f"{theirs}.{part}"] = number_part(name, values, other)
    return result


def llama_metadata(model: Llama) -> tuple[str, dict[str, Any]]:
    """The architecture, and what its computation needs to know."""
    shape = model.shape
    return "bitnet" if shape.sub_norms else "llama", {
        "context_length": shape.context,
        "embedding_length": shape.width,
        "block_count": shape.layers,
        "feed_forward_length": shape.hidden,
        "vocab_size": shape.vocabulary,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.groups,
        "attention.layer_norm_rms_epsilon": float(shape.epsilon),
        "rope.dimension_count": shape.head_width,
        "rope.freq_base": float(shape.rotary_base),
    }
