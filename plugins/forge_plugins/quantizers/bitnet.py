"""BitNet b1.58: ternary weights and int8 activations in the linear layers."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics import bitnet, conversion
    from forge_plugins.mathematics.bit_linear import BitLinear
else:
    torch = LazyModule("torch")
    bitnet = LazyModule("forge_plugins.mathematics.bitnet")
    conversion = LazyModule("forge_plugins.mathematics.conversion")


@dataclass(frozen=True, kw_only=True)
class BitNetConfig:
    """Precision of what the layers apply, and which layers stay as they are."""

    weight_bits: Annotated[
        float, Meta(description="1.58: ternary", extra_json_schema={"enum": [1.58]})
    ] = 1.58
    activation_bits: Annotated[
        int,
        Meta(
            description="8: int8 per token; 16: activations stay as they are",
            extra_json_schema={"enum": [8, 16]},
        ),
    ] = 8
    skip: Annotated[
        tuple[str, ...],
        Meta(description="layers left as they are, by name; * and ? stand for any letters"),
    ] = ("head", "*.head", "lm_head", "*.lm_head")


class BitNet:
    """Turns `nn.Linear` into `BitLinear` and keeps quantized weights within a window."""

    info = PluginInfo(
        name="bitnet", kind=Kind.QUANTIZER, config=BitNetConfig, provides=("model:ternary",)
    )

    def __init__(self, config: BitNetConfig) -> None:
        self.config = config
        self._layers: dict[str, BitLinear] = {}

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Replace the linear layers in place (a bare linear layer: the new one)."""
        skipped = self.config.skip

        def wanted(name: str) -> bool:
            return not any(fnmatch.fnmatchcase(name, pattern) for pattern in skipped)

        model, self._layers = conversion.convert_linears(
            model, wanted, activation_bits=self.config.activation_bits
        )
        if not self._layers:
            raise PluginError(
                f"bitnet found no linear layer to quantize in {type(model).__name__}: "
                f"skip is {list(skipped)}"
            )
        for layer in self._layers.values():
            layer.keeps = run.settings.accumulate > 1
        return model

    @hookimpl
    def on_weights_changed(self, run: Run) -> None:
        """The kept quantized weights are of the old ones."""
        del run
        for layer in self._layers.values():
            layer.forget()

    @hookimpl
    def measure(self, run: Run, step: Step) -> dict[str, Any]:
        """Share of zero weights and distance from the latent weights, over all layers."""
        del run, step
        with torch.no_grad():
            zeros = torch.zeros((), dtype=torch.float64)
            error = torch.zeros((), dtype=torch.float64)
            power = torch.zeros((), dtype=torch.float64)
            count = 0
            for layer in self._layers.values():
                applied = bitnet.quantize_weight(layer.weight)
                zeros = zeros + (applied == 0).sum().double().cpu()
                error = error + (applied - layer.weight).float().square().sum().double().cpu()
                power = power + layer.weight.float().square().sum().double().cpu()
                count += applied.numel()
        return {
            "weight_sparsity": zeros / count,
            "quantization_error": (error / power).sqrt() if float(power) else None,
        }
