"""What llama.cpp makes of targets: how likely it finds each, and what it would have answered."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any, Final

from forge_plugins.clients.llama_cpp_logits import next_row, server_of, vocabulary_of

_CONTEXT: Final = b".context_length" + struct.pack("<I", 4)
"""The end of an entry's name, and the type of its value, uint32."""


def _with_room(file: str, tokens: int, place: Path) -> str:
    """The file, or a copy whose context holds so many tokens.

    llama.cpp takes a prompt only with a place left for the token behind it. What is behind the last
    token of a whole sequence is asked too; the number itself changes nothing that is computed.
    """
    content = bytearray(Path(file).read_bytes())
    begin = content.index(_CONTEXT) + len(_CONTEXT)
    (context,) = struct.unpack_from("<I", content, begin)
    if context >= tokens:
        return file
    struct.pack_into("<I", content, begin, tokens)
    place.write_bytes(content)
    return str(place)


def _asked_for(server: Any, prompt: list[int], target: int, classes: int) -> tuple[float, int]:
    """Log-probability of the target behind a prompt, and the likeliest token.

    A bias makes the target the token that is generated; what is reported of it, and of the
    likeliest, is of the logits before the bias. Of a token that is no whole text nothing is
    reported: then all are asked for beside another token.
    """
    request = {
        "prompt": prompt, "n_predict": 1, "n_probs": 1, "cache_prompt": True,
        "temperature": 0.0, "logit_bias": [[target, 1e4]],
    }  # fmt: skip
    reply = server.handle_completions(request)
    if "choices" not in reply:
        sys.exit(f"llama.cpp refused the prompt: {reply}")
    result = reply["choices"][0]["logprobs"]
    if result is not None and result["content"] and result["content"][0]["id"] == target:
        about = result["content"][0]
        return about["logprob"], about["top_logprobs"][0]["id"]
    row = next_row(server, prompt, classes)
    return row[target], max(range(classes), key=row.__getitem__)


def main(file: str, request: str, answer: str) -> None:
    """Load, ask for each target that stands behind tokens, write."""
    import torch
    from safetensors.torch import load_file, save_file

    from forge_plugins.clients.target_answers import questions_of

    questions = list(questions_of(load_file(request)))
    room = max(question.inputs.shape[1] for question in questions) + 8
    longer = Path(answer).with_name("longer.gguf")
    server, classes = server_of(_with_room(file, room, longer), room), vocabulary_of(file)
    result = {}
    for number, question in enumerate(questions):
        length = question.inputs.shape[1]
        targets = question.targets.view(len(question.targets), -1)
        places = question.positions
        if places is None:  # of all tokens, or of the last alone
            places = torch.arange(length - targets.shape[1], length)
        logprobs, tops = [], []
        for tokens, wanted in zip(question.inputs.tolist(), targets.tolist(), strict=True):
            for place, target in zip(places.tolist(), wanted, strict=True):
                if 0 <= target < classes:
                    logprob, top = _asked_for(server, tokens[: place + 1], target, classes)
                else:  # it counts for nothing
                    logprob, top = 0.0, 0
                logprobs.append(logprob)
                tops.append(top)
        result[f"logprob.{number}"] = torch.tensor(logprobs, dtype=torch.float64)
        result[f"top.{number}"] = torch.tensor(tops)
    save_file(result, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the answer is written: llama.cpp's server may wait for ever for its own threads
