"""A small convolutional network for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Layout = Literal["first", "last", "none"]


class ConvNet(nn.Module):
    """Stages of 3 x 3 convolutions, each but the first at half the size, then a linear layer.

    A stage is `depth` times convolution, batch normalization and ReLU. What is left is averaged
    over all places, so that pictures of any size fit.

    Args:
        channels: of a picture.
        widths: channels of the stages.
        outputs: width of the last layer.
        depth: convolutions of a stage.
        dropout: probability before the last layer.
        layout: where a sample's channels stand: `first`, `last`, or `none` for (height, width).
        shape: of a sample, whatever the inputs' is; None: as they are.
    """

    def __init__(
        self,
        *,
        channels: int,
        widths: Sequence[int],
        outputs: int,
        depth: int = 1,
        dropout: float = 0.0,
        layout: Layout = "first",
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.shape = layout, shape
        layers: list[nn.Module] = []
        before = channels
        for stage, width in enumerate(widths):
            for place in range(depth):
                stride = 2 if stage and not place else 1
                layers += [
                    nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                before = width
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(before, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape (batch, channels, height, width), or as `layout` says, to (batch, outputs)."""
        if self.shape is not None:
            inputs = inputs.reshape(len(inputs), *self.shape)
        if self.layout == "none":
            inputs = inputs.unsqueeze(1)
        elif self.layout == "last":
            inputs = inputs.movedim(-1, 1)
        pooled = self.layers(inputs).mean((2, 3))
        return self.head(self.dropout(pooled))  # type: ignore[no-any-return]
