"""The multi-layer perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.mathematics.networks import mlp as mathematics
else:
    mathematics = LazyModule("forge_plugins.mathematics.networks.mlp")


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Widths; the sizes of input and output come from the data."""

    hidden: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...], Meta(description="widths of the hidden layers")
    ] = (64,)
    activation: Annotated[
        Literal["relu", "gelu", "silu", "tanh"], Meta(description="between the layers")
    ] = "relu"
    dropout: Annotated[float, Meta(ge=0, lt=1, description="probability of dropout")] = 0.0
    embedding: Annotated[
        int, Meta(ge=1, description="width of a token's embedding, for token data")
    ] = 32


class MlpModel:
    """The multi-layer perceptron, with an output for each class or each number.

    Builds `Mlp` for the run's data, with an output for each class or each number.
    """

    # the loss says whether it wants classes or numbers
    info = PluginInfo(name="mlp", kind=Kind.MODEL, config=MlpConfig)

    def __init__(self, config: MlpConfig) -> None:
        self.config = config

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network."""
        spec, config = run.data.spec, self.config
        by_token = spec.vocabulary is not None and spec.sequence is not None
        if spec.classes is None or (spec.features is None and not by_token):
            raise PluginError(
                "mlp needs the sizes of inputs and targets: give data.with.target another value "
                "than none, or live data a `spec = DataSpec(features=..., classes=...)`"
            )
        return mathematics.Mlp(
            features=spec.features or 0,
            hidden=config.hidden,
            outputs=spec.classes,
            activation=config.activation,
            dropout=config.dropout,
            vocabulary=spec.vocabulary,
            sequence=spec.sequence or 1,
            embedding=config.embedding,
        )
