"""Whatever memory a parameter lies in, every optimizer moves it as it moves a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forge_kernel.contract.plugin import Kind
from forge_kernel.planning.catalog import Catalog
from forge_plugins.mathematics.optimizers.bitnet_optimizer import BitNetOptimizer
from forge_plugins.mathematics.optimizers.plain_parameters import fills_its_block

NAMES = sorted(offer.name for offer in Catalog.installed().offers() if offer.kind is Kind.OPTIMIZER)
Layout = Callable[[Tensor], Tensor]


def _transposed(plain: Tensor) -> Tensor:
    return plain.transpose(0, 1).contiguous().transpose(0, 1) if plain.ndim > 1 else plain.clone()


def _columns(plain: Tensor) -> Tensor:
    wide = torch.full((*plain.shape[:-1], 2 * plain.shape[-1] + 3), 7.0, dtype=plain.dtype)
    view = wide[..., 2 : 2 + plain.shape[-1]]
    view.copy_(plain)
    return view


def _every_second_row(plain: Tensor) -> Tensor:
    view = torch.full((2 * plain.shape[0], *plain.shape[1:]), 7.0, dtype=plain.dtype)[::2]
    view.copy_(plain)
    return view


def _channels_last(plain: Tensor) -> Tensor:
    return plain.clone(memory_format=torch.channels_last) if plain.ndim == 4 else plain.clone()


LAYOUTS: dict[str, Layout] = {
    "transposed": _transposed, "columns": _columns, "rows": _every_second_row,
    "channels_last": _channels_last,
}  # fmt: skip
SHAPES = {
    "hidden.weight": (6, 4),
    "mixed.weight": (4, 8),
    "conv.weight": (3, 2, 3, 3),
    "bias": (5,),
}


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class _Run:
    device = torch.device("cpu")

    def emit_event(self, *_: Any, **__: Any) -> None:
        """Nobody listens."""


def optimizer_of(name: str, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    plugin = Catalog.installed().load(Kind.OPTIMIZER, name)
    made: torch.optim.Optimizer = plugin(plugin.info.config()).make_optimizer(_Run(), named)
    return made


def trained(
    name: str,
    layout: Layout = Tensor.clone,
    gradient_layout: Layout = Tensor.clone,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    steps: int = 4,
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    found = {
        key: nn.Parameter(layout(values(shape, place).to(dtype)))
        for place, (key, shape) in enumerate(shapes.items())
    }
    optimizer = optimizer_of(name, list(found.items()))
    for step in range(steps):
        for place, (key, parameter) in enumerate(found.items()):
            parameter.grad = gradient_layout(values(shapes[key], 100 * step + place).to(dtype))
        optimizer.step()
    return [parameter.detach() for parameter in found.values()], optimizer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_moves_alike_in_any_layout(name: str, layout: str) -> None:
    """Planted fault: the stand-ins left out."""
    for plain, other in zip(trained(name)[0], trained(name, LAYOUTS[layout])[0], strict=True):
        torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "columns"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_counts_alike_in_any_layout(name: str, layout: str) -> None:
    """Planted fault: gradients left as they lie."""
    other = trained(name, gradient_layout=LAYOUTS[layout])[0]
    for plain, moved in zip(trained(name)[0], other, strict=True):
        torch.testing.assert_close(moved, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beside_a_slice_is_not_touched(name: str) -> None:
    wide = torch.full((4, 9), 7.0)
    part = nn.Parameter(wide[:, 2:6])
    optimizer = optimizer_of(name, [("hidden.weight", part)])
    part.grad = values((4, 4), 1)
    optimizer.step()
    assert bool((wide[:, :2] == 7.0).all())
    assert bool((wide[:, 6:] == 7.0).all())
    assert not bool((wide[:, 2:6] == 7.0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_half_precision_model_is_stepped_in_fp32_with_memories_of_fp32(
    name: str, dtype: torch.dtype
) -> None:
    """Planted fault: memories in the parameter's dtype."""
    whole, _ = trained(name)
    half, optimizer = trained(name, dtype=dtype)
    bound = 8 * torch.finfo(dtype).eps
    for one, two in zip(whole, half, strict=True):
        assert two.dtype is dtype
        torch.testing.assert_close(two.float(), one, atol=bound, rtol=bound)
    memories = [value for state in optimizer.state.values() for value in state.values()]
    kinds = {value.dtype for value in memories if isinstance(value, Tensor)}
    assert not kinds & {torch.bfloat16, torch.float16}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_empty_tensors_are_parameters_too(name: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"scale": (), "none": (0, 3), "hidden.weight": (3, 4)}
    for plain, other in zip(
        trained(name, shapes=shapes)[0],
        trained(name, shapes=shapes, dtype=torch.bfloat16)[0],
        strict=True,
    ):
        torch.testing.assert_close(other.float(), plain, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_its_memory_goes_into_another_one_and_training_goes_on_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    """Planted fault: torch's own load, which rounds memories to the parameter's dtype."""
    one = [("hidden.weight", nn.Parameter(_columns(values((5, 4), 0).to(dtype))))]
    two = [("hidden.weight", nn.Parameter(_columns(values((5, 4), 0).to(dtype))))]
    first, second = optimizer_of(name, one), optimizer_of(name, two)
    for step in range(6):
        for (_, parameter), optimizer in ((one[0], first), (two[0], second)):
            parameter.grad = values((5, 4), step).to(dtype)
            optimizer.step()
        if step == 2:
            kept = second.state_dict()
            second = optimizer_of(name, two)
            second.load_state_dict(kept)
    assert torch.equal(one[0][1], two[0][1])


def test_a_memory_of_half_precision_from_an_older_checkpoint_is_taken_up() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    older = torch.optim.AdamW([parameter])
    parameter.grad = torch.full((4,), 0.5, dtype=torch.bfloat16)
    older.step()
    ours = optimizer_of("adamw", [("weight", parameter)])
    ours.load_state_dict(older.state_dict())
    ours.step()
    state = ours.state[parameter]
    assert (state["exp_avg"].dtype, float(state["step"])) == (torch.float32, 2.0)


def test_a_slow_average_of_squares_falls_in_a_bf16_model() -> None:
    """In bf16 0.999 times a number is the number; planted: averages of bf16."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optimizer_of("adamw", [("weight", parameter)])
    for size in [1.0, *[0.0] * 400]:
        parameter.grad = torch.full((4,), size, dtype=torch.bfloat16)
        optimizer.step()
    expected = 0.001 * 0.999**400
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], torch.full((4,), expected))


def test_memory_that_is_shared_and_not_plain_is_refused() -> None:
    shared = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one and the same nn.Parameter"):
        optimizer_of("adamw", [("one", nn.Parameter(shared)), ("two", nn.Parameter(shared))])
    wide = torch.ones(4, 6)
    apart = [("one", nn.Parameter(wide[:, :3])), ("two", nn.Parameter(wide[:, 3:]))]
    assert len(optimizer_of("adamw", apart).param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("tensor", "fills"),
    [
        (torch.ones(3, 4), True), (torch.ones(3, 4).T, True), (torch.ones(3, 4)[:, :2], False),
        (torch.ones(3, 4)[::2], False), (torch.ones(()), True), (torch.ones(0, 3), True),
        (torch.ones(8)[::2], False), (torch.ones(1, 4)[:, :2], True), (torch.ones(3, 1), True),
        (torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
    ],
)  # fmt: skip
def test_a_block_is_one_piece_in_any_order(tensor: Tensor, fills: bool) -> None:
    assert fills_its_block(tensor) is fills


def test_the_quantizers_own_optimizer_holds_fp32_memories_through_a_load() -> None:
    """Planted fault: without stand-ins a count of gradients in bf16 stops at 256."""
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = BitNetOptimizer([parameter], lr=1e-3, scale_limit=3.0)
    for step in range(300):
        parameter.grad = values((4, 4), step).bfloat16()
        optimizer.step()
    other = BitNetOptimizer([parameter], lr=1e-3, scale_limit=3.0)
    other.load_state_dict(optimizer.state_dict())
    state = other.state[parameter]
    assert float(state["gradient_average"][1]) == 300.0
    assert {value.dtype for value in state.values()} == {torch.float32}
