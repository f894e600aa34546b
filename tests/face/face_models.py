"""A network that another process can import."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """With dropout, so that the random stream matters."""

    def __init__(self, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, classes)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
