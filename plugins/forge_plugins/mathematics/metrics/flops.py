"""Floating-point operations of a network, counted, and those that a device can do, measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BACKWARD: Final = 2.0
"""Operations of the backward pass for one of the forward pass: a product has a gradient for each
of its two factors (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""

_SECONDS: Final = 0.08  # of measuring, about
_TIMES: Final = 3  # products of one width at least; the first one warms up
_SMALLEST: Final = 256  # in which the threads have hardly begun: a larger one is always tried
_WIDEST: Final = {"cpu": 1024, "cuda": 8192, "mps": 2048}


def _product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Of (rows, inner) and (inner, columns): a multiplication and an addition each."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Of (batch, heads, length, width): scores and their mixture, masked places too."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])


_aten = torch.ops.aten
_OWN: Final[Mapping[Any, Callable[..., int]]] = {  # what torch's own table lacks
    _aten._int_mm: _product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention: _attention,  # torch's asks for as many keys' heads
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_cudnn_attention: _attention,
}


class FlopCount(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention while it is entered.

    Values, gradients and random streams are those of a run without it. What is done in compiled
    code is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def begin(self) -> None:
        """Count from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Count no more."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do it, and count."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _OWN:
            self.total += _OWN[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def training_flops(forward: float) -> float:
    """Of a training step, from those of its forward pass."""
    return (1.0 + BACKWARD) * forward


@functools.cache
def product_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The most operations in a second that large matrix products reach on a device now.

    The best of several products of square matrices that grow while there is time, and of one
    thread of a CPU alone, so that other work on the machine disturbs it little. No random number
    is drawn. A process measures once.

    Args:
        device: where.
        dtype: of the factors.
        threads: of one operation, as torch is set now.
    """
    assert threads == torch.get_num_threads(), "the peak is of another number of threads"
    widest = _WIDEST.get(device.type, _SMALLEST)
    best = 0.0
    for doublings in range(widest // _SMALLEST):
        width = _SMALLEST << doublings
        if width > widest:
            break
        took = _fastest(device, dtype, width, _SECONDS / 8)
        best = max(best, 2.0 * width**3 / took)
        if doublings and took > _SECONDS / 6:  # one twice as wide takes eight times as long
            break
    if device.type == "cpu" and threads > 1:
        best = max(best, _one_thread(device, dtype))
    return best


def _one_thread(device: torch.device, dtype: torch.dtype) -> float:
    """Operations in a second of one thread alone.

    Beside busy programs, threads that wait for one another may come to a tenth of it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 2.0 * _SMALLEST**3 / _fastest(device, dtype, _SMALLEST, _SECONDS / 8)
    finally:
        torch.set_num_threads(threads)


def _fastest(device: torch.device, dtype: torch.dtype, width: int, seconds: float) -> float:
    """Seconds of the fastest of some products of one width."""
    ramp = torch.arange(width * width, device=device).remainder_(7).view(width, width)
    left = (ramp.float() - 3.0).to(dtype)
    right = left.t().contiguous()
    took: list[float] = []
    while len(took) < _TIMES or sum(took) < seconds:
        _wait(device)
        start = time.perf_counter()
        _ = left @ right
        _wait(device)
        took.append(time.perf_counter() - start)
    return max(min(took), 1e-9)  # a coarse clock may tell no time at all


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
