"""Logits of a model with adapters by PEFT."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, request: str, answer: str) -> None:
    """Load the base and the adapters, run, write."""
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    from forge_plugins.clients.transformers_logits import answer_by, prepare

    prepare()
    about = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    place = about["base_model_name_or_path"]
    config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
    named = about["auto_mapping"] or {"base_model_class": config.architectures[0]}
    for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        if name.endswith(("score.weight", "classifier.weight")):  # a head of its own
            config.num_labels = len(tensor)
    base = getattr(transformers, named["base_model_class"]).from_pretrained(
        place, config=config, dtype=torch.float32, local_files_only=True
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    if getattr(config.get_text_config(), "pad_token_id", 0) is None:
        config.get_text_config().pad_token_id = -1  # none: the last token is read
    answer_by(model, config, request, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
