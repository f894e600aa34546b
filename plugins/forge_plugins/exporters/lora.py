"""Adapters of low rank as a folder that the PEFT library loads, or added to the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from safetensors import torch as safetensors_torch
    from torch import Tensor

    from forge_plugins.clients import verification
    from forge_plugins.interchange import pretrained_folder, safetensors_state
    from forge_plugins.interchange.adapters import peft_folder
    from forge_plugins.mathematics.networks import low_rank_adapter
    from forge_plugins.mathematics.optimizers import tied_tensors
else:
    safetensors_torch = LazyModule("safetensors.torch")
    verification = LazyModule("forge_plugins.clients.verification")
    peft_folder = LazyModule("forge_plugins.interchange.adapters.peft_folder")
    pretrained_folder = LazyModule("forge_plugins.interchange.pretrained_folder")
    safetensors_state = LazyModule("forge_plugins.interchange.safetensors_state")
    low_rank_adapter = LazyModule("forge_plugins.mathematics.networks.low_rank_adapter")
    tied_tensors = LazyModule("forge_plugins.mathematics.optimizers.tied_tensors")

WORST: Final = 1e-2  # relative L2; more is another function, not rounding


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Apart from the model, or one with it."""

    layout: Annotated[
        Literal["adapter", "merged"],
        Meta(description="adapter: PEFT's folder, which names the model's own; merged: the model "
             "with the adapters added to its weights, where these are on no levels"),
    ] = "adapter"  # fmt: skip
    verify: Annotated[
        bool, Meta(description="load the folder in its program, where installed, and compare")
    ] = True


class Lora:
    """Adapters of low rank as a folder that the PEFT library loads, or added to the weights.

    PEFT reads them beside the folder of transformers that the model came from, packed ones of the
    layout autobitlinear too. Merged, a model of transformers is a folder of its own kind; any other
    is one file with the weights by the names that it has without adapters.
    """

    info = PluginInfo(
        name="lora",
        kind=Kind.EXPORTERS,
        config=LoraConfig,
        requires=("model:adapters",),
        alternatives="wrappers: [{use: lora}] sets adapters in",
    )

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """Weights that cannot hold the sum; a base that is none that a folder has."""
        try:
            if self.config.layout == "merged":
                low_rank_adapter.check_mergeable(run.model)
            else:
                peft_folder.check_base(run.model)
        except ValueError as error:
            return str(error)
        return None

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the folder, read it back and ask its program.

        Raises:
            PluginError: the file gave other tensors back, or the program computes something else.
        """
        write = self._merged if self.config.layout == "merged" else self._apart
        return {"step": run.progress.step, **write(run, folder)}

    def _apart(self, run: Run, folder: Path) -> dict[str, Any]:
        model = run.active_model
        tensors, about = peft_folder.adapter_tensors(model), peft_folder.adapter_config(model)
        file = folder / peft_folder.WEIGHTS
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        _compare(tensors, safetensors_torch.load_file(file), file)
        (folder / peft_folder.CONFIG).write_text(_as_json(about), encoding="utf-8")
        unread = peft_folder.unread_by_peft(model)
        return {
            "format": "PEFT LoRA",
            "base": about["base_model_name_or_path"],
            "layers": len(about["target_modules"]),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "bytes": file.stat().st_size,
            "verified": verification.not_verified(unread)
            if unread
            else self._verified(run, folder, verification.PEFT),
        }

    def _merged(self, run: Run, folder: Path) -> dict[str, Any]:
        model = run.active_model
        try:
            state = low_rank_adapter.merged_state(model)
        except ValueError as error:
            raise PluginError(f"lora: {error}") from error
        file = folder / "model.safetensors"
        result = {"format": "safetensors", "tensors": len(state)}
        if pretrained_folder.is_pretrained_model(model):
            tensors = pretrained_folder.plain_tensors(model, state)
            safetensors_torch.save_file(tensors, file, {"format": "pt"})
            about = pretrained_folder.plain_config(model)
            files = {**pretrained_folder.kept_files(model), "config.json": _as_json(about).encode()}
            for name, content in files.items():
                (folder / name).write_bytes(content)
            again = safetensors_torch.load_file(file)
            verified = self._verified(run, folder, verification.TRANSFORMERS)
            result = {"format": "transformers", "architecture": about["architectures"][0]}
        else:
            tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            _ = safetensors_state.write_state(file, tensors)
            again = safetensors_state.read_state(file)
            verified = {"read_back_bit_equal": True}
        _compare(tensors, again, file)
        return {**result, "bytes": file.stat().st_size, "verified": verified}

    def _verified(self, run: Run, folder: Path, client: verification.Client) -> dict[str, Any]:
        if not self.config.verify:
            return verification.NOT_ASKED
        length = None if run.data.spec.features is not None else 64  # of tokens
        inputs = verification.sample_inputs(run.data.validation(), 4, length)
        return verification.verify(client, folder, inputs, run.active_model, worst=WORST)


def _compare(meant: Mapping[str, Tensor], stored: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a file that gives other tensors back.

    Raises:
        PluginError: one is another; it is named.
    """
    for name, tensor in meant.items():
        if name not in stored or not tied_tensors.same_bits(stored[name], tensor):
            raise PluginError(f"lora: {name} came back from {file} with other values")


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
