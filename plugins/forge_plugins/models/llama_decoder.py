"""The Llama decoder, at any size: what transformers and llama.cpp can run afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.mathematics.networks import llama
else:
    llama = LazyModule("forge_plugins.mathematics.networks.llama")


@dataclass(frozen=True, kw_only=True)
class LlamaDecoderConfig:
    """Size and form of the network; vocabulary and context come from the data."""

    layers: Annotated[int, Meta(ge=1, le=256, description="number of blocks")] = 4
    width: Annotated[int, Meta(ge=2, le=65536, description="width of the residual stream")] = 256
    heads: Annotated[int, Meta(ge=1, le=1024, description="heads of queries")] = 4
    groups: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="heads of keys and values, a divisor of heads; null: as many as heads"),
    ] = None
    hidden: Annotated[int, Meta(ge=1, le=262144, description="width of the perceptron")] = 768
    activation: Annotated[
        Literal["silu", "relu2"],
        Meta(description="of the perceptron's gate: SiLU, or relu squared as BitNet b1.58 2B4T"),
    ] = "silu"
    sub_norms: Annotated[
        bool, Meta(description="a norm before the attention's and the perceptron's last layer")
    ] = False
    tied: Annotated[bool, Meta(description="the head is the token embedding")] = False
    attention_bias: Annotated[bool, Meta(description="biases in the attention")] = False
    feed_bias: Annotated[bool, Meta(description="biases in the perceptron")] = False
    epsilon: Annotated[
        float, Meta(gt=0, le=0.1, description="added to the mean square in the norms")
    ] = 1e-5
    rotary_base: Annotated[
        float, Meta(gt=1, description="base of the rotary angles, larger for longer contexts")
    ] = 10000.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % (self.groups or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of groups {self.groups}")
        if self.width // self.heads % 2:
            raise ValueError(
                f"width {self.width} / heads {self.heads} must be even: rotary positions turn pairs"
            )


def form(config: LlamaDecoderConfig) -> tuple[str, ...]:
    """What exporters need to know before anything is built."""
    result = [
        "model:llama", "model:transformers", "model:packed_sequences", f"model:{config.activation}",
    ]  # fmt: skip
    if config.activation == "silu":
        result.append("model:llama_cpp")
    narrow = (config.groups or config.heads) * (config.width // config.heads)
    rows = (config.width, config.hidden)
    if not any(size % 256 for size in rows):
        result.append("model:rows_of_256")  # of the weights: their second dimension
    if not any(size % 4 for size in (*rows, narrow)):
        result.append("model:columns_of_4")  # their first
    return tuple(result)


class LlamaDecoderModel:
    """The Llama decoder, at any size: what transformers and llama.cpp can run afterwards."""

    info = PluginInfo(
        name="llama_decoder",
        kind=Kind.MODEL,
        config=LlamaDecoderConfig,
        provides=form,
        requires=("data:tokens",),
    )

    def __init__(self, config: LlamaDecoderConfig) -> None:
        self.config = config

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network; its head gives a logit for each token of the vocabulary."""
        spec, config = run.data.spec, self.config
        if spec.vocabulary is None or spec.sequence is None:
            raise PluginError(
                "llama_decoder needs the vocabulary and the sequence length of the data: "
                "give the live data a `spec = DataSpec(vocabulary=..., sequence=...)`"
            )
        return llama.Llama(
            llama.LlamaShape(
                vocabulary=spec.vocabulary,
                context=spec.sequence,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                groups=config.groups or config.heads,
                hidden=config.hidden,
                activation=config.activation,
                sub_norms=config.sub_norms,
                tied=config.tied,
                attention_bias=config.attention_bias,
                feed_bias=config.feed_bias,
                epsilon=config.epsilon,
                rotary_base=config.rotary_base,
            )
        )
