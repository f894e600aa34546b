"""The ternary network with two bits for each weight, or five weights in a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics import packed_file, ternary_layers
else:
    torch = LazyModule("torch")
    packed_file = LazyModule("forge_plugins.mathematics.packed_file")
    ternary_layers = LazyModule("forge_plugins.mathematics.ternary_layers")


@dataclass(frozen=True, kw_only=True)
class PackedTernaryConfig:
    """How the levels are packed."""

    layout: Annotated[
        Literal["two_bits", "base_three"],
        Meta(description="four weights in a byte, or five (a fifth smaller, slower to unpack)"),
    ] = "two_bits"


class PackedTernary:
    """The ternary network with two bits for each weight, or five weights in a byte.

    Writes `model.safetensors` in a layout of `packed_file` and unpacks it to compare.
    """

    info = PluginInfo(
        name="packed_ternary",
        kind=Kind.EXPORTERS,
        config=PackedTernaryConfig,
        requires=("model:ternary",),
    )

    def __init__(self, config: PackedTernaryConfig) -> None:
        self.config = config

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Pack, write, unpack, compare bit for bit.

        Raises:
            PluginError: the model has no ternary layer, or the file gave other weights back.
        """
        model, layout = run.active_model, self.config.layout
        try:
            tensors, shapes = packed_file.pack_model(model, layout)
        except ValueError as error:
            raise PluginError(f"packed_ternary: {error}") from error
        file = folder / "model.safetensors"
        packed_file.write_packed(file, tensors, shapes, layout)
        again = packed_file.read_packed(file)
        for name, layer in ternary_layers.ternary_layers(model).items():
            weight = f"{name}.weight" if name else "weight"
            if not torch.equal(again[weight], layer.applied_weight().float().cpu()):
                raise PluginError(
                    f"packed_ternary: {weight} came back from {file} with other values"
                )
        latent = model.state_dict()
        packed = sum(tensors[f"{name}.levels"].numel() for name in shapes)
        return {
            "format": packed_file.LAYOUTS[layout],
            "step": run.progress.step,
            "ternary_weights": sum(latent[name].numel() for name in shapes),
            "ternary_bytes": packed,
            "bytes": file.stat().st_size,
            "bytes_fp32": sum(tensor.numel() * 4 for tensor in latent.values()),
            "verified": {"unpacked_bit_equal": True},
        }
