"""Layers of a student that are compared with a teacher's: outputs, and relations of attention."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import Batch, LazyModule, PluginError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from forge_plugins.mathematics.losses import attention_relations
    from forge_plugins.mathematics.losses import distillation as mathematics
else:
    torch = LazyModule("torch")
    attention_relations = LazyModule("forge_plugins.mathematics.losses.attention_relations")
    mathematics = LazyModule("forge_plugins.mathematics.losses.distillation")

RELATED: Final = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"), ("q", "k", "v"),
)  # fmt: skip
"""Names of the layers that make queries, keys and values, in the libraries' attention layers."""


class ComparedLayers:
    """What some layers of both models gave in the last forward pass.

    Args:
        hidden: names of layers whose outputs are compared; glob patterns.
        relations: names of attention layers; glob patterns.
        heads: parts of equal width that are related each by itself.
    """

    def __init__(self, hidden: tuple[str, ...], relations: tuple[str, ...], heads: int) -> None:
        self._hidden, self._attention, self._heads = hidden, relations, heads
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._related: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def watch(self, student: nn.Module, teacher: nn.Module) -> None:
        """Keep what the layers give from now on.

        Raises:
            PluginError: a pattern names no layer, or one that has no queries, keys and values.
        """
        for place, model in enumerate((student, teacher)):
            for pattern in self._hidden:
                self._watch(model, pattern, self._seen[place])
            for pattern in self._attention:
                self._relate(model, pattern, self._related[place])

    @staticmethod
    def _watch(model: nn.Module, pattern: str, seen: dict[str, Tensor]) -> None:
        names = [name for name, _ in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise PluginError(
                f"distillation: no layer '{pattern}' in {type(model).__name__}; it has "
                f"{', '.join(name for name, _ in model.named_children())}"
            )
        for name in names:
            model.get_submodule(name).register_forward_hook(_keeping(seen, name))

    @staticmethod
    def _relate(model: nn.Module, pattern: str, seen: dict[str, Tensor]) -> None:
        """Keep what the queries, keys and values of some layers are."""
        modules = dict(model.named_modules())
        names = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise PluginError(
                f"distillation: no layer '{pattern}' (relations) in {type(model).__name__}"
            )
        for name in names:
            children = dict(modules[name].named_children())
            parts = next((one for one in RELATED if all(part in children for part in one)), None)
            if parts is None:
                raise PluginError(
                    f"distillation: {name} (relations) of {type(model).__name__} has no layers of "
                    f"its own for queries, keys and values ({', '.join(RELATED[0])}); it has "
                    f"{', '.join(children) or 'none'}"
                )
            for place, part in enumerate(parts):
                children[part].register_forward_hook(_keeping(seen, f"{name} {place}"))

    def distances(self, batch: Batch) -> Tensor:
        """Mean over layers of `|s - t|^2 / |t|^2` of each target's row, or of each sample."""
        student, teacher = self._seen
        if student.keys() != teacher.keys():
            raise PluginError(
                "distillation: hidden layers of only one of the models: "
                f"{sorted(student.keys() ^ teacher.keys())}"
            )
        parts = []
        for name, own in student.items():
            other = teacher[name]
            if own.shape != other.shape:
                raise PluginError(
                    f"distillation: {name} has outputs of shape {tuple(own.shape)}, and "
                    f"{tuple(other.shape)} in the teacher"
                )
            parts.append(mathematics.row_distances(own, other, batch.targets, batch.positions))
        student.clear()
        teacher.clear()
        return _mean_of(parts)

    def relations(self, batch: Batch) -> Tensor:
        """Mean over layers of the divergence of each target's row, or of each sample.

        Raises:
            PluginError: a layer is of one model alone, or the widths cannot be cut.
        """
        student, teacher = self._related
        if student.keys() != teacher.keys():
            names = sorted({key.partition(" ")[0] for key in student.keys() ^ teacher.keys()})
            raise PluginError(f"distillation: relations of only one of the models: {names}")
        segments = _segments(batch)
        parts = []
        for name in dict.fromkeys(key.partition(" ")[0] for key in student):
            own, other = (
                [seen[f"{name} {place}"] for place in range(3)] for seen in (student, teacher)
            )
            try:
                rows = attention_relations.relation_divergences(own, other, self._heads, segments)
            except ValueError as error:
                raise PluginError(
                    f"distillation: relations of {name}: {error} (loss.with.relation_heads)"
                ) from error
            parts.append(_at_rows(rows, batch))
        student.clear()
        teacher.clear()
        return _mean_of(parts)


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        seen[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _mean_of(parts: list[Tensor]) -> Tensor:
    """The mean over layers; a sample's value is that of its rows."""
    if len({len(part) for part in parts}) > 1:
        rows = max(len(part) for part in parts)
        parts = [part.repeat_interleave(rows // len(part)) for part in parts]
    return torch.stack(parts).mean(0)


def _at_rows(rows: Tensor, batch: Batch) -> Tensor:
    """Values at the targets, shape (targets,), or a mean for each sample where rows have none."""
    shape = batch.targets.shape if isinstance(batch.targets, torch.Tensor) else ()
    if len(shape) == 2 and rows.shape[1] != shape[1] and batch.positions is not None:
        rows = rows[:, batch.positions]
    return rows.flatten() if rows.shape == shape else rows.mean(1)


def _segments(batch: Batch) -> Tensor | None:
    """Which of several packed sequences each place is of, where a batch says so."""
    positions = batch.inputs.get("position_ids") if isinstance(batch.inputs, Mapping) else None
    return None if positions is None else attention_relations.segments_of(positions)
