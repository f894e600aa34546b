"""What the answer to each hook has to be.

Answers that are given once or now and then are looked at when they are given. Those of a step are
looked at when something has failed: a good step pays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from forge_kernel.contract.values import ScheduleFactors

_SHOWN: Final = 40  # characters of a value
_DEPTH: Final = 10_000  # parts of an answer that are looked at


def shown(answer: Any) -> str:
    """What an answer is, in a few words."""
    name = type(answer).__name__
    shape, dtype = getattr(answer, "shape", None), getattr(answer, "dtype", None)
    if isinstance(answer, type):
        return f"the class {answer.__name__} (not an instance of it)"
    if shape is not None and dtype is not None:
        return f"a {name} of {str(dtype).removeprefix('torch.')} in the shape {tuple(shape)}"
    if isinstance(answer, list | tuple):
        inside = ", ".join(type(part).__name__ for part in answer[:3])
        return f"a {name} of {len(answer)} ({inside or 'nothing'})"
    if answer is None or isinstance(answer, str | float | bool):
        text = repr(answer)
        return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} ({name})"
    return f"a {name}"


def wrong_answer(hook: str, answer: Any) -> str | None:
    """What a plugin should have given in a hook; None: the answer can be used.

    Args:
        hook: one that is answered.
        answer: what was given.
    """
    fits, wanted = _WANTED[hook]
    try:
        good = fits(answer)
    except Exception:  # noqa: BLE001  an answer may be any object, with any attributes
        good = False
    return None if good else wanted


def has_all(answer: Any, names: Sequence[str]) -> bool:
    """Whether an object, which is no class, has methods and attributes of these names."""
    return not isinstance(answer, type) and all(hasattr(answer, name) for name in names)


def _is_module(answer: Any) -> bool:
    from torch import nn

    return isinstance(answer, nn.Module)


def _is_data(answer: Any) -> bool:
    if not has_all(answer, ("spec", "batches", "validation", "batches_per_epoch")):
        return False
    count = answer.batches_per_epoch
    countable = count is None or (isinstance(count, int) and count >= 0)
    return countable and callable(answer.batches) and callable(answer.validation)


def _are_modules(answer: Any) -> bool:
    if answer is None:
        return True
    if not isinstance(answer, Mapping):
        return False
    return all(isinstance(name, str) and _is_module(part) for name, part in answer.items())


def _is_optimizer(answer: Any) -> bool:
    if not has_all(answer, ("param_groups", "state", "step", "state_dict", "load_state_dict")):
        return False
    return all(_is_factor(group["lr"]) for group in answer.param_groups)


def _are_metrics(answer: Any) -> bool:
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return False
    return all(has_all(part, ("reset", "update", "compute")) for part in answer)


def _is_phase(answer: Any) -> bool:
    return answer is None or isinstance(answer, str)


def _are_outputs(answer: Any) -> bool:
    """None (the loss runs the model itself), or something that holds a tensor."""
    from torch import Tensor

    if answer is None:
        return True
    todo: list[Any] = [answer]
    for _ in range(_DEPTH):
        if not todo:
            return False
        value = todo.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, Mapping):
            todo += list(value.values())
        elif isinstance(value, list | tuple):
            todo += list(value)
        elif not isinstance(value, type):
            todo += list(getattr(value, "__dict__", {}).values())
    return False


def _is_loss(answer: Any) -> bool:
    from torch import Tensor

    from forge_kernel.contract.counting import loss_terms

    terms = loss_terms(answer)
    values = [term.values for term in terms]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return False
    parts = [part for term in terms for part in (term.scale, term.weight) if part is not None]
    if not all(isinstance(part, Tensor) or _is_number(part) for part in parts):
        return False
    scales = [term.scale for term in terms if isinstance(term.scale, Tensor)]
    return any(value.requires_grad for value in [*values, *scales])


def _are_weights(answer: Any) -> bool:
    from torch import Tensor

    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return False
    return all(
        part.numel() == 1 if isinstance(part, Tensor) and not part.is_cpu else _is_factor(part)
        for part in answer
    )


def _is_term(answer: Any) -> bool:
    from torch import Tensor

    if answer is None:
        return True
    usable = isinstance(answer, Tensor) and answer.numel() == 1 and answer.is_floating_point()
    return usable and math.isfinite(float(answer))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_factor(value: Any) -> bool:
    return math.isfinite(float(value)) and float(value) >= 0 and not isinstance(value, str)


def _are_factors(answer: Any) -> bool:
    if not isinstance(answer, ScheduleFactors):
        return False
    parts = [answer.learning_rate]
    parts += [part for part in (answer.momentum, answer.weight_decay) if part is not None]
    each = [value for part in parts for value in (part if isinstance(part, tuple) else (part,))]
    return all(_is_factor(value) for value in each)


def _are_logged(answer: Any) -> bool:
    from torch import Tensor

    if not isinstance(answer, Mapping):
        return False
    return all(
        isinstance(name, str)
        and (
            value is None or (value.numel() == 1 if isinstance(value, Tensor) else _converts(value))
        )
        for name, value in answer.items()
    )


def _converts(value: Any) -> bool:
    """Whether it is a number, not finite ones too: they are shown as not measured."""
    return not isinstance(value, str | bytes) and isinstance(float(value), float)


def are_metrics_of_validation(answer: Any) -> bool:
    """Whether what a metric computed is numbers by name."""
    if not isinstance(answer, Mapping):
        return False
    return all(isinstance(name, str) and _converts(value) for name, value in answer.items())


def _is_reason(answer: Any) -> bool:
    return answer is None or isinstance(answer, str)


def _is_manifest(answer: Any) -> bool:
    return isinstance(answer, Mapping) and all(isinstance(name, str) for name in answer)


_MODULE: Final = (_is_module, "a torch.nn.Module (an instance)")
_DATA: Final = (_is_data, "an object with spec, batches_per_epoch (a count or None), batches() and "
                "validation(), such as TensorData")  # fmt: skip
_WANTED: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "make_data": _DATA,
    "transform_data": (_is_data, f"the data that it was given, or other data: {_DATA[1]}"),
    "make_model": _MODULE,
    "make_modules": (_are_modules, "a mapping of names to torch.nn.Module"),
    "transform_model": (_is_module, f"the model that it was given, changed or not: {_MODULE[1]}"),
    "make_optimizer": (
        _is_optimizer,
        "a torch.optim.Optimizer whose groups have a finite lr of at least 0",
    ),
    "make_metrics": (_are_metrics, "a list of metrics: objects with reset, update and compute"),
    "compute_phase": (_is_phase, "the phase's name or None"),
    "compute_outputs": (
        _are_outputs,
        "what the loss reads: a tensor, or something that holds tensors",
    ),
    "compute_loss": (
        _is_loss,
        "a tensor of values (one for each target or sample), their mean as a 0-d tensor, a "
        "LossTerm, or a list of them, in floating point, through which gradients flow",
    ),
    "compute_loss_weights": (
        _are_weights,
        "a list of finite numbers of at least 0, one for each term of the loss; empty for one term",
    ),
    "regularize": (_is_term, "a finite 0-d tensor of floating point, or None"),
    "compute_schedule_factors": (
        _are_factors,
        "ScheduleFactors of finite numbers of at least 0, one for all groups or a tuple of one "
        "for each",
    ),
    "compute_evaluation_model": _MODULE,
    "unfinished": (_is_reason, "the reason as a string, or None"),
    "log_metrics": (_are_logged, "a mapping of names to numbers, 0-d tensors or None"),
    "check_export": (_is_reason, "the reason as a string, or None"),
    "export": (_is_manifest, "a mapping of names to what was written (the manifest)"),
}

IN_A_STEP: Final = frozenset(
    {
        "compute_phase", "compute_outputs", "compute_loss", "compute_loss_weights", "regularize",
        "compute_schedule_factors",
    }
)  # fmt: skip
"""Hooks that each step asks; their answers are looked at when something has failed."""

ANSWERED: Final = frozenset(_WANTED)
"""All hooks whose answer is used."""
