"""A folder of the transformers library, or of PEFT, opened as what a run has learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from forge_kernel.api import ConfigError, DataSpec, Fault, TrainedRun
from forge_plugins.interchange.model_folder import FolderError, read_model_folder
from forge_plugins.mathematics.quantization.fixed_linear import fix_quantized
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer


def open_folder(folder: Path, device: torch.device) -> TrainedRun:
    """The model of a folder, with its tokenizer.

    Args:
        folder: with `config.json` and weights; or adapters (`adapter_config.json`), whose base is
            opened with them.
        device: where the model is to compute.

    Raises:
        ConfigError: the folder is no model that can be loaded.
    """
    from forge_plugins.interchange.adapters.peft_folder import CONFIG, read_adapter, set_adapters

    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return _opened(folder, device)
    try:
        stored = read_adapter(folder)
        base = _opened(stored.base, device)
        set_adapters(base.model, stored, folder)
    except FolderError as error:
        raise ConfigError([Fault(str(error))]) from error
    return replace(base, folder=folder)


def _opened(folder: Path, device: torch.device) -> TrainedRun:
    """The model of a folder that has one itself.

    Raises:
        ConfigError: the folder is no model that can be loaded.
    """
    from forge_plugins.interchange.transformers_model import load_model, prepare_inputs

    try:
        about = read_model_folder(str(folder), None)
        model = load_model(about, seed=0).model
    except ImportError as error:
        message = f"{folder} is opened by transformers, which is not installed"
        hint = "pip install 'forge-kernel[transformers]'"
        raise ConfigError([Fault(message, hints=(hint,))]) from error
    except FolderError as error:
        raise ConfigError([Fault(str(error))]) from error
    prepare_inputs(model, about)
    tokenizer = None
    file = folder / "tokenizer.json"
    if about.task == "causal_lm" and file.is_file():
        tokenizer = LibraryTokenizer(file.read_text(encoding="utf-8"))
    size = about.vocabulary
    spec = DataSpec(vocabulary=size, sequence=about.longest)
    model = fix_quantized(model).to(device).eval()
    return TrainedRun(folder=folder, model=model, spec=spec, tokenizer=tokenizer)
