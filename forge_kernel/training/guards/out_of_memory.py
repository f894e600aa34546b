"""Out of memory: what an error of it says, and a window in smaller micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn

from forge_kernel.contract.run import Run
from forge_kernel.contract.values import Batch
from forge_kernel.errors import OutOfMemoryError

# torch has a class of its own for accelerators alone; of the rest only the texts tell
_TEXTS: Final = (
    "can't allocate memory",  # CPU, POSIX
    "not enough memory",  # CPU, Windows
    "out of memory",  # CUDA libraries (cuBLAS, cuDNN), MPS
    "cannot allocate memory",  # the system's ENOMEM
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_WORKER: Final = "is killed by signal: Killed"  # torch's DataLoader, of a worker
_NORMS: Final = (nn.modules.batchnorm._BatchNorm,)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory was short, of the device, the host or a loader's worker."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError | OSError) and (
        any(part.lower() in text.lower() for part in _TEXTS) or _WORKER in text
    )


def reported(run: Run, error: BaseException, batches: Sequence[Batch]) -> BaseException:
    """The error itself, or for one of memory one that says where, how much, and what helps.

    Args:
        run: as far as it has come.
        error: what was raised.
        batches: the micro-batches of the window that was being stepped, if one was.
    """
    if isinstance(error, OutOfMemoryError) or not ran_out(error):
        return error
    step = run.progress.step + 1
    where = f"in step {step}" if batches else f"outside of a step, after step {step - 1}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    parts = [f"out of memory {where}: {first}"]
    if batches:
        parts.append(f"The micro-batch: {'; '.join(shapes(max(batches, key=_size)))}")
    parts.append(f"Memory in use at the peak: {_peak(run)}")
    hints = _WORKER_HINTS if _WORKER in str(error) else _hints(run)
    return OutOfMemoryError("\n  ".join([*parts, *(f"- {hint}" for hint in hints)]))


_WORKER_HINTS: Final = (
    "the system killed a worker of the data loader: fewer workers (data.num_workers)",
    "a smaller batch_size of the data, with run.accumulate as many times larger",
    "a machine or container with more memory, of shared memory (/dev/shm) above all",
)


def _hints(run: Run) -> list[str]:
    """Three things that help, those first that change no result."""
    settings = run.settings
    hints = []
    if settings.on_out_of_memory != "halve":
        hints.append(
            "run.on_out_of_memory: halve takes the same step in smaller micro-batches when this "
            "happens"
        )
    hints.append("a smaller batch_size of the data, with run.accumulate as many times larger")
    hints.append(
        "wrappers: [{use: activation_checkpointing}] computes activations anew in the backward "
        "pass instead of keeping them"
    )
    if settings.precision == "fp32":
        hints.append("run.precision: bf16 halves activations")
    hints.append("optimizer: {use: adamw_8bit} keeps a quarter of AdamW's state")
    return hints[:3]


def _peak(run: Run) -> str:
    device = getattr(run, "device", None)
    if device is not None and device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{used / 2**30:.2f} of {total / 2**30:.2f} GiB of {device}"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{peak * scale / 2**30:.2f} GiB of the process"


def _size(batch: Batch) -> int:
    return sum(tensor.numel() for _, tensor in _tensors(batch))


def shapes(batch: Batch) -> Iterator[str]:
    """What a batch holds, a text for each tensor."""
    for name, tensor in _tensors(batch):
        yield f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in _parts(batch):
        if isinstance(value, torch.Tensor):
            yield name, value


def _parts(batch: Batch) -> Iterator[tuple[str, Any]]:
    """Inputs, targets and weights, and what a mapping or sequence of them holds."""
    for name in ("inputs", "targets", "weights"):
        value = getattr(batch, name)
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        elif isinstance(value, list | tuple):
            yield from ((f"{name}[{index}]", part) for index, part in enumerate(value))
        else:
            yield name, value


def can_be_split(batch: Batch) -> bool:
    """Whether a batch is made of rows alone, so that a part of them is a batch of its own."""
    samples = batch.samples
    return samples > 1 and all(
        part is None or (isinstance(part, torch.Tensor) and part.shape[:1] == (samples,))
        for _, part in _parts(batch)
    )


def split(batches: Sequence[Batch], parts: int) -> list[Batch]:
    """Each batch as so many micro-batches of nearly equal size; at least one sample in each."""
    result = []
    for batch in batches:
        samples = batch.samples
        count = min(parts, samples) if can_be_split(batch) else 1
        edges = [samples * index // count for index in range(count + 1)]
        result += [
            batch if count == 1 else batch.rows(slice(begin, end)) for begin, end in pairwise(edges)
        ]
    return result


def smaller(batches: Sequence[Batch], parts: int) -> bool:
    """Whether more parts than that make any micro-batch smaller."""
    return any(can_be_split(batch) and batch.samples > parts for batch in batches)


def release_memory(run: Run, parts: int) -> None:
    """Give cached memory back before the next try, and say that micro-batches are smaller now."""
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    norms = norms_over_batches(run.model)
    note = f" {norms[0]} computes its statistics over the smaller ones." if norms else ""
    run.emit_event(
        "out_of_memory",
        f"Out of memory in step {run.progress.step + 1}: each micro-batch is taken in {parts} "
        f"parts from now on, which gives the same step.{note}",
        parts=parts,
    )


def norms_over_batches(model: nn.Module) -> list[str]:
    """Modules whose answer for a sample depends on the others of its micro-batch."""
    return [name for name, module in model.named_modules() if isinstance(module, _NORMS)]
