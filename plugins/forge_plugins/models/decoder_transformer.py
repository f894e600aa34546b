"""The decoder-only transformer of the grokking experiments, at any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.mathematics.networks import transformer as mathematics
else:
    mathematics = LazyModule("forge_plugins.mathematics.networks.transformer")


@dataclass(frozen=True, kw_only=True)
class DecoderTransformerConfig:
    """Size and form of the network; vocabulary and length come from the data."""

    layers: Annotated[int, Meta(ge=1, le=256, description="number of blocks")] = 2
    width: Annotated[int, Meta(ge=1, le=65536, description="width of the residual stream")] = 128
    heads: Annotated[int, Meta(ge=1, le=1024, description="attention heads")] = 4
    dropout: Annotated[float, Meta(ge=0, lt=1, description="probability of dropout")] = 0.0
    bias: Annotated[bool, Meta(description="biases in the linear layers of the blocks")] = True
    residual: Annotated[
        Literal["input", "normed"],
        Meta(
            description="where a block's residual stream starts: at its input (pre-norm), or "
            "after its first norm, as in the Grokfast paper's network"
        ),
    ] = "input"
    start: Annotated[
        Literal["linear", "multihead"],
        Meta(description="first weights of q, k, v: as nn.Linear or as nn.MultiheadAttention"),
    ] = "linear"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


class DecoderTransformerModel:
    """The decoder-only transformer of the grokking experiments, at any size."""

    info = PluginInfo(
        name="decoder_transformer",
        kind=Kind.MODEL,
        config=DecoderTransformerConfig,
        requires=("data:tokens",),
    )

    def __init__(self, config: DecoderTransformerConfig) -> None:
        self.config = config

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network, its head as wide as the data has classes."""
        spec, config = run.data.spec, self.config
        if spec.vocabulary is None or spec.sequence is None:
            raise PluginError(
                "decoder_transformer needs the vocabulary and the sequence length of the data: "
                "give the live data a `spec = DataSpec(vocabulary=..., sequence=...)`"
            )
        return mathematics.Decoder(
            vocabulary=spec.vocabulary,
            classes=spec.classes or spec.vocabulary,
            length=spec.sequence,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            bias=config.bias,
            residual=config.residual,
            xavier=config.start == "multihead",
        )
