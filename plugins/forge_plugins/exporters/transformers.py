"""The network as a folder that the transformers library loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from safetensors import torch as safetensors_torch

    from forge_plugins.clients import verification
    from forge_plugins.interchange import tokenizer_files, transformers_folder
else:
    torch = LazyModule("torch")
    safetensors_torch = LazyModule("safetensors.torch")
    verification = LazyModule("forge_plugins.clients.verification")
    tokenizer_files = LazyModule("forge_plugins.interchange.tokenizer_files")
    transformers_folder = LazyModule("forge_plugins.interchange.transformers_folder")

WORST = {"float32": 1e-2, "bfloat16": 0.2}  # relative L2; more is another function, not rounding


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """Layout and precision."""

    layout: Annotated[
        Literal["bitlinear", "autobitlinear", "online"],
        Meta(
            description="bitlinear: packed, the portable one; autobitlinear: packed, unpacked once "
            "on loading; online: latent weights, quantized in each forward pass, bit for bit as "
            "in training, and trainable there"
        ),
    ] = "bitlinear"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Meta(description="of all that is not packed, and of the client's arithmetic"),
    ] = "float32"
    verify: Annotated[
        bool, Meta(description="load the folder in transformers, where installed, and compare")
    ] = True


def requirements(config: TransformersConfig) -> tuple[str, ...]:
    """Rows must fill the packed layouts."""
    needs = ("model:ternary", "model:llama")
    return needs if config.layout == "online" else (*needs, "model:columns_of_4")


class Transformers:
    """The network as a folder that the transformers library loads.

    Writes weights, `config.json` and the tokenizer, then asks transformers for its logits.
    """

    info = PluginInfo(
        name="transformers",
        kind=Kind.EXPORTERS,
        config=TransformersConfig,
        requires=requirements,
        alternatives="packed_ternary and state_dict (weights: applied) hold any levels, and "
        "state_dict any network",
    )

    def __init__(self, config: TransformersConfig) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """Another architecture, and layers that the client does not have."""
        try:
            _ = transformers_folder.check_folder(run.model, self.config.layout)
        except ValueError as error:
            return str(error)
        return None

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the folder and load it again.

        Raises:
            PluginError: the model is of another architecture or has no ternary layer, or the
                client computes something else.
        """
        config = self.config
        tokenizer = getattr(run.data, "tokenizer", None)
        end = None if tokenizer is None else tokenizer.end
        try:
            model = transformers_folder.check_folder(run.active_model, config.layout)
            tensors = transformers_folder.folder_tensors(
                model, config.layout, getattr(torch, config.dtype)
            )
            about = transformers_folder.folder_config(model, config.layout, config.dtype, end)
        except ValueError as error:
            raise PluginError(f"transformers: {error}") from error
        file = folder / "model.safetensors"
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        stored = safetensors_torch.load_file(file)
        wrong = transformers_folder.wrong_tensors(model, config.layout, tensors, stored)
        if wrong:
            raise PluginError(f"transformers: {wrong[0]} came back from {file} with other values")
        files = {"config.json": about}
        if tokenizer is not None:
            files |= tokenizer_files.transformers_files(tokenizer)
            files["generation_config.json"] = {"bos_token_id": end, "eos_token_id": end}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return {
            "format": f"transformers {config.layout}",
            "architecture": about["architectures"][0],
            "dtype": config.dtype,
            "step": run.progress.step,
            "bytes": file.stat().st_size,
            "verified": self._verified(run, folder),
        }

    def _verified(self, run: Run, folder: Path) -> dict[str, Any]:
        if not self.config.verify:
            return verification.NOT_ASKED
        inputs = verification.sample_inputs(run.data.validation(), 4, 64)
        return verification.verify(
            verification.TRANSFORMERS,
            folder,
            inputs,
            run.active_model,
            worst=WORST[self.config.dtype],
        )
