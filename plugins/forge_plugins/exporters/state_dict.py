"""The model's tensors in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from safetensors import torch as safetensors_torch

    from forge_plugins.mathematics import ternary_layers
else:
    torch = LazyModule("torch")
    safetensors_torch = LazyModule("safetensors.torch")
    ternary_layers = LazyModule("forge_plugins.mathematics.ternary_layers")


@dataclass(frozen=True, kw_only=True)
class StateDictConfig:
    """Which weights, in which precision."""

    weights: Annotated[
        Literal["latent", "applied"],
        Meta(
            description="of ternary layers: the ones that are trained, or the ones that are "
            "multiplied with, so that plain linear layers can take them"
        ),
    ] = "latent"
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        Meta(description="of floating tensors in the file"),
    ] = "keep"


class StateDict:
    """The model's tensors in one safetensors file.

    Weights as trained or as applied, by the model's own names.
    """

    info = PluginInfo(
        name="state_dict",
        kind=Kind.EXPORTERS,
        config=StateDictConfig,
        requires=lambda config: ("model:ternary",) if config.weights == "applied" else (),
    )

    def __init__(self, config: StateDictConfig) -> None:
        self.config = config

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write `model.safetensors` and read it back to compare.

        Raises:
            PluginError: weights as applied are asked for, and there is no ternary layer.
        """
        file = folder / "model.safetensors"
        whole = run.active_model.state_dict()
        state = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
        if self.config.weights == "applied":
            try:
                layers = ternary_layers.read_layers(run.active_model)
            except ValueError as error:
                raise PluginError(f"state_dict: {error}") from error
            for name, layer in layers.items():
                weight = f"{name}.weight" if name else "weight"
                state[weight] = layer.applied.to(state[weight].dtype)
        tensors = {name: self._converted(tensor) for name, tensor in state.items()}
        safetensors_torch.save_file(tensors, file)
        again = safetensors_torch.load_file(file)
        equal = all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        return {
            "format": "safetensors",
            "weights": self.config.weights,
            "step": run.progress.step,
            "tensors": len(tensors),
            "left_out": sorted(whole.keys() - tensors.keys()),
            "bytes": file.stat().st_size,
            "verified": {"read_back_bit_equal": equal},
        }

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu")
        if self.config.dtype != "keep" and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, self.config.dtype))
        return tensor.contiguous().clone()
