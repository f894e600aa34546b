"""How named columns become numbers: scaled, words as one-hot, gaps filled; fitted once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.formats import errors
    from forge_plugins.formats.frame import Frame
else:
    np = LazyModule("numpy")
    errors = LazyModule("forge_plugins.formats.errors")

FORMAT: Final = 1
"""Of the kept JSON."""


@dataclass(frozen=True)
class InputColumn:
    """What a column becomes.

    Args:
        name: in the file.
        words: the kinds of a column of words, each a number that is 1 where it stands; empty for
            numbers.
        shape: of a row.
        mean: what is taken off, one number or one for each of a row.
        scale: what is then divided by.
        fill: what stands for a number that is missing.
    """

    name: str
    words: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    fill: float = 0.0

    @property
    def width(self) -> int:
        """Numbers that a record has of it."""
        return len(self.words) or int(np.prod(self.shape, dtype=np.int64))

    def numbers(self, frame: Frame, rows: slice) -> Any:
        """Of some records, float32, shape (records, width); of several axes, (records, ...).

        Raises:
            DataError: the file has words where numbers were, or rows of another shape.
        """
        about, column = frame.need(self.name), np.asarray(frame.columns[self.name][rows])
        if self.words:
            return self._one_hot(about, column)
        if about["kind"] == "text":
            raise not_numbers(frame, self.name, about)
        if column.shape[1:] != self.shape:
            message = f"has rows of the shape {list(column.shape[1:])}, not {list(self.shape)}"
            hint = "give the columns that the run was trained on"
            raise errors.DataError(frame.file, message, field=self.name, hint=hint)
        numbers = column.astype(np.float64)
        if about["missing"]:
            numbers[np.isnan(numbers)] = self.fill
        numbers = (numbers - np.asarray(self.mean)) / np.asarray(self.scale)
        return numbers.astype(np.float32).reshape(len(column), *(self.shape or (1,)))

    def _one_hot(self, about: Mapping[str, Any], column: Any) -> Any:
        """What training never saw, and what is missing, is none of the kinds."""
        places = {word: at for at, word in enumerate(self.words)}
        if about["kind"] == "text":
            known = [places.get(word, -1) for word in about["values"]]
            hits = np.array([*known, -1], np.int64)[column]
        else:
            words = _words_of(about, column)
            hits = np.array([places.get(str(word), -1) for word in words], np.int64)
        result = np.zeros((len(column), len(self.words)), np.float32)
        rows = np.flatnonzero(hits >= 0)
        result[rows, hits[rows]] = 1.0
        return result

    def unknown(self, frame: Frame) -> list[str]:
        """The words of a file that training never saw."""
        about = frame.need(self.name)
        if not self.words:
            return []
        there = _words_of(about, np.asarray(frame.columns[self.name][:]))
        return sorted({word for word in there if word is not None} - {*self.words})


@dataclass(frozen=True)
class TargetColumn:
    """What the target becomes.

    Args:
        name: in the file.
        labels: names of the classes by number; empty for numbers.
        mean: what is taken off a number.
        scale: what it is then divided by.
    """

    name: str
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    def numbers(self, frame: Frame, rows: Any) -> Any:
        """Of some records: labels, int64, shape (records,), or float32, shape (records, 1).

        Raises:
            DataError: a label is none of those known, or there is no target.
        """
        about, column = frame.need(self.name), np.asarray(frame.columns[self.name][:])[rows]
        if not self.labels:
            if about["kind"] == "text":
                raise not_numbers(frame, self.name, about)
            result = (column.astype(np.float64).reshape(len(column), -1) - self.mean) / self.scale
            _whole(frame, self.name, np.isnan(result).any(axis=1), rows)
            return result.astype(np.float32)
        places = {label: at for at, label in enumerate(self.labels)}
        words = _words_of(about, column)
        _whole(frame, self.name, np.array([word is None for word in words], np.bool_), rows)
        result = np.array([places.get(str(word), -1) for word in words], np.int64)
        wrong = np.flatnonzero(result < 0)
        if len(wrong):
            at = int(wrong[0])
            message = f"holds the label '{words[at]}', and the run knows {shown(self.labels)}"
            hint = "leave such records out, or train with them"
            raise errors.DataError(
                frame.file, message, record=_record(rows, at), field=self.name, hint=hint
            )
        return result


def _record(rows: Any, at: int) -> int:
    return int(rows.start or 0) + at if isinstance(rows, slice) else int(rows[at])


def _whole(frame: Frame, name: str, missing: Any, rows: Any) -> None:
    """Whether each record has a target.

    Raises:
        DataError: one has none.
    """
    gaps = np.flatnonzero(missing)
    if len(gaps):
        hint = "write one, or set missing: leave_out"
        raise errors.DataError(
            frame.file, "is missing in a record", record=_record(rows, int(gaps[0])), field=name,
            hint=hint,
        )  # fmt: skip


def _words_of(about: Mapping[str, Any], column: Any) -> list[str | None]:
    """The words of cells; whole numbers as they are written without a point."""
    if about["kind"] in ("text", "boolean"):
        values = about["values"]
        return [
            values[int(code)] if code == code and 0 <= code < len(values) else None  # noqa: PLR0124  NaN
            for code in column.reshape(len(column)).tolist()
        ]
    return [
        None if value != value else str(int(value)) if value == int(value) else repr(value)  # noqa: PLR0124  NaN
        for value in column.reshape(len(column)).tolist()
    ]


def words_of(frame: Frame, name: str) -> list[str | None]:
    """The words of a whole column; None where there is none."""
    return _words_of(frame.need(name), np.asarray(frame.columns[name][:]))


def shown(names: tuple[str, ...]) -> str:
    """A few names."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{list(names[:8])}{more}"


def not_numbers(frame: Frame, name: str, about: Mapping[str, Any]) -> Exception:
    """What to say of words where numbers are asked."""
    if "stray" in about:
        message, record = f"holds '{about['stray_value']}' among numbers", int(about["stray"])
    else:
        column = np.asarray(frame.columns[name][:])
        record = int(np.flatnonzero(column >= 0)[0]) if column.dtype.kind == "i" else 0
        words = about.get("values") or ["words"]
        message = f"holds words, as '{words[int(column[record])]}', where numbers are asked"
    hint = "write numbers, and leave the cell empty where there is none"
    return errors.DataError(frame.file, message, record=record, field=name, hint=hint)


@dataclass(frozen=True)
class Preparation:
    """What a file's columns become; kept with the run, so that all that use it read files alike.

    Args:
        inputs: in their order.
        target: None where none is asked for.
    """

    inputs: tuple[InputColumn, ...]
    target: TargetColumn | None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes by number."""
        return self.target.labels or None if self.target is not None else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a record's input."""
        if len(self.inputs) == 1 and self.inputs[0].shape:
            return self.inputs[0].shape
        return (sum(column.width for column in self.inputs),)

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Preparation:
        """From what `to_data` gave.

        Raises:
            ValueError: it is of another form.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"its form is {data.get('format')}, and {FORMAT} is known")
        inputs = tuple(
            InputColumn(
                str(column["name"]), tuple(column["words"]), tuple(column["shape"]),
                tuple(column["mean"]), tuple(column["scale"]), float(column["fill"]),
            )
            for column in data["inputs"]
        )  # fmt: skip
        target = data["target"]
        if target is None:
            return cls(inputs, None)
        labels = tuple(target["labels"])
        mean, scale = float(target["mean"]), float(target["scale"])
        return cls(inputs, TargetColumn(str(target["name"]), labels, mean, scale))

    @property
    def digest(self) -> str:
        """Of all of it."""
        text = json.dumps(self.to_data(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def inputs_of(self, frame: Frame, rows: slice) -> Any:
        """Records as the model reads them, float32, shape (records, *shape)."""
        parts = [column.numbers(frame, rows) for column in self.inputs]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def unscaled(self, values: Any) -> Any:
        """Numbers that a model predicts, in the target's own unit."""
        if self.target is None or self.target.labels:
            return values
        return values * self.target.scale + self.target.mean
