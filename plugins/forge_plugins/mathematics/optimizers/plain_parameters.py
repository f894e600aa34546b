"""Optimizers see parameters that their kernels are right for, whatever those of the model are.

Fused and compiled updates run over memory from the first entry to the last: they are right where a
tensor and its gradient fill one block of memory in one order. Moving averages lose increments below
half a unit in the last place: they are right in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
WEIGHT = "weight"
"""Name of a parameter's fp32 value in its memory, where the optimizer keeps one."""


def fills_its_block(tensor: Tensor) -> bool:
    """Whether a tensor's entries lie side by side, in whichever order, and nothing else does."""
    return _fills(tensor.stride(), tensor.shape)


@functools.lru_cache(maxsize=4096)  # asked of every parameter in each step
def _fills(strides: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    reach = 1
    sizes = zip(strides, shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sizes if size != 1):
        if stride != reach:
            return 0 in shape
        reach *= size
    return True


def is_plain(parameter: Tensor) -> bool:
    """Whether an optimizer's kernels and memories are right for the parameter as it is."""
    return parameter.dtype not in HALVES and fills_its_block(parameter)


def with_plain_parameters(
    optimizer: torch.optim.Optimizer, *, keep_weights: bool = False
) -> torch.optim.Optimizer:
    """Let the optimizer step contiguous fp32 stand-ins of the parameters that are not plain.

    They take the parameters' places, with their memory, during `step` alone: groups, gradients and
    `state` are the parameters' own for everyone else. Memories are fp32 and come back from a
    checkpoint as they are; those of an older one may be of the parameter's dtype. Gradients of
    plain parameters are brought into the order of their parameter's memory.

    Args:
        optimizer: fresh; its parameters are known.
        keep_weights: remember the fp32 weights of half-precision parameters, for an optimizer whose
            weights are an average themselves. Without, each step begins at the rounded ones.

    Returns:
        The optimizer itself.

    Raises:
        ValueError: a parameter that is not plain shares entries with another one.
    """
    stand_ins = _StandIns(optimizer, keep_weights=keep_weights)
    optimizer.register_step_pre_hook(stand_ins.enter)
    optimizer.register_step_post_hook(stand_ins.leave)
    optimizer.register_state_dict_pre_hook(stand_ins.give_up)
    optimizer.register_load_state_dict_pre_hook(stand_ins.hold)
    optimizer.register_load_state_dict_post_hook(stand_ins.put_back)
    return optimizer


def weight_in(memory: Mapping[str, Any], parameter: nn.Parameter) -> Tensor:
    """A parameter's value as exactly as its optimizer keeps it.

    Args:
        memory: the parameter's, in an optimizer that keeps weights.
        parameter: what others may have written to meanwhile; then that is its value.
    """
    value = parameter.detach()
    if WEIGHT not in memory:
        return value
    kept: Tensor = memory[WEIGHT]
    return torch.where(kept.to(value.dtype) == value, kept, value.to(kept.dtype))


@dataclass
class _Place:
    """Where a parameter stood, and who stands there now."""

    group: dict[str, Any]
    index: int
    parameter: nn.Parameter
    stand_in: nn.Parameter


class _StandIns:
    """Hooks around an optimizer's step and around the load of its memory."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, keep_weights: bool) -> None:
        self._keep_weights = keep_weights
        self._places: list[_Place] = []
        self._depth = 0  # torch calls hooks again for the step of a base class
        self._held: dict[int, Any] = {}
        _check_apart([p for group in optimizer.param_groups for p in group["params"]])

    @torch.no_grad()
    def enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: stand-ins where they are needed, gradients in order elsewhere."""
        del args, kwargs
        self._depth += 1
        if self._depth > 1:
            return
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                strides = parameter.stride()  # `is_plain`, without a call for each parameter
                if parameter.dtype in HALVES or not _fills(strides, parameter.shape):
                    stand_in = self._made(optimizer, parameter)
                    self._places.append(_Place(group, index, parameter, stand_in))
                    group["params"][index] = stand_in
                elif gradient.stride() != strides:
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)

    def _made(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
        memory = optimizer.state.pop(parameter, None)
        stand_in = nn.Parameter(_plain(weight_in(memory or {}, parameter)))
        assert parameter.grad is not None, "asked for a parameter without a gradient"
        stand_in.grad = _plain(parameter.grad)
        if memory:
            memory.pop(WEIGHT, None)
            optimizer.state[stand_in] = memory
        return stand_in

    def leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: the new weights, and the parameters in their places again."""
        del args, kwargs
        self._depth -= 1
        if not self._depth:
            self._put_in_place(optimizer)

    def give_up(self, optimizer: torch.optim.Optimizer) -> None:
        """Before its memory is read: a step that raised has left stand-ins in their places."""
        self._depth = 0
        self._put_in_place(optimizer)

    @torch.no_grad()
    def _put_in_place(self, optimizer: torch.optim.Optimizer) -> None:
        places, self._places = self._places, []
        for place in places:
            parameter, stand_in = place.parameter, place.stand_in
            parameter.copy_(stand_in)
            place.group["params"][place.index] = parameter
            memory = optimizer.state.pop(stand_in, {})
            if self._keep_weights and parameter.dtype in HALVES:
                memory[WEIGHT] = stand_in.detach()
            if memory:
                optimizer.state[parameter] = memory

    def hold(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Before a load, in which torch rounds memories to the parameter's dtype."""
        del optimizer
        self._held = dict(state_dict["state"])

    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        """After a load: the memories of stand-ins as they were, in fp32 and in plain order."""
        held, self._held = self._held, {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            if index in held and not is_plain(parameter):
                memory = optimizer.state[parameter]
                for name, value in held[index].items():
                    if isinstance(value, Tensor) and name != "step":
                        memory[name] = _plain(value.to(parameter.device))


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy, of half precision in fp32."""
    dtype = torch.float32 if tensor.dtype in HALVES else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _check_apart(parameters: Iterable[nn.Parameter]) -> None:
    """Raise ValueError where two parameters share entries and one of them needs a stand-in.

    Both would begin at the same weights, and the second one's result would undo the first one's.
    """
    together: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad and parameter.numel() and parameter.layout is torch.strided:
            memory = parameter.untyped_storage().data_ptr()
            together.setdefault(memory, []).append(parameter)
    for memory, sharing in together.items():
        if memory and len(sharing) > 1 and not all(is_plain(item) for item in sharing):
            _check_entries(sharing)


def _check_entries(sharing: list[nn.Parameter]) -> None:
    begin = min(item.storage_offset() for item in sharing)
    reaches = [
        item.storage_offset()
        + sum((n - 1) * stride for n, stride in zip(item.shape, item.stride(), strict=True))
        for item in sharing
    ]
    taken = torch.zeros(max(reaches) + 1 - begin, dtype=torch.bool)
    for item in sharing:
        entries = taken.as_strided(item.shape, item.stride(), item.storage_offset() - begin)
        if bool(entries.any()):
            raise ValueError(
                f"two parameters share entries of one tensor (the second has shape "
                f"{tuple(item.shape)}, {item.dtype}) and are not contiguous fp32 tensors, so that "
                "their updates would undo each other: tie them as one and the same nn.Parameter"
            )
        entries.fill_(True)
