"""The small convolutional network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.mathematics.networks import conv_net as mathematics
else:
    mathematics = LazyModule("forge_plugins.mathematics.networks.conv_net")

_MOST: Final = 4  # channels of a picture: red, green, blue and how opaque


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Widths; channels and outputs come from the data."""

    widths: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(
            min_length=1,
            description="channels of the stages; each stage but the first halves height and width",
        ),
    ] = (32, 64)
    depth: Annotated[int, Meta(ge=1, description="convolutions of a stage")] = 2
    dropout: Annotated[
        float, Meta(ge=0, lt=1, description="probability of dropout before the last layer")
    ] = 0.0
    shape: Annotated[
        # not tuple[int, int, int]: msgspec 0.22 crashes when the collector looks at a fixed tuple
        Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(min_length=2, max_length=3)] | None,
        Meta(
            description="of a sample, where the data has it as a row of numbers: [1, 8, 8]; null: "
            "as the data has it"
        ),
    ] = None
    layout: Annotated[
        Literal["auto", "first", "last"],
        Meta(
            description="where a sample's channels stand; auto: the end of its shape that is at "
            "most 4; a sample of two axes has one channel"
        ),
    ] = "auto"


class ConvNetModel:
    """A small convolutional network for pictures, with an output for each class or each number.

    Builds `ConvNet` for samples of shape (channels, height, width), (height, width, channels) or
    (height, width). `quantizer: {use: bitnet, with: {convolutions: true}}` makes it ternary.
    """

    info = PluginInfo(
        name="conv_net", kind=Kind.MODEL, config=ConvNetConfig, requires=("data:features",)
    )

    def __init__(self, config: ConvNetConfig) -> None:
        self.config = config

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network.

        Raises:
            PluginError: samples are no pictures, or there is no target.
        """
        spec, config = run.data.spec, self.config
        shape = config.shape or spec.shape
        if config.shape is not None and math.prod(config.shape) != spec.features:
            raise PluginError(
                f"conv_net: shape {list(config.shape)} has {math.prod(config.shape)} numbers, and "
                f"the data {spec.features} in a sample"
            )
        if shape is None or len(shape) not in (2, 3):
            told = f"of {spec.features} numbers" if shape is None else f"of the shape {list(shape)}"
            raise PluginError(
                f"conv_net reads pictures of the shape (channels, height, width), (height, width, "
                f"channels) or (height, width), and samples are {told}: take data.image_folder, a "
                "file whose samples have this shape, or set shape"
            )
        if spec.classes is None:
            raise PluginError(
                "conv_net needs a target: give data.with.target another value than none, or live "
                "data a `spec = DataSpec(shape=..., classes=...)`"
            )
        layout = _layout(shape, config.layout)
        channels = 1 if layout == "none" else shape[0 if layout == "first" else -1]
        return mathematics.ConvNet(
            channels=channels, widths=config.widths, outputs=spec.classes, depth=config.depth,
            dropout=config.dropout, layout=layout, shape=config.shape,
        )  # fmt: skip


def _layout(
    shape: tuple[int, ...], asked: Literal["auto", "first", "last"]
) -> Literal["first", "last", "none"]:
    if len(shape) == 2:
        return "none"
    if asked != "auto":
        return asked
    return "last" if shape[0] > _MOST >= shape[-1] else "first"
