"""A multi-layer perceptron over features or over embedded tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers with an activation and dropout between them.

    Args:
        features: numbers in one sample; ignored when `vocabulary` is given.
        hidden: widths of the hidden layers.
        outputs: width of the last layer.
        activation: `relu`, `gelu`, `silu` or `tanh`.
        dropout: probability after each activation.
        vocabulary: for token inputs of shape (batch, sequence): each is embedded, and the
            embeddings of a sample are concatenated.
        sequence: tokens in one sample.
        embedding: width of an embedding.
    """

    def __init__(
        self,
        *,
        features: int,
        hidden: Sequence[int],
        outputs: int,
        activation: str = "relu",
        dropout: float = 0.0,
        vocabulary: int | None = None,
        sequence: int = 1,
        embedding: int = 32,
    ) -> None:
        super().__init__()
        kinds: dict[str, type[nn.Module]] = {
            "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh,
        }  # fmt: skip
        self.embedding = nn.Embedding(vocabulary, embedding) if vocabulary else None
        width = sequence * embedding if vocabulary else features
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), kinds[activation]()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        layers.append(nn.Linear(width, outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape (batch, features), with more axes or not, or tokens, to (batch, outputs)."""
        if self.embedding is not None:
            inputs = self.embedding(inputs)
        if inputs.ndim > 2:
            inputs = inputs.flatten(1)
        return self.layers(inputs)  # type: ignore[no-any-return]
