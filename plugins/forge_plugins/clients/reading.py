"""What a client reads in an export, beside what was meant: all weights, and tokens of texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from forge_kernel.api import PluginError
from forge_plugins.clients.verification import INSTALL, Client, answer_of, missing

ONNX_WEIGHTS: Final = Client("onnxruntime_weights", ("onnxruntime", "onnx"))
GGUF_WEIGHTS: Final = Client("gguf_weights", ("gguf",))
LLAMA_CPP_WEIGHTS: Final = Client("llama_cpp_weights", ("xllamacpp",))
LLAMA_CPP_TOKENS: Final = Client("llama_cpp_tokens", ("xllamacpp",))


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts and what the tokenizer of the training makes of them.

    Args:
        texts: the texts.
        tokens: numbers of their tokens.
        specials: whether special tokens in a text stand for themselves.
        note: what the texts do not show.
    """

    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]
    specials: bool
    note: str | None = None


def as_tensor(value: Any) -> Tensor:
    """Plain data as bytes, for a request or an answer."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def as_data(tensor: Tensor) -> Any:
    """The plain data again."""
    return json.loads(bytes(tensor.tolist()))


def compared_weights(
    client: Client, export: Path, meant: Mapping[str, Tensor]
) -> dict[str, int | str | None]:
    """Let a client unpack every weight of an export, and compare all of them.

    Args:
        client: which.
        export: the file.
        meant: the numbers that the file is to hold, fp32, by the client's names.

    Returns:
        For the manifest: how many numbers were compared (null: none, and a note says why).

    Raises:
        PluginError: a weight is missing or is another number.
    """
    if lacking := missing(client):
        why = f"{' and '.join(lacking)} is not installed ({INSTALL})"
        return {"weights_compared": None, "weights_note": f"not compared: {why}"}
    result = answer_of(client, export, {"nothing": torch.empty(1)})
    if "unavailable" in result:
        why = f"this build of {client.packages[0]} does not show its readers"
        return {"weights_compared": None, "weights_note": f"not compared: {why}"}
    for name, tensor in meant.items():
        read = result.get(name)
        if read is None or read.numel() != tensor.numel():
            raise PluginError(f"{client.packages[0]} finds no {name} in {export.name}")
        wrong = read.float().reshape(tensor.shape) != tensor.float()
        if bool(wrong.any()):
            raise PluginError(
                f"{client.packages[0]} reads other weights from {export.name}: "
                f"{int(wrong.sum())} of {tensor.numel()} in {name}"
            )
    count = sum(tensor.numel() for tensor in meant.values())
    return {"weights_compared": count, "weights_note": None}


def compared_texts(client: Client, export: Path, texts: Texts | None) -> dict[str, Any]:
    """Let a client cut texts into tokens, and compare the numbers.

    Args:
        client: which.
        export: the file.
        texts: None: there is no tokenizer.

    Returns:
        For the manifest: how many texts were compared (null: none, and a note says why).

    Raises:
        PluginError: the client cuts a text otherwise.
    """
    lacking = missing(client)
    if texts is None or lacking:
        why = (
            "the data has no tokenizer"
            if texts is None
            else f"{' and '.join(lacking)} is not installed ({INSTALL})"
        )
        return {"texts_compared": None, "texts_note": f"not compared: {why}"}
    asked = {"texts": as_tensor(list(texts.texts)), "specials": torch.tensor([texts.specials])}
    result = as_data(answer_of(client, export, asked)["tokens"])
    wrong = [
        (text, list(meant), read)
        for text, meant, read in zip(texts.texts, texts.tokens, result, strict=True)
        if list(meant) != read
    ]
    if wrong:
        text, meant, read = wrong[0]
        raise PluginError(
            f"{client.packages[0]} cuts {len(wrong)} of {len(texts.texts)} texts otherwise than "
            f"the tokenizer of the training: {text!r} is {meant[:12]} there and {read[:12]} in "
            f"{export.name}"
        )
    return {"texts_compared": len(texts.texts), "texts_note": texts.note}
