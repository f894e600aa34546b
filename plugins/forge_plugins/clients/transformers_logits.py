"""Logits of a folder by transformers, or what it makes of targets."""

from __future__ import annotations

import sys


def main(folder: str, request: str, answer: str) -> None:
    """Load, run, write."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from forge_plugins.clients.target_answers import answers_by_logits

    # the client's quantizers are decorated with torch.compile: minutes for nothing
    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model, loading = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, output_loading_info=True, dtype="auto", local_files_only=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    if wrong:
        sys.exit(f"the weights do not fit the network: {wrong}")
    model.eval()

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        if (
            model.main_input_name == "pixel_values" and inputs.ndim == 2
        ):  # images as rows of numbers
            size = config.image_size
            sides = size if isinstance(size, list | tuple) else (size, size)
            inputs = inputs.view(-1, config.num_channels, *sides)
        with torch.no_grad():
            result: torch.Tensor = model(inputs).logits
        return result

    save_file(answers_by_logits(load_file(request), logits), answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
