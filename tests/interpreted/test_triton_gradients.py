"""The kernels of gradients, run by Triton's interpreter: see `test_triton_kernels.py`.

Red when a column's step is taken over other tokens than its own, a chunk's edge is read as
something else than zero, or a NaN gets lost in a reduction.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forge_plugins.mathematics.quantization import integer_gradients as plain
from forge_plugins.mathematics.quantization import triton_gradients as kernels
from forge_plugins.mathematics.quantization.gradient_columns import TOKENS

SHAPES = [(7, 100), (256, 32), (270, 48), (520, 33)]

ROWS = [(7, 100), (33, 32), (16, 48), (65, 33)]
"""A program of the kernel sees one row: more of them are more of the same."""


def gradients(rows: int, out: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    found = torch.randn(rows, out) * 1e-6
    found[rows // 2] = 0.0  # a token whose targets are ignored
    found[:, out // 2] = 0.0
    found[rows // 3] *= 100.0
    return found.to(dtype)


def order_of(rows: Tensor) -> Tensor:
    return plain.token_order(rows.float().abs().amax(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ROWS)
def test_rows_have_the_bits_of_the_plain_form(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = gradients(*shape, dtype)
    for divisor in (None, torch.rand(shape[1]) + 0.5):
        for one, other in zip(
            kernels.gradient_rows(rows, divisor), plain.gradient_rows(rows, divisor), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_have_the_bits_of_the_plain_form(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows = gradients(*shape, dtype)
    order = order_of(rows)
    for scale in (torch.rand(shape[0], 1) + 0.5, torch.tensor(3.7)):
        found, wanted = (module.gradient_columns(rows, scale, order) for module in (kernels, plain))
        assert torch.equal(found.levels, wanted.levels)
        assert torch.equal(found.steps, wanted.steps)
        assert torch.equal(found.coarse, wanted.coarse)
        assert torch.equal(found.finer_steps, wanted.finer_steps)
        finer = wanted.finer_steps.repeat_interleave(TOKENS, 0).t() > 0
        assert torch.equal(found.finer[finer], wanted.finer[finer])
        assert wanted.coarse.any()


@pytest.mark.parametrize("shape", [(7, 100), (64, 128), (130, 257)])
def test_whole_numbers_are_transposed(shape: tuple[int, int]) -> None:
    levels = torch.randint(-127, 128, shape, dtype=torch.int8)
    for order in (None, order_of(levels.float())):
        assert torch.equal(kernels.transposed(levels, order), plain.transposed(levels, order))


@pytest.mark.parametrize("shape", [(7, 100, 33), (300, 48, 130), (600, 144, 16)])
def test_a_sum_of_chunks_has_the_bits_of_the_plain_form(shape: tuple[int, int, int]) -> None:
    rows, out, width = shape
    values = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    incoming = gradients(rows, out, torch.float32)
    order = torch.arange(-(-rows // TOKENS) * TOKENS)
    mine = plain.gradient_columns(incoming, torch.tensor(2.0), order)
    assert mine.coarse.any()
    others = plain.transposed(values, order)
    for dtype in (torch.float32, torch.float16):
        found = kernels.sum_of_chunks(mine, others, dtype)
        assert torch.equal(found, plain.sum_of_chunks(mine, others, dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy stands for the device
@pytest.mark.parametrize("lost", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.deep)])
def test_what_is_no_number_reaches_the_gradients(lost: float) -> None:
    rows = gradients(300, 20, torch.float32)
    rows[280, 3] = lost
    values = torch.randint(-127, 128, (300, 16), dtype=torch.int8)
    order = order_of(rows)
    mine = kernels.gradient_columns(rows, torch.tensor(2.0), order)
    found = kernels.sum_of_chunks(mine, kernels.transposed(values, order), torch.float32)
    bad = ~found.isfinite()
    assert bad[3].all()
    assert bad.sum() == bad[3].sum()
    scale = kernels.gradient_rows(rows, None)[1].reshape(-1)
    assert not (1.0 / scale[280]).isfinite()
    assert (1.0 / scale).isfinite().sum() == 299
