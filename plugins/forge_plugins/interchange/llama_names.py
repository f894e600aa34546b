"""What other programs call the tensors of a `Llama`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

TRANSFORMERS: Final = {
    "token_embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.norm": "self_attn.attn_sub_norm",
    "attention.output": "self_attn.o_proj",
    "feed_norm": "post_attention_layernorm",
    "feed.gate": "mlp.gate_proj",
    "feed.up": "mlp.up_proj",
    "feed.norm": "mlp.ffn_sub_norm",
    "feed.down": "mlp.down_proj",
}
GGUF: Final = {
    "token_embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.norm": "attn_sub_norm",
    "attention.output": "attn_output",
    "feed_norm": "ffn_norm",
    "feed.gate": "ffn_gate",
    "feed.up": "ffn_up",
    "feed.norm": "ffn_sub_norm",
    "feed.down": "ffn_down",
}
_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)")


def translate(module: str, names: Mapping[str, str], block: str) -> str:
    """The name of a module in another program.

    Args:
        module: our name, such as `blocks.0.attention.query`.
        names: one of the tables above.
        block: what the other program calls a block, `"blk.{}"`.
    """
    result = _BLOCK.fullmatch(module)
    if result is None:
        return names[module]
    return f"{block.format(result[1])}.{names[result[2]]}"
