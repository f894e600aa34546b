"""The network on few levels with as few bits for each weight as its levels need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch

    from forge_plugins.interchange import grid_weight, packed_ternary, safetensors_state
    from forge_plugins.mathematics.optimizers import tied_tensors
else:
    torch = LazyModule("torch")
    grid_weight = LazyModule("forge_plugins.interchange.grid_weight")
    packed_ternary = LazyModule("forge_plugins.interchange.packed_ternary")
    safetensors_state = LazyModule("forge_plugins.interchange.safetensors_state")
    tied_tensors = LazyModule("forge_plugins.mathematics.optimizers.tied_tensors")


@dataclass(frozen=True, kw_only=True)
class PackedTernaryConfig:
    """How the levels are packed."""

    layout: Annotated[
        Literal["two_bits", "base_three"],
        Meta(
            description="of weights on -1, 0, 1: four in a byte, or five (a fifth smaller, slower "
            "to unpack); others take the bits that they need: 1, 4 or 8"
        ),
    ] = "two_bits"


class PackedTernary:
    """The network on few levels with as few bits for each weight as its levels need.

    Writes `model.safetensors` in a layout of `packed_file` and unpacks it to compare. Ternary
    weights take two bits, or five of them a byte; weights of 1, 4 and 8 bits take these.
    """

    info = PluginInfo(
        name="packed_ternary",
        kind=Kind.EXPORTERS,
        config=PackedTernaryConfig,
        requires=("model:quantized",),
    )

    def __init__(self, config: PackedTernaryConfig) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """A network without levels, or tensors that the file cannot hold."""
        try:
            _ = grid_weight.need_grid_layers(run.model)
        except ValueError as error:
            return str(error)
        reason = safetensors_state.unwritable(run.model.state_dict())
        return reason and f"{reason}; export with phase6"

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Pack, write, unpack, compare bit for bit.

        Raises:
            PluginError: the model has no quantized layer or is not on its levels yet, or the file
                gave other weights back.
        """
        model, layout = run.active_model, self.config.layout
        try:
            tensors, contents = packed_ternary.pack_model(model, layout)
        except ValueError as error:
            raise PluginError(f"packed_ternary: {error}") from error
        file = folder / "model.safetensors"
        packed_ternary.write_packed(file, tensors, contents, layout)
        again = packed_ternary.read_packed(file)
        applied = grid_weight.applied_state(model)
        for name, tensor in again.items():
            # a level of 0 may have been a -0.0
            packed = contents.ties.get(name, name) in contents.weights
            same = torch.equal if packed else tied_tensors.same_bits
            if tensor.dtype is not applied[name].dtype or not same(tensor, applied[name].cpu()):
                raise PluginError(f"packed_ternary: {name} came back from {file} with other values")
        weights = contents.weights
        return {
            "format": packed_ternary.layout_name(contents, layout),
            "packings": sorted({item.packing for item in weights.values()}),
            "step": run.progress.step,
            # of all that is packed; the names are those of the first such manifests
            "ternary_weights": sum(applied[name].numel() for name in weights),
            "ternary_bytes": sum(tensors[f"{name}.levels"].numel() for name in weights),
            "tied": dict(contents.ties),
            "left_out": list(contents.left_out),
            "bytes": file.stat().st_size,
            "bytes_fp32": tied_tensors.bytes_in_fp32({name: applied[name] for name in again}),
            "verified": {"unpacked_bit_equal": True},
        }
