"""The network as a folder that the transformers library loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from safetensors import torch as safetensors_torch
    from torch import Tensor, nn

    from forge_plugins.clients import verification
    from forge_plugins.interchange import (
        grid_weight,
        pretrained_folder,
        tokenizer_files,
        transformers_folder,
    )
    from forge_plugins.mathematics.optimizers import tied_tensors
else:
    torch = LazyModule("torch")
    safetensors_torch = LazyModule("safetensors.torch")
    verification = LazyModule("forge_plugins.clients.verification")
    pretrained_folder = LazyModule("forge_plugins.interchange.pretrained_folder")
    grid_weight = LazyModule("forge_plugins.interchange.grid_weight")
    tied_tensors = LazyModule("forge_plugins.mathematics.optimizers.tied_tensors")
    tokenizer_files = LazyModule("forge_plugins.interchange.tokenizer_files")
    transformers_folder = LazyModule("forge_plugins.interchange.transformers_folder")

WORST = {"float32": 1e-2, "bfloat16": 0.2}  # relative L2; more is another function, not rounding


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """Layout and precision."""

    layout: Annotated[
        Literal["bitlinear", "autobitlinear", "online", "plain"],
        Meta(
            description="bitlinear: packed, the portable one; autobitlinear: packed, unpacked once "
            "on loading; online: latent weights, quantized in each forward pass, bit for bit as "
            "in training, and trainable there; plain: a network without a quantizer, its weights "
            "as they are"
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
    if config.layout == "plain":
        return ("model:transformers",)
    needs = ("model:ternary", "model:transformers")
    return needs if config.layout == "online" else (*needs, "model:columns_of_4")


class Transformers:
    """The network as a folder that the transformers library loads.

    Writes weights, `config.json` and the tokenizer, then asks transformers for its logits. A model
    of transformers goes back into its own architecture, with the tokenizer of its first folder.
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
        layout = self.config.layout
        try:
            if layout == "plain":
                grid_weight.check_plain(run.model)
                if not pretrained_folder.is_pretrained_model(run.model):
                    _ = transformers_folder.check_architecture(run.model)
            elif pretrained_folder.is_pretrained_model(run.model):
                pretrained_folder.check_pretrained_model(run.model, layout)
            else:
                _ = transformers_folder.check_folder(run.model, layout)
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
        config, model = self.config, run.active_model
        write = (
            self._written_back
            if pretrained_folder.is_pretrained_model(model)
            else self._written_anew
        )
        try:
            tensors, about, files, is_wrong = write(model, getattr(run.data, "tokenizer", None))
        except ValueError as error:
            raise PluginError(f"transformers: {error}") from error
        file = folder / "model.safetensors"
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        wrong = is_wrong(safetensors_torch.load_file(file))
        if wrong:
            raise PluginError(f"transformers: {wrong[0]} came back from {file} with other values")
        for name, content in {**files, "config.json": _as_json(about)}.items():
            (folder / name).write_bytes(content)
        return {
            "format": f"transformers {config.layout}",
            "architecture": about["architectures"][0],
            "dtype": config.dtype,
            "step": run.progress.step,
            "bytes": file.stat().st_size,
            "verified": self._verified(run, folder),
        }

    def _written_back(self, model: nn.Module, tokenizer: Any) -> _Written:
        """A model of the library: its own names, configuration and tokenizer."""
        del tokenizer
        layout, dtype = self.config.layout, self.config.dtype
        if layout == "plain":
            state = model.state_dict()
            tensors = pretrained_folder.plain_tensors(model, state, getattr(torch, dtype))
            about = pretrained_folder.plain_config(model) | {"dtype": dtype}
            return tensors, about, pretrained_folder.kept_files(model), _differing(tensors)
        tensors = pretrained_folder.pretrained_tensors(model, layout, getattr(torch, dtype))
        about = pretrained_folder.pretrained_config(model, layout, dtype)
        return (
            tensors, about, pretrained_folder.kept_files(model),
            lambda stored: pretrained_folder.wrong_names(model, layout, tensors, stored),
        )  # fmt: skip

    def _written_anew(self, model: nn.Module, tokenizer: Any) -> _Written:
        """A Llama of ours, and the data's tokenizer."""
        layout, dtype = self.config.layout, self.config.dtype
        end = None if tokenizer is None else tokenizer.end
        files: dict[str, bytes] = {}
        if tokenizer is not None:
            made = tokenizer_files.transformers_files(tokenizer)
            made["generation_config.json"] = {"bos_token_id": end, "eos_token_id": end}
            files = {name: _as_json(content) for name, content in made.items()}
        if layout == "plain":
            llama = transformers_folder.check_architecture(model)
            tensors = transformers_folder.plain_tensors(llama, getattr(torch, dtype))
            about = transformers_folder.plain_config(llama, dtype, end)
            return tensors, about, files, _differing(tensors)
        llama = transformers_folder.check_folder(model, layout)
        tensors = transformers_folder.folder_tensors(llama, layout, getattr(torch, dtype))
        return (
            tensors, transformers_folder.folder_config(llama, layout, dtype, end), files,
            lambda stored: transformers_folder.wrong_tensors(llama, layout, tensors, stored),
        )  # fmt: skip

    def _verified(self, run: Run, folder: Path) -> dict[str, Any]:
        if not self.config.verify:
            return verification.NOT_ASKED
        length = None if run.data.spec.features is not None else 64  # of tokens
        inputs = verification.sample_inputs(run.data.validation(), 4, length)
        return verification.verify(
            verification.TRANSFORMERS,
            folder,
            inputs,
            run.active_model,
            worst=WORST[self.config.dtype],
        )


_Written = tuple[
    "dict[str, Tensor]",
    dict[str, Any],
    dict[str, bytes],
    Callable[["dict[str, Tensor]"], list[str]],
]
"""Tensors, `config.json`, further files, and which of the tensors that were read are wrong."""


def _differing(tensors: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], list[str]]:
    """Names the tensors of a file that are not those that were written."""
    return lambda stored: [
        name for name, tensor in tensors.items()
        if name not in stored or not tied_tensors.same_bits(stored[name], tensor)
    ]  # fmt: skip


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
