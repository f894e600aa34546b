"""A small decoder-only transformer that can compute the answer positions alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Residual = Literal["input", "normed"]
Positions = slice | Tensor | None


def _at(values: Tensor, positions: Positions) -> Tensor:
    """Values of the chosen positions of the sequence (dimension 1)."""
    return values if positions is None else values[:, positions]


def _linear_of(weight: Tensor, bias: bool) -> nn.Linear:
    """A layer with these weights and zeros as biases; nothing is drawn."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


class SelfAttention(nn.Module):
    """Causal multi-head attention; queries are computed for the asked positions only.

    With `xavier` the first weights are those that `nn.MultiheadAttention` draws, number by number:
    the output's, then one Xavier draw for q, k and v together; biases are zero.
    """

    def __init__(self, width: int, heads: int, dropout: float, bias: bool, xavier: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        if xavier:
            output = nn.Linear(width, width, bias=bias)
            together = nn.init.xavier_uniform_(torch.empty(3 * width, width))
            parts = [_linear_of(part, bias) for part in together.chunk(3)]
            self.query, self.key, self.value = parts
            self.output = output
            if self.output.bias is not None:
                nn.init.zeros_(self.output.bias)
            return
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def _split(self, values: Tensor) -> Tensor:
        batch, length, width = values.shape
        return values.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, inputs: Tensor, positions: Positions, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            inputs: shape (batch, length, width).
            positions: which positions to answer for.
            mask: shape (answered, length), True where a query may look; None: the plain causal.
        """
        query = self._split(self.query(_at(inputs, positions)))
        key, value = self._split(self.key(inputs)), self._split(self.value(inputs))
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        batch, heads, length, size = mixed.shape
        return self.output(mixed.transpose(1, 2).reshape(batch, length, heads * size))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm.

    With `residual="input"` (pre-norm) the residual stream passes beside the norms. With
    `residual="normed"` it starts after the block's first norm, as in the network that the
    Grokfast paper trains: another function, needed to reproduce its metrics.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, bias: bool, residual: Residual, xavier: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout, bias, xavier)
        self.feed_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=bias)
        self.contract = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, positions: Positions, mask: Tensor | None) -> Tensor:
        """Shape (batch, length, width) to (batch, answered, width)."""
        normed = self.attention_norm(inputs)
        stream = _at(normed if self.residual == "normed" else inputs, positions)
        stream = stream + self.dropout(self.attention(normed, positions, mask))
        hidden = functional.gelu(self.expand(self.feed_norm(stream)))
        return stream + self.dropout(self.contract(hidden))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token and position embeddings, blocks, a last norm and a head without bias.

    Args:
        vocabulary: number of tokens.
        classes: width of the head; the vocabulary for language models.
        length: longest sequence.
        width: of the residual stream.
        layers: blocks.
        heads: of the attention, a divisor of the width.
        dropout: probability, after attention and perceptron and inside the attention.
        bias: whether the linear layers of the blocks have one.
        residual: see `Block`.
        xavier: start the attention as `nn.MultiheadAttention` does.
    """

    def __init__(  # noqa: PLR0913  keyword-only sizes
        self,
        *,
        vocabulary: int,
        classes: int,
        length: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        bias: bool = True,
        residual: Residual = "input",
        xavier: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, bias, residual, xavier) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, tokens: Tensor, positions: Positions = None) -> Tensor:
        """Logits.

        Args:
            tokens: shape (batch, length), integers.
            positions: positions that are wanted; the last block, the last norm and the head
                compute no others. None: all.

        Returns:
            Shape (batch, answered, classes).
        """
        length = tokens.shape[1]
        places = torch.arange(length, device=tokens.device)
        stream = self.token_embedding(tokens) + self.position_embedding(places)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            wanted = positions if index == last else None
            mask = None if wanted is None else places <= places[wanted].view(-1, 1)
            stream = block(stream, wanted, mask)
        if not self.blocks:
            stream = _at(stream, positions)
        return self.head(self.norm(stream))  # type: ignore[no-any-return]
