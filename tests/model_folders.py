"""Tiny model folders of transformers, made by its own classes, and pipelines that train them."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from clients import need
from safetensors.torch import load_file, save_file

VOCABULARY = 260  # bytes, and what ends a text
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ENCODER = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SIZES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_SIZES, "head_dim": 8}),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**_SIZES, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", _SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _SIZES),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "bitnet": ("BitNetForCausalLM", "BitNetConfig", {**_SIZES, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_SIZES, "num_local_experts": 4}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 5}),
    "bert_tokens": ("BertForTokenClassification", "BertConfig", {**_ENCODER, "num_labels": 5}),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_channels": 1,
            "num_labels": 10,
        },
    ),
}  # fmt: skip
"""The class, its configuration's class, and sizes."""
PACKED = ("bitnet_online", "bitnet_bitlinear", "bitnet_autobitlinear")
TIED = ("qwen2", "gemma3", "gpt2", "bitnet")
TEXT_DATA = "data={use: text, with: {sequence_length: 16, batch_size: 4, validation_split: 0.001}}"


def library() -> Any:
    """The transformers library, imported without its remarks on what is not installed."""
    need("transformers", "accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def make_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A model folder with random weights.

    Args:
        folder: to be made.
        family: one of FAMILIES or PACKED.
        changes: of the configuration's sizes.
    """
    transformers = library()
    kind = family.partition("_")[0] if family in PACKED else family
    cls, config, sizes = FAMILIES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **changes}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    if family in PACKED:
        _pack(folder, family.removeprefix("bitnet_"))
    return folder


def _pack(folder: Path, layout: str) -> None:
    """Turn a folder of BitNet into one whose linear layers are packed, or quantized online."""
    from forge_plugins.mathematics.quantization.packing import pack_two_bits
    from forge_plugins.mathematics.quantization.quantizers import ternary_levels, ternary_scale

    state = load_file(folder / "model.safetensors")
    about: dict[str, Any] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    if layout != "bitlinear":
        about["linear_class"] = "autobitlinear"
        about["quantization_mode"] = "online" if layout == "online" else "offline"
    for name in [name for name in state if name.endswith("_proj.weight")]:
        if layout != "online":
            weight, scale = state[name], ternary_scale(state[name])
            levels = ternary_levels(weight, scale).to(torch.int8)
            state[name] = pack_two_bits(levels).view(len(weight) // 4, -1)
            state[f"{name}_scale"] = (scale if layout == "bitlinear" else 1 / scale).reshape(1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=about)


def edit_config(folder: Path, **changes: Any) -> None:
    """Set entries of `config.json`; None takes one away."""
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )


def data_settings(family: str, folder: Path) -> str:
    """The `data` section that a family's tiny model can be trained on."""
    if family == "vit":
        return "data={use: file, with: {batch_size: 8}}"
    if not family.startswith("bert"):
        return TEXT_DATA
    file = folder / "samples.jsonl"
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (64, 12), generator=generator).tolist()
    if family == "bert":
        rows = [{"input": row, "target": row[0] % 5} for row in tokens]
    else:
        rows = [{"input": row, "target": [-100, *(one % 5 for one in row[1:])]} for row in tokens]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"data={{use: file, with: {{path: {file}, input: tokens, target: class, batch_size: 8}}}}"
    )


def settings(family: str, model: Path, place: Path, *more: str) -> list[str]:
    """Settings over the smoke pipeline that train a tiny model of a family, ternary, 20 steps."""
    return [
        "run={name: tiny, seed: 3, device: cpu, max_steps: 20, log_every: 5, save_every: 10}",
        data_settings(family, place), f"model={{use: transformers, with: {{path: {model}}}}}",
        "quantizer={use: bitnet}", "optimizer={use: adamw, with: {lr: 0.003}}",
        "loss={use: cross_entropy}",
        *(f"{section}=null" for section in ("schedule", "gradients", "validators", "callbacks",
                                            "observers", "exporters")),
        *more,
    ]  # fmt: skip


def has_library() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None
