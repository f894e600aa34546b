"""The ternary network with two bits for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics import bitnet, packed_file
else:
    torch = LazyModule("torch")
    bitnet = LazyModule("forge_plugins.mathematics.bitnet")
    packed_file = LazyModule("forge_plugins.mathematics.packed_file")


@dataclass(frozen=True, kw_only=True)
class PackedTernaryConfig:
    """No settings: the layout is fixed by its name in the file."""


class PackedTernary:
    """Writes `model.safetensors` in the layout of `packed_file` and unpacks it to compare."""

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
        model = run.active_model
        tensors, shapes = packed_file.pack_model(model)
        if not shapes:
            raise PluginError(
                "packed_ternary: the model has no ternary layer; add a quantizer, or export "
                "with state_dict"
            )
        file = folder / "model.safetensors"
        packed_file.write_packed(file, tensors, shapes)
        again = packed_file.read_packed(file)
        latent = model.state_dict()
        for name in shapes:
            applied = bitnet.quantize_weight(latent[name].float()).cpu()
            if not torch.equal(again[name], applied):
                raise PluginError(f"packed_ternary: {name} came back from {file} with other values")
        weights = sum(latent[name].numel() for name in shapes)
        packed = sum(tensors[f"{name}.levels"].numel() for name in shapes)
        return {
            "format": packed_file.LAYOUT,
            "step": run.progress.step,
            "ternary_weights": weights,
            "ternary_bytes": packed,
            "bytes": file.stat().st_size,
            "bytes_fp32": sum(tensor.numel() * 4 for tensor in latent.values()),
            "verified": {"unpacked_bit_equal": True},
        }
