"""Logits of a folder by transformers."""

from __future__ import annotations

import sys


def main(folder: str, request: str, answer: str) -> None:
    """Load, run, write."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    # the client's quantizers are decorated with torch.compile: minutes for nothing
    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto", local_files_only=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    if wrong:
        sys.exit(f"the weights do not fit the network: {wrong}")
    with torch.no_grad():
        logits = model.eval()(load_file(request)["inputs"]).logits
    save_file({"logits": logits.float().contiguous()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
