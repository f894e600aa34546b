"""Models of the transformers library that llama.cpp computes too: which, and by what names.

Known without torch and without that library, so that a plan can tell. From llama.cpp's
`src/models/*.cpp` and its converter: what an architecture adds, turns or has no place for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_OUTER: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ATTENTION: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_FEED: Final = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS: Final = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_PLAIN: Final = {**_NORMS, **_ATTENTION, **_FEED}
_HEAD_NORMS: Final = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_BLOCK: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Family:
    """One of llama.cpp's architectures, for models of one class of transformers.

    Args:
        architecture: its name there.
        model_class: of transformers.
        names: of a block's modules there, by those of transformers.
        activation: of the perceptron that it computes.
        turned: whether it turns neighbouring pairs of a query, not the halves of a head.
        square: whether the heads together are as wide as the model.
        biases: beginnings of the modules, in a block, that may have a bias.
        own_head: whether it can have a head that is not the embedding.
        norm_offset: what is added to a norm's weight.
        windowed: whether its layers can have a sliding window.
        partial_rotary: whether a part of a head only may be turned.
        scale_tensors: whether a weight's scale can stand in a tensor of its own.
    """

    architecture: str
    model_class: str
    names: Mapping[str, str]
    activation: str = "silu"
    turned: bool = False
    square: bool = False
    biases: tuple[str, ...] = ()
    own_head: bool = True
    norm_offset: float = 0.0
    windowed: bool = False
    partial_rotary: bool = False
    scale_tensors: bool = True

    def tensor_name(self, module: str) -> str | None:
        """llama.cpp's name of a module of transformers, or None: it has none."""
        block = _BLOCK.fullmatch(module)
        if block is None:
            return _OUTER.get(module)
        own = self.names.get(block[2])
        return None if own is None else f"blk.{block[1]}.{own}"


def _llama(model_class: str, biases: tuple[str, ...]) -> Family:
    return Family("llama", model_class, _PLAIN, turned=True, biases=biases)


FAMILIES: Final[dict[str, Family]] = {
    "llama": _llama("LlamaForCausalLM", ("self_attn.", "mlp.")),
    "mistral": _llama("MistralForCausalLM", ()),
    "qwen2": Family(
        "qwen2", "Qwen2ForCausalLM", _PLAIN, square=True, scale_tensors=False,
        biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**_PLAIN, **_HEAD_NORMS}),
    "gemma3_text": Family(
        "gemma3", "Gemma3ForCausalLM",
        {
            **_PLAIN, **_HEAD_NORMS, "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
        },
        activation="gelu_pytorch_tanh", norm_offset=1.0, windowed=True, scale_tensors=False,
    ),
    "phi3": Family(
        "phi3", "Phi3ForCausalLM",
        {
            **_NORMS, "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        },
        square=True, partial_rotary=True, scale_tensors=False,
    ),
    "bitnet": Family(
        "bitnet", "BitNetForCausalLM",
        {
            **_PLAIN, "self_attn.attn_sub_norm": "attn_sub_norm",
            "mlp.ffn_sub_norm": "ffn_sub_norm",
        },
        square=True, own_head=False,
    ),
}  # fmt: skip
"""By the library's `model_type`."""
_ACTIVATIONS: Final = {"gemma3_text": "gelu_pytorch_tanh", "bitnet": "relu2"}
"""What a configuration that names no activation means; silu else."""


def activation_of(config: Mapping[str, Any]) -> str:
    """The activation of a model, from its `config.json`."""
    named = config.get("hidden_act", config.get("hidden_activation"))
    return str(named or _ACTIVATIONS.get(str(config.get("model_type")), "silu"))


def is_computed(config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp computes what a model with this `config.json` does, as far as it tells."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and activation_of(config) == family.activation
