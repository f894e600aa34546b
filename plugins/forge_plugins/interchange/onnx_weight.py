"""A packed weight in an ONNX graph, and its products: what `torch.onnx.ops.symbolic` places there.

The bytes stand in the file; what has to be done with them before an operator reads them (tables for
one bit, filling up to blocks, one step for each block) are nodes over constants, which onnxruntime
computes once, when it loads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import ops

from forge_plugins.interchange.grid_weight import GridWeight, scaled
from forge_plugins.interchange.onnx_packing import (
    level_table,
    packed_rows,
    stored_bits,
    two_bit_table,
)

Form = Literal["matmul_nbits", "dequantize", "integer"]
Attributes = dict[
    str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
]
BLOCK: Final = 128
"""Of `MatMulNBits`, where nothing asks for another: a power of two; each block has one step."""
SMALLEST_BLOCK: Final = 16
LARGEST_BLOCK: Final = 256
MIDDLE: Final = 128
"""What stands for zero in unsigned bytes."""


def steps_of(weight: GridWeight) -> Tensor:
    """What the levels of each part of a weight are multiplied by: fp32, shape (parts,)."""
    return weight.factor if weight.multiplied else 1.0 / weight.factor


def numbers_of(weight: GridWeight) -> Tensor:
    """What a file's levels and steps stand for, fp32, in the weight's shape."""
    return scaled(weight.levels, steps_of(weight), torch.float32, multiplied=True)


class PackedWeight(nn.Module):
    """A weight on levels in the bytes that one form of product reads.

    Args:
        weight: levels and what scales them.
        form: `matmul_nbits`: onnxruntime's own operator, (out, in) alone; `dequantize`: the
            standard's DequantizeLinear in front of any product; `integer`: MatMulInteger and
            ConvInteger, whose sums are exact.

    Attributes:
        levels: uint8 (int8 for `dequantize` with 8 bits).
        steps: fp32, shape (parts,): what the levels of each equal, contiguous part of the weight
            are multiplied by.
    """

    levels: Tensor
    steps: Tensor
    zero: Tensor
    table: Tensor

    def __init__(self, weight: GridWeight, form: Form) -> None:
        super().__init__()
        self.form, self.bits = form, stored_bits(weight)
        self.shape = tuple(weight.levels.shape)
        self.register_buffer("steps", steps_of(weight))
        if form == "matmul_nbits":
            self._by_blocks(weight.levels)
            return
        if form == "dequantize" and self.bits == 8:
            packed = weight.levels.reshape(self._dims)
        else:
            excess = form == "integer" and self.bits == 8
            packed = packed_rows(weight.levels.reshape(1, -1), self.bits, excess=excess).view(-1)
            packed = packed.view(self.shape) if excess else packed
        self.register_buffer("levels", packed)
        if self.bits == 1 or (form == "integer" and self.bits < 8):
            self.register_buffer("table", level_table(self.bits))
        if form == "integer":
            self.register_buffer("zero", torch.tensor(MIDDLE, dtype=torch.uint8))

    def _by_blocks(self, levels: Tensor) -> None:
        """Bytes and steps in the shapes of `MatMulNBits`, as far as that needs no more of them."""
        rows, columns = self.shape
        group = levels.numel() // len(self.steps)  # levels that share a step
        block = best_block(columns) if group >= columns else fitting_block(group)
        assert block is not None, "form_of gives no such groups here"
        self.block, self.blocks = block, -(-columns // block)
        packed = packed_rows(levels, self.bits, excess=True)
        if self.bits > 1 and columns % block == 0:
            packed = packed.view(rows, self.blocks, -1)
        self.register_buffer("levels", packed)
        self.steps = self.steps.view(-1, 1 if group >= columns else columns // group)
        if self.bits == 1:
            self.register_buffer("table", two_bit_table())

    @property
    def _count(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def _dims(self) -> tuple[int, int, int]:
        # a dimension more than any weight of a product has: onnxruntime fuses what it takes for a
        # plain dequantized matrix into a kernel that rounds activations once more
        return self.steps.numel(), 1, self._count // self.steps.numel()

    @property
    def onnx_type(self) -> tuple[str, tuple[int, ...]] | None:
        """Type and shape of `levels` in the file where torch has no such type; else None."""
        if self.form != "dequantize" or self.bits not in (2, 4):
            return None
        return f"INT{self.bits}", self._dims

    @property
    def opset(self) -> int:
        """The first version of the standard's operators that has what is used here."""
        return 25 if self.onnx_type is not None and self.bits == 2 else 23

    # -- in the graph -----------------------------------------------------------------------------

    def _by_table(self) -> Tensor:
        return functional.embedding(self.levels.to(torch.int64), self.table)

    def _levels_by_table(self, shape: Sequence[int]) -> Tensor:
        """The levels in a byte each."""
        result = self._by_table()
        return (result if result.numel() == self._count else result.view(-1)[: self._count]).view(
            shape
        )

    def dequantized(self) -> Tensor:
        """The weight, fp32, unpacked by DequantizeLinear."""
        levels = self._levels_by_table(self._dims) if self.bits == 1 else self.levels
        result = ops.symbolic(
            "DequantizeLinear", (levels, self.steps), {"axis": 0},
            dtype=torch.float32, shape=self._dims, version=self.opset,
        )  # fmt: skip
        return result.view(self.shape)

    def _block_bytes(self) -> Tensor:
        """Shape (rows, blocks, bytes of a block)."""
        if self.levels.dim() == 3:
            return self.levels
        bits = max(2, self.bits)
        levels = self._by_table().flatten(1) if self.bits == 1 else self.levels
        missing = self.blocks * self.block * bits // 8 - levels.shape[1]
        if missing < 0:
            levels = levels[:, :missing]
        elif missing:
            levels = functional.pad(levels, (0, missing), value=_ZERO_CODES[bits])
        return levels.view(self.shape[0], self.blocks, -1)

    def _block_steps(self) -> Tensor:
        """Shape (rows, blocks)."""
        rows, groups = self.shape[0], self.steps.shape[1]
        if groups == 1:
            return self.steps.expand(rows, self.blocks)
        repeated = self.blocks // groups
        if repeated == 1:
            return self.steps
        return self.steps.unsqueeze(2).expand(-1, -1, repeated).reshape(rows, self.blocks)

    def matmul_nbits(self, inputs: Tensor) -> Tensor:
        """`x W^T` by onnxruntime's operator, which unpacks blocks of the weight as it goes.

        Accuracy level 0: activations are not rounded a second time.
        """
        rows, columns = self.shape
        attributes: Attributes = {
            "K": columns, "N": rows, "bits": max(2, self.bits), "block_size": self.block,
            "accuracy_level": 0,
        }  # fmt: skip
        return ops.symbolic(
            "com.microsoft::MatMulNBits", (inputs, self._block_bytes(), self._block_steps()),
            attributes, dtype=torch.float32, shape=(*inputs.shape[:-1], rows), version=1,
        )  # fmt: skip

    def _integers(self, shape: Sequence[int]) -> Tensor:
        """The weight in a byte for each level; 8 bits with a zero point.

        Sums of signed bytes by unsigned ones overflow in some processors' instructions once the
        levels take all 8 bits; sums of unsigned ones do not.
        """
        return self.levels.view(shape) if self.bits == 8 else self._levels_by_table(shape)

    def _sums(
        self, operator: str, whole: Tensor, levels: Tensor, shape: Sequence[int | torch.SymInt],
        attributes: Attributes,
    ) -> Tensor:  # fmt: skip
        inputs: list[Tensor | None] = [(whole + MIDDLE).to(torch.uint8), levels, self.zero]
        if self.bits == 8:
            inputs.append(self.zero)
        sums = ops.symbolic(
            operator, inputs, attributes, dtype=torch.int32, shape=shape, version=10
        )
        return sums.float()

    def matmul_integer(self, whole: Tensor) -> Tensor:
        """`x W^T` of whole numbers in fp32, in exact sums, times the steps."""
        rows, columns = self.shape
        groups = len(self.steps) // rows
        if groups <= 1:
            levels = self._integers(self.shape).t()
            shape = (*whole.shape[:-1], rows)
            return self._sums("MatMulInteger", whole, levels, shape, {}) * self.steps
        # a step for each group: the sum of each is scaled by itself
        size = columns // groups
        parts = whole.reshape(-1, groups, size).transpose(0, 1)
        levels = self._integers((rows, groups, size)).permute(1, 2, 0)
        shape = (groups, parts.shape[1], rows)
        sums = self._sums("MatMulInteger", parts, levels, shape, {})
        scaled = sums * self.steps.view(rows, groups).t().unsqueeze(1)
        return scaled.sum(0).reshape(*whole.shape[:-1], rows)

    def convolution_integer(
        self, whole: Tensor, layer: nn.Conv2d, margins: tuple[int, int, int, int]
    ) -> Tensor:
        """The convolution of whole numbers in fp32, in exact sums, times the steps.

        Args:
            whole: shape (batch, channels, height, width).
            layer: whose stride, dilation and groups are meant.
            margins: zeros above, left, below and right.
        """
        kernel, size = self.shape[2:], whole.shape[2:]
        sizes = [
            (size[at] + margins[at] + margins[at + 2] - layer.dilation[at] * (kernel[at] - 1) - 1)
            // layer.stride[at] + 1
            for at in (0, 1)
        ]  # fmt: skip
        attributes: Attributes = {
            "strides": layer.stride, "dilations": layer.dilation, "group": layer.groups,
            "pads": margins, "kernel_shape": kernel,
        }  # fmt: skip
        shape = (whole.shape[0], self.shape[0], *sizes)
        sums = self._sums("ConvInteger", whole, self._integers(self.shape), shape, attributes)
        return sums * self.steps.view(-1, 1, 1)


_ZERO_CODES: Final = {2: 0b10101010, 4: 0b10001000, 8: 0b10000000}
"""A byte of `MatMulNBits` codes that all stand for zero."""


def best_block(columns: int) -> int:
    """A block that rows are made of, unless many small ones: these are filled up on loading."""
    return BLOCK if columns % 32 else min(BLOCK, columns & -columns)


def fitting_block(group: int) -> int | None:
    """The largest block of `MatMulNBits` that groups are made of; None: there is none."""
    block = LARGEST_BLOCK
    while group % block:
        block //= 2
    return block if block >= SMALLEST_BLOCK else None
