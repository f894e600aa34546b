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
    from torch import nn

    from forge_plugins.interchange import grid_weight, safetensors_state
    from forge_plugins.mathematics.optimizers import tied_tensors
else:
    torch = LazyModule("torch")
    grid_weight = LazyModule("forge_plugins.interchange.grid_weight")
    safetensors_state = LazyModule("forge_plugins.interchange.safetensors_state")
    tied_tensors = LazyModule("forge_plugins.mathematics.optimizers.tied_tensors")


@dataclass(frozen=True, kw_only=True)
class StateDictConfig:
    """Which weights, in which precision."""

    weights: Annotated[
        Literal["latent", "applied"],
        Meta(
            description="of quantized layers: the ones that are trained, or the ones that are "
            "multiplied with, so that plain linear layers can take them"
        ),
    ] = "latent"
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        Meta(description="of floating tensors in the file"),
    ] = "keep"


class StateDict:
    """The model's tensors in one safetensors file.

    Weights as trained or as applied, by the model's own names; a tensor with several names stands
    there once, and the metadata tell the others as `safetensors.torch.save_model` does.
    """

    info = PluginInfo(
        name="state_dict",
        kind=Kind.EXPORTERS,
        config=StateDictConfig,
        requires=lambda config: ("model:quantized",) if config.weights == "applied" else (),
    )

    def __init__(self, config: StateDictConfig) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """Tensors that the file cannot hold; weights as applied of a network without levels."""
        if self.config.weights == "applied":
            try:
                _ = grid_weight.need_grid_layers(run.model)
            except ValueError as error:
                return str(error)
        reason = safetensors_state.unwritable(run.model.state_dict())
        return reason and f"{reason}; export with phase6"

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write `model.safetensors` and read it back to compare.

        Raises:
            PluginError: weights as applied are asked for, and there is no quantized layer or one
                that is not on its levels yet; or the file gave other tensors back.
        """
        file = folder / "model.safetensors"
        whole = self._state(run.active_model)
        state = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
        ties = tied_tensors.tied_names(state)
        converted = {
            name: self._converted(tensor) for name, tensor in state.items() if name not in ties
        }
        tensors = {name: converted[ties.get(name, name)] for name in state}  # one stays one
        tied = safetensors_state.write_state(file, tensors)
        again = safetensors_state.read_state(file)
        for name, tensor in tensors.items():
            if not tied_tensors.same_bits(again[name], tensor):
                raise PluginError(f"state_dict: {name} came back from {file} with other values")
        return {
            "format": "safetensors",
            "weights": self.config.weights,
            "step": run.progress.step,
            "tensors": len(tensors) - len(tied),
            "tied": tied,
            "left_out": sorted(whole.keys() - tensors.keys()),
            "bytes": file.stat().st_size,
            "verified": {"read_back_bit_equal": True},
        }

    def _state(self, model: nn.Module) -> Mapping[str, Any]:
        """What is to be written, with what is no tensor."""
        if self.config.weights == "latent":
            return model.state_dict()
        try:
            for layer in grid_weight.need_grid_layers(model).values():
                grid_weight.check_finished(layer)
        except ValueError as error:
            raise PluginError(f"state_dict: {error}") from error
        return grid_weight.applied_state(model)

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu")
        if self.config.dtype != "keep" and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, self.config.dtype))
        return tensor.contiguous()
