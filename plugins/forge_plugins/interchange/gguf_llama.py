"""A ternary `Llama` as a GGUF file.

Without sub-norms it is llama.cpp's architecture `llama`, with them `bitnet`. Conventions:
`llama` turns neighbouring pairs where we turn the two halves of a head, so the rows of queries and
keys (weights and biases) are reordered; `bitnet` turns halves. `bitnet` there computes SiLU and
has no head of its own and no biases. A layer that was not trained ternary stays fp32 or fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from forge_plugins.interchange.gguf import GgufTensor, TensorType
from forge_plugins.interchange.llama_names import GGUF, translate
from forge_plugins.interchange.ternary_blocks import BLOCK, BlockType, pack_blocks
from forge_plugins.interchange.tokenizer_files import gguf_vocabulary
from forge_plugins.mathematics.networks.llama import Llama
from forge_plugins.mathematics.quantization.ternary_layers import check_layers, read_layers
from forge_plugins.mathematics.text.tokenizers import Tokenizer

Other = Literal["f32", "f16"]
_FILE_TYPES: Final[dict[BlockType, int]] = {"tq1_0": 36, "tq2_0": 37}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of a head from (first half, second half) to pairs one after the other.

    Args:
        rows: a weight (heads * head_width, in) or a bias (heads * head_width,).
        heads: how many heads the rows hold.
    """
    parts = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return parts.transpose(1, 2).reshape(rows.shape)


def check_gguf(model: nn.Module) -> Llama:
    """Refuse, before anything is trained, what llama.cpp cannot compute or computes otherwise.

    Returns:
        The model, which is a Llama.

    Raises:
        ValueError: another architecture, no ternary layer, or one that llama.cpp does not know.
    """
    if not isinstance(model, Llama):
        raise ValueError(  # noqa: TRY004  a network of the user's
            f"{type(model).__name__} is no architecture that llama.cpp knows; use "
            "model: {use: llama_decoder}, or export with packed_ternary"
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
    for name, (_, columns) in check_layers(model).items():
        if columns % BLOCK:
            raise ValueError(
                f"{name} has rows of {columns} weights, which is not a multiple of {BLOCK}: change "
                "model.with.width or hidden, or export with transformers or packed_ternary"
            )
    return model


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the file: numbers, or levels and what one of them is worth."""

    values: Tensor
    kind: TensorType
    level: Tensor | None = None


def _parts(model: Llama, kind: BlockType, *, scale_tensors: bool, other: Other) -> dict[str, _Part]:
    """The tensors by llama.cpp's names, before they are packed."""
    shape = check_gguf(model).shape
    layers = read_layers(model)
    result: dict[str, _Part] = {}
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        if (module == "head" and shape.tied) or part in ("threshold", "reference_scale"):
            continue
        theirs = translate(module, GGUF, "blk.{}")
        heads = {"query": shape.heads, "key": shape.groups}.get(module.rpartition(".")[2])
        turned = heads is not None and not shape.sub_norms
        layer = layers.get(module) if part == "weight" else None
        if layer is None:
            tensor = value.detach().cpu()
            tensor = interleave(tensor, heads) if turned and heads else tensor
            if scale_tensors and part == "bias" and ".feed." in module and module in layers:
                # the perceptron there adds the bias before it multiplies by `.scale`
                tensor = tensor.float() * layers[module].scale
            matrix = part == "weight" and tensor.ndim == 2
            result[f"{theirs}.{part}"] = _Part(tensor, other if matrix else "f32")
            continue
        levels = interleave(layer.levels, heads) if turned and heads else layer.levels
        level = 1.0 / layer.scale
        item = torch.ones(()) if scale_tensors else level
        result[f"{theirs}.weight"] = _Part(levels, kind, item)
        if scale_tensors:
            result[f"{theirs}.scale"] = _Part(level.reshape(1), "f32")
    return result


def gguf_tensors(
    model: Llama, kind: BlockType, *, scale_tensors: bool = False, other: Other = "f32"
) -> dict[str, GgufTensor]:
    """The tensors of the file.

    Args:
        model: the network.
        kind: of the ternary blocks.
        scale_tensors: the exact fp32 scale in a tensor of its own beside each ternary weight, and
            1 in its blocks, instead of the scale in fp16 in each block.
        other: precision of what is not ternary (norms and biases stay fp32).

    Raises:
        ValueError: there is no ternary layer, or llama.cpp cannot compute this network.
    """
    result: dict[str, GgufTensor] = {}
    for name, part in _parts(model, kind, scale_tensors=scale_tensors, other=other).items():
        if part.level is None:
            result[name] = GgufTensor.plain(part.values, part.kind)
            continue
        blocks = pack_blocks(part.values, part.level, kind)
        result[name] = GgufTensor(tuple(part.values.shape), kind, blocks)
    return result


def gguf_numbers(
    model: Llama, kind: BlockType, *, scale_tensors: bool = False, other: Other = "f32"
) -> dict[str, Tensor]:
    """The numbers that the file's tensors stand for, fp32; arguments as of `gguf_tensors`."""
    result: dict[str, Tensor] = {}
    for name, part in _parts(model, kind, scale_tensors=scale_tensors, other=other).items():
        half = part.values.half() if part.kind == "f16" else part.values
        level = 1.0 if part.level is None else part.level.half().float()  # as blocks hold it
        result[name] = half.float() * level
    return result


def gguf_entries(
    model: Llama, kind: BlockType, tokenizer: Tokenizer | None, name: str
) -> dict[str, Any]:
    """The metadata of the file.

    Args:
        model: the network.
        kind: of its blocks.
        tokenizer: of its data, if there is one.
        name: shown by programs.
    """
    shape = model.shape
    architecture = "bitnet" if shape.sub_norms else "llama"
    own = {
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
    vocabulary = gguf_vocabulary(tokenizer, shape.vocabulary)
    return {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
    }
