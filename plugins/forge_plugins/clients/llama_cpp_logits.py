"""Log-probabilities of a GGUF file by llama.cpp (through the wheel xllamacpp)."""

from __future__ import annotations

import os
import sys
from typing import Any


def server_of(file: str, context: int) -> Any:
    """llama.cpp with a file loaded, on one thread."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = file
    options.n_ctx = max(64, context)
    options.n_parallel = 1
    options.warmup = False
    options.cpuparams.n_threads = 1
    options.cpuparams_batch.n_threads = 1
    # a cache and an attention in full precision: the file is judged, not the cache
    # all keys of a sliding window's layers: of the cut cache, a second sample gets other logits
    options.swa_full = True
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)


def next_row(server: Any, prompt: list[int], classes: int) -> list[float]:
    """Log-probabilities of the token behind a prompt.

    The server reports them beside a generated token, and only when that token is whole text (a
    first byte of UTF-8 is not). A bias picks which one is generated; what is reported is of the
    logits before it.
    """
    for forced in range(97, 97 + classes):
        asked = {
            "prompt": prompt, "n_predict": 1, "n_probs": classes, "cache_prompt": True,
            "temperature": 0.0, "logit_bias": [[forced % classes, 1e4]],
        }  # fmt: skip
        reply = server.handle_completions(asked)
        if "choices" not in reply:
            sys.exit(f"llama.cpp refused the prompt: {reply}")
        result = reply["choices"][0]["logprobs"]
        if result is not None:
            row = [float("nan")] * classes
            for item in result["content"][0]["top_logprobs"]:
                row[item["id"]] = item["logprob"]
            return row
    sys.exit("llama.cpp reports no probabilities")


def main(file: str, request: str, answer: str) -> None:
    """Load, run each prefix of each sample, write."""
    import torch
    from safetensors.torch import load_file, save_file

    asked = load_file(request)
    inputs, classes = asked["inputs"], int(vocabulary_of(file))
    server = server_of(file, inputs.shape[1] + 8)
    rows = [
        [next_row(server, sample[: end + 1], classes) for end in range(len(sample))]
        for sample in inputs.tolist()
    ]
    save_file({"logits": torch.tensor(rows)}, answer)


def vocabulary_of(file: str) -> int:
    """The size of the vocabulary, from the first dimension of the embedding's description."""
    import struct
    from pathlib import Path

    raw = Path(file).read_bytes()
    name = b"token_embd.weight"
    place = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    dimensions = struct.unpack_from("<I", raw, place)[0]
    return int(struct.unpack_from(f"<{dimensions}Q", raw, place + 4)[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the answer is written: llama.cpp's server may wait for ever for its own threads
