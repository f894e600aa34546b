"""CPU time of a generated token, beside transformers' own `generate` on the same model.

    python benchmarks/generation_speed.py [--rounds 9] [--tokens 64]

One Llama from a folder: written by transformers' `generate` with its cache, and by the reader that
`forge generate` uses; our own Llama of the same sizes beside them. All choose the likeliest token,
and the first two must write the same. Rounds are interleaved; the median of the ratios counts.
Mark: at most 1.0 of transformers' own.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.text.generation import (
    LlamaReader,
    Sampling,
    TransformersReader,
    written,
)

MARK = 1.0
SIZES = {
    "vocab_size": 16384, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512,
}  # fmt: skip
PROMPT = 32


def models() -> tuple[Any, Llama]:
    """transformers' network and ours, of the same sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=None)).eval()
    shape = LlamaShape(
        vocabulary=SIZES["vocab_size"], context=512, width=576, layers=10, heads=9, groups=3,
        hidden=1536,
    )  # fmt: skip
    return theirs, Llama(shape).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    theirs, ours = models()
    prompt = torch.randint(SIZES["vocab_size"], (PROMPT,))
    count, choice = options.tokens, Sampling()

    def generate() -> list[int]:
        asked = {"attention_mask": torch.ones(1, PROMPT, dtype=torch.long), "do_sample": False}
        with torch.no_grad():
            result = theirs.generate(prompt[None], max_new_tokens=count, **asked)
        return result[0, PROMPT:].tolist()

    writers: dict[str, Callable[[], list[int]]] = {
        "generate": generate,
        "reader": lambda: list(written(TransformersReader(theirs), prompt, count, choice)),
        "llama": lambda: list(written(LlamaReader(ours, PROMPT + count), prompt, count, choice)),
    }
    first = {name: writer() for name, writer in writers.items()}
    assert first["generate"] == first["reader"], "another text is measured"
    ratios: dict[str, list[float]] = {"reader": [], "llama": []}
    for _ in range(options.rounds):
        seconds = {}
        for name, writer in writers.items():
            begun = time.process_time()
            writer()
            seconds[name] = time.process_time() - begun
        for name, values in ratios.items():
            values.append(seconds[name] / seconds["generate"])
    said = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f} of transformers' generate ({said})")
    return int(statistics.median(ratios["reader"]) > MARK)


if __name__ == "__main__":
    sys.exit(main())
