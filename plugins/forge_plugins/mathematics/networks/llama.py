"""The Llama decoder: rotary positions, RMSNorm, gated perceptron, grouped queries.

References: Touvron et al. 2023 (arXiv 2302.13971), Su et al. 2021 (rotary, arXiv 2104.09864),
Ainslie et al. 2023 (grouped queries, arXiv 2305.13245). With `sub_norms` it is the network of
BitNet b1.58 2B4T (Ma et al. 2025, arXiv 2504.12285): a norm before the attention's output layer
and one before the perceptron's. The order of the operations is that of `LlamaForCausalLM` and
`BitNetForCausalLM` of the transformers library, so that both give the same logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["silu", "relu2"]
Positions = slice | Tensor | None
INITIAL_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Everything that decides the function a `Llama` computes, beside its weights.

    Raises:
        ValueError: the numbers do not fit each other.
    """

    vocabulary: int
    context: int
    """Longest sequence that it was trained for."""
    width: int = 256
    layers: int = 4
    heads: int = 4
    groups: int = 2
    """Heads of keys and values; each serves `heads / groups` heads of queries."""
    hidden: int = 768
    """Width of the perceptron."""
    activation: Activation = "silu"
    sub_norms: bool = False
    tied: bool = False
    attention_bias: bool = False
    feed_bias: bool = False
    epsilon: float = 1e-5
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.groups:
            raise ValueError(f"heads {self.heads} is not a multiple of groups {self.groups}")
        if self.head_width % 2:
            raise ValueError(
                f"a head of width {self.head_width} (width {self.width} / heads {self.heads}) "
                "cannot be rotated in pairs: it must be even"
            )

    @property
    def head_width(self) -> int:
        """Numbers in one head."""
        return self.width // self.heads


class RMSNorm(nn.Module):
    """`w * x / sqrt(mean(x^2) + eps)` over the last dimension, computed in fp32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape (..., width)."""
        values = inputs.float()
        scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (values * scale).to(inputs.dtype)


def rotary_table(
    places: Tensor, head_width: int, base: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position * base^(-2i / head_width)`.

    The angles are fp32 whatever the dtype of the model is: rounded to bf16 they are off by several
    radians at far positions. Nothing is kept in the module, so no `.to(dtype)` can round them.

    Args:
        places: positions, shape (length,), or (batch, 1, length) where each sample has its own.
        head_width: numbers in a head, even; the two halves share their angles.
        base: of the geometric series.
        like: the dtype and device of the result are its.

    Returns:
        Two tensors of shape (..., length, head_width).
    """
    device = like.device
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    angles = places.to(device, torch.float32)[..., None] * (1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(values: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair `(x_i, x_(i + half))` by its angle; shape (..., length, head_width)."""
    cosines, sines = table
    half = values.shape[-1] // 2
    turned = torch.cat((-values[..., half:], values[..., :half]), dim=-1)
    return values * cosines + turned * sines


def own_text_mask(places: Tensor) -> Tensor:
    """Which tokens each token sees where texts share a sequence: those of its own before it.

    Args:
        places: each token's position in its text, shape (batch, length); 0 begins a text.

    Returns:
        Shape (batch, 1, length, length): [i, j] whether token i sees token j.
    """
    texts = (places == 0).cumsum(-1)
    same = texts[:, None, :, None] == texts[:, None, None, :]
    length = places.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=places.device).tril()
    return same & before


class KeysAndValues:
    """What the blocks' attentions have seen of a sequence, so that a next token costs no more.

        block 0: keys, values (batch, groups, room, head_width), the first `length` in use
        block 1: ...

    Args:
        room: tokens that there is room for.
    """

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def extended(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far with those of the new tokens, shape (batch, groups, n, width).

        All blocks take in the same tokens before `advance`.
        """
        if block == len(self._kept):
            shape = (*key.shape[:2], self.room, key.shape[3])
            self._kept.append((key.new_empty(shape), value.new_empty(shape)))
        end = self.length + key.shape[2]
        assert end <= self.room, "no room for more tokens"
        keys, values = self._kept[block]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """The new tokens have passed all blocks."""
        self.length += count


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions; several heads of queries share keys and values."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        narrow, bias = shape.groups * shape.head_width, shape.attention_bias
        self.head_width = shape.head_width
        self.query = nn.Linear(shape.width, shape.width, bias=bias)
        self.key = nn.Linear(shape.width, narrow, bias=bias)
        self.value = nn.Linear(shape.width, narrow, bias=bias)
        self.norm = RMSNorm(shape.width, shape.epsilon) if shape.sub_norms else None
        self.output = nn.Linear(shape.width, shape.width, bias=bias)

    def _split(self, values: Tensor) -> Tensor:
        batch, length, _ = values.shape
        return values.view(batch, length, -1, self.head_width).transpose(1, 2)

    def forward(
        self,
        inputs: Tensor,
        table: tuple[Tensor, Tensor],
        seen: tuple[KeysAndValues, int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Shape (batch, length, width) to the same.

        Args:
            inputs: of the tokens that are new.
            table: of their positions.
            seen: what was before them, and which block this is: then there is one new token, or
                nothing was before them.
            mask: of `own_text_mask`; None: each token sees all before it.
        """
        query = rotate(self._split(self.query(inputs)), table)
        key = rotate(self._split(self.key(inputs)), table)
        value = self._split(self.value(inputs))
        causal = mask is None
        if seen is not None:
            before, block = seen
            assert query.shape[2] == 1 or not before.length, "several tokens after others"
            causal = not before.length  # a last token looks at all that are there
            key, value = before.extended(block, key, value)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        mixed = mixed.transpose(1, 2).reshape(inputs.shape)
        if self.norm is not None:
            mixed = self.norm(mixed)
        return self.output(mixed)  # type: ignore[no-any-return]


class GatedPerceptron(nn.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.activation: Activation = shape.activation
        self.gate = nn.Linear(shape.width, shape.hidden, bias=shape.feed_bias)
        self.up = nn.Linear(shape.width, shape.hidden, bias=shape.feed_bias)
        self.norm = RMSNorm(shape.hidden, shape.epsilon) if shape.sub_norms else None
        self.down = nn.Linear(shape.hidden, shape.width, bias=shape.feed_bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape (..., width) to the same."""
        gate = self.gate(inputs)
        if self.activation == "silu":
            gate = functional.silu(gate)
        else:
            gate = functional.relu(gate).square()
        hidden = gate * self.up(inputs)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.down(hidden)  # type: ignore[no-any-return]


class LlamaBlock(nn.Module):
    """Attention and perceptron, each behind a norm and beside the residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, shape.epsilon)
        self.attention = GroupedAttention(shape)
        self.feed_norm = RMSNorm(shape.width, shape.epsilon)
        self.feed = GatedPerceptron(shape)

    def forward(
        self,
        inputs: Tensor,
        table: tuple[Tensor, Tensor],
        seen: tuple[KeysAndValues, int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Shape (batch, length, width) to the same; the others as of `GroupedAttention`."""
        stream = inputs + self.attention(self.attention_norm(inputs), table, seen, mask)
        return stream + self.feed(self.feed_norm(stream))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """A decoder-only language model.

    Weights start from N(0, 0.02^2), those of the layers that write to the residual stream divided
    by sqrt(2 * layers) (Radford et al. 2019); biases start at zero.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.epsilon)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.token_embedding.weight
        self._draw()

    def _draw(self) -> None:
        residual = INITIAL_DEVIATION / math.sqrt(2 * max(1, self.shape.layers))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith(("attention.output", "feed.down"))
                nn.init.normal_(module.weight, std=residual if last else INITIAL_DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_DEVIATION)

    def forward(
        self,
        input_ids: Tensor,
        positions: Positions = None,
        seen: KeysAndValues | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: tokens, shape (batch, length), integers.
            positions: positions that are wanted; the last norm and the head compute no others.
            seen: keys and values of the tokens before these, which are taken into it.
            position_ids: each token's position in its text, shape (batch, length): texts that share
                a sequence do not see each other. None: each sequence is one text.

        Returns:
            Shape (batch, answered, vocabulary).
        """
        stream = self.token_embedding(input_ids)
        shape, length = self.shape, input_ids.shape[1]
        mask = None
        if position_ids is None:
            start = 0 if seen is None else seen.length
            places = torch.arange(start, start + length, dtype=torch.float32, device=stream.device)
        else:
            mask, places = own_text_mask(position_ids), position_ids[:, None]
        table = rotary_table(places, shape.head_width, shape.rotary_base, stream)
        for index, block in enumerate(self.blocks):
            stream = block(stream, table, None if seen is None else (seen, index), mask)
        if seen is not None:
            seen.advance(length)
        if positions is not None:
            stream = stream[:, positions]
        return self.head(self.norm(stream))  # type: ignore[no-any-return]
