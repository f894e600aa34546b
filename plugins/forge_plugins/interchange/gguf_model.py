"""A ternary model as a GGUF file: a `Llama` of ours, or one of transformers that llama.cpp has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from forge_plugins.interchange.gguf import GgufTensor
from forge_plugins.interchange.gguf_llama import check_llama, llama_metadata, llama_parts
from forge_plugins.interchange.gguf_parts import FILE_TYPES, Other, Part, numbers, packed
from forge_plugins.interchange.gguf_pretrained import (
    check_pretrained,
    pretrained_metadata,
    pretrained_parts,
)
from forge_plugins.interchange.pretrained_folder import is_pretrained_model, kept_files
from forge_plugins.interchange.ternary_blocks import BlockType
from forge_plugins.interchange.tokenizer_files import gguf_vocabulary
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
from forge_plugins.mathematics.text.tokenizers import Tokenizer


class Sizes(NamedTuple):
    """Tokens that the model knows, and of its longest sequence in llama.cpp."""

    vocabulary: int
    context: int


def check_gguf(model: nn.Module, kind: BlockType, *, scale_tensors: bool = False) -> Sizes:
    """Refuse, before anything is trained, what llama.cpp cannot compute or computes otherwise.

    Raises:
        ValueError: another architecture, no ternary layer, or one that the file cannot hold.
    """
    if is_pretrained_model(model):
        check_pretrained(model, kind, scale_tensors=scale_tensors)
    else:
        _ = check_llama(model, kind)
    metadata = _metadata(model)[1]
    return Sizes(metadata["vocab_size"], metadata["context_length"])


def _metadata(model: Any) -> tuple[str, dict[str, Any]]:
    return pretrained_metadata(model) if is_pretrained_model(model) else llama_metadata(model)


def _parts(model: Any, kind: BlockType, *, scale_tensors: bool, other: Other) -> dict[str, Part]:
    make = pretrained_parts if is_pretrained_model(model) else llama_parts
    return make(model, kind, scale_tensors=scale_tensors, other=other)


def gguf_tensors(
    model: nn.Module, kind: BlockType, *, scale_tensors: bool = False, other: Other = "f32"
) -> dict[str, GgufTensor]:
    """The tensors of the file.

    Args:
        model: the network.
        kind: of the ternary blocks.
        scale_tensors: the exact fp32 scale in a tensor of its own beside each ternary weight, and
            1 in its blocks, instead of the scale in fp16 in each block.
        other: precision of matrices that are not ternary (norms and biases stay fp32).

    Raises:
        ValueError: there is no ternary layer, or llama.cpp cannot compute this network.
    """
    return packed(_parts(model, kind, scale_tensors=scale_tensors, other=other))


def gguf_numbers(
    model: nn.Module, kind: BlockType, *, scale_tensors: bool = False, other: Other = "f32"
) -> dict[str, Tensor]:
    """The numbers that the file's tensors stand for, fp32; arguments as of `gguf_tensors`."""
    return numbers(_parts(model, kind, scale_tensors=scale_tensors, other=other))


def gguf_entries(
    model: nn.Module, kind: BlockType, tokenizer: Tokenizer | None, name: str
) -> dict[str, Any]:
    """The metadata of the file.

    Args:
        model: the network.
        kind: of its blocks.
        tokenizer: of its data, if there is one.
        name: shown by programs.
    """
    architecture, own = _metadata(model)
    vocabulary = gguf_vocabulary(tokenizer, own["vocab_size"])
    template = _chat_template(model, tokenizer)
    return {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
        **({"tokenizer.chat_template": template} if template else {}),
    }


def _chat_template(model: Any, tokenizer: Tokenizer | None) -> str | None:
    """That of the data's tokenizer, or of the folder that the model is from."""
    if isinstance(tokenizer, LibraryTokenizer) and "chat_template" in tokenizer.settings:
        return str(tokenizer.settings["chat_template"])
    files = kept_files(model) if is_pretrained_model(model) else {}
    own = files.get("chat_template.jinja")
    if own is not None:
        return own.decode()
    about = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = about.get("chat_template")
    return template if isinstance(template, str) else None


def unquantized(tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The matrices of a file that are not ternary, for its manifest: names, and their share."""
    sizes = {name: math.prod(item.shape) for name, item in tensors.items() if len(item.shape) == 2}
    left = [name for name in sizes if tensors[name].kind in ("f32", "f16")]
    share = sum(sizes[name] for name in left) / sum(sizes.values())
    return {"tensors": left, "share": share}
