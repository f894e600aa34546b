"""Whether what is to be trained can be: looked at once, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from forge_kernel.errors import RunError


def check_trainable(
    parameters: Mapping[str, nn.Parameter],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse what a step would trip over.

    Args:
        parameters: all of the run, by name.
        modules: the model and its companions, by name.
        optimizer: over them.

    Raises:
        RunError: no parameter is to be trained, one shares memory with itself, one is complex, a
            layer gives sparse gradients, or the optimizer asks for a closure.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise RunError(
            "nothing can be trained: every parameter of the model is frozen (requires_grad is "
            "False). Unfreeze what is to be trained"
        )
    overlapping = [name for name, parameter in trained.items() if _overlaps(parameter)]
    if overlapping:
        raise RunError(
            f"{_named(overlapping)} share memory between their own entries (an expanded tensor), "
            "which no optimizer can update: make them from a copy, nn.Parameter(tensor.clone())"
        )
    numbers = [name for name, parameter in trained.items() if parameter.is_complex()]
    if numbers:
        raise RunError(
            f"{_named(numbers)} are complex, which filters, clipping and exports do not know: keep "
            "the real view, nn.Parameter(torch.view_as_real(tensor)), and use "
            "torch.view_as_complex in forward"
        )
    sparse = [
        f"{top}.{name}" if top else name
        for top, module in modules.items()
        for name, layer in module.named_modules()
        if getattr(layer, "sparse", None) is True and any(_trains(layer))
    ]
    if sparse:
        raise RunError(
            f"{_named(sparse)} give sparse gradients, which filters, clipping and the check for "
            "finite values do not know: make them with sparse=False"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise RunError(
            f"{type(optimizer).__name__} computes the loss several times in a step (its step asks "
            "for a closure), which the loop does not offer: choose another optimizer"
        )


def _trains(layer: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in layer.parameters(recurse=False)]


def _overlaps(tensor: Tensor) -> bool:
    """Whether two entries lie at one place: some stride is shorter than what lies inside it."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    reach = 0
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sizes if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
