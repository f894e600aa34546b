"""Logits of a folder by transformers, or what it makes of targets."""

from __future__ import annotations

import sys
from typing import Any


def answer_by(model: Any, config: Any, request: str, answer: str) -> None:
    """Run a model of transformers, or one that a library has put round it, and write.

    Args:
        model: gives an object with `logits`.
        config: of the model; tells how images of rows of numbers are shaped.
        request: the file that asks; see `target_answers`.
        answer: the file to write.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from forge_plugins.clients.target_answers import answers_by_logits

    size = getattr(config, "image_size", None)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        if size is not None and inputs.is_floating_point() and inputs.ndim == 2:
            sides = size if isinstance(size, list | tuple) else (size, size)
            inputs = inputs.view(-1, config.num_channels, *sides)
        with torch.no_grad():
            result: torch.Tensor = model(inputs).logits
        return result

    save_file(answers_by_logits(load_file(request), logits), answer)


def prepare() -> None:
    """The library's quantizers are decorated with torch.compile: minutes for nothing."""
    import torch

    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)


def main(folder: str, request: str, answer: str) -> None:
    """Load, run, write."""
    import transformers

    prepare()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model, loading = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, output_loading_info=True, dtype="auto", local_files_only=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    if wrong:
        sys.exit(f"the weights do not fit the network: {wrong}")
    answer_by(model.eval(), config, request, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
