"""The model's tensors in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from safetensors import torch as safetensors_torch
else:
    torch = LazyModule("torch")
    safetensors_torch = LazyModule("safetensors.torch")


@dataclass(frozen=True, kw_only=True)
class StateDictConfig:
    """Precision of the file."""

    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        Meta(description="of floating tensors in the file"),
    ] = "keep"


class StateDict:
    """Latent weights as trained, by the model's own names."""

    info = PluginInfo(name="state_dict", kind=Kind.EXPORTERS, config=StateDictConfig)

    def __init__(self, config: StateDictConfig) -> None:
        self.config = config

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write `model.safetensors` and read it back to compare."""
        file = folder / "model.safetensors"
        tensors = {
            name: self._converted(tensor) for name, tensor in run.active_model.state_dict().items()
        }
        safetensors_torch.save_file(tensors, file)
        again = safetensors_torch.load_file(file)
        equal = all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        return {
            "format": "safetensors",
            "step": run.progress.step,
            "tensors": len(tensors),
            "bytes": file.stat().st_size,
            "verified": {"read_back_bit_equal": equal},
        }

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu")
        if self.config.dtype != "keep" and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, self.config.dtype))
        return tensor.contiguous().clone()
