"""What plugins require of each other, in words for people: what is missing, what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_BITNET: Final = "add a quantizer: quantizer: {use: bitnet}"

FACT_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "data:classes": (
        "targets that are classes",
        "data.with.target: class, where the data has classes; for targets that are numbers take "
        "loss: {use: regression} and validators: [{use: regression}]",
    ),
    "data:numbers": (
        "targets that are numbers",
        "data.with.target: number, where the column holds numbers; for classes (words too) take "
        "loss: {use: cross_entropy} and validators: [{use: classification}]",
    ),
    "data:tokens": (
        "inputs that are tokens",
        "take data: {use: text} or {use: chat}, or data.with.input: tokens; a model for numbers "
        "is model: {use: mlp}",
    ),
    "data:features": (
        "inputs that are numbers",
        "data.with.input: features; a model for tokens is model: {use: llama_decoder}",
    ),
    "data:text": ("data whose tokens can be written as text", "take data: {use: text}"),
    "model:quantized": ("weights of few bits, and nothing here quantizes them", _BITNET),
    "model:ternary": (
        "weights of three levels",
        "take quantizer: {use: bitnet}, with its own weight_bits of 1.58",
    ),
    "model:binary": ("weights of two levels", f"{_BITNET[:-1]}, with: {{weight_bits: 1}}}}"),
    "model:adapters": ("adapters to write", "add wrappers: [{use: lora}]"),
    "model:llama_cpp": (
        "a network that llama.cpp computes",
        "take model: {use: llama_decoder}, or model: {use: transformers} of a Llama",
    ),
    "model:transformers": (
        "a network that the library transformers knows",
        "take model: {use: llama_decoder} or {use: transformers}; exporters: [{use: state_dict}] "
        "writes any network",
    ),
    "model:rows_of_256": (
        "weights whose rows are multiples of 256",
        "set the model's widths (model.with.width and hidden) to multiples of 256",
    ),
    "model:columns_of_4": (
        "weights whose columns are multiples of 4",
        "set the model's widths (model.with.width and hidden) to multiples of 4",
    ),
    "model:packed_sequences": (
        "a network that keeps several texts in a sequence apart",
        "take model: {use: llama_decoder}, or put one text into a sequence (packing: false, "
        "document_mask: false)",
    ),
    "file:metrics.jsonl": (
        "the file metrics.jsonl, which nothing here writes",
        "add an observer: observers: [{use: metrics_jsonl}]",
    ),
    **{
        f"phase:{name}": (
            f"the phase '{name}' of training, which nothing here announces",
            "add phases: {use: grokfast}",
        )
        for name in ("warmup", "acceleration", "consolidation", "refinement")
    },
}
