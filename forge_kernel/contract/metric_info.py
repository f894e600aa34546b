"""What a metric is: its unit, direction and digits, as the plugin that logs it declares them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

Goal = Literal["max", "min"]
VALIDATION: Final = "validation_"
ABSENT: Final = "–"
_UNITS: Final = {"1/s": "/s", "s": " s", "%": " %"}
_SIZES: Final = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric's declaration. Terminal, report and reference read it; nobody else needs one.

    Args:
        name: as it is logged, without `validation_`; `*` stands for what only the run knows.
        unit: what it counts: `share` (of 1), `%`, `bits`, `bytes`, `s`, `1/s`; empty: none.
        goal: whether more or less of it is better; None: neither.
        digits: significant ones that a reader needs.
        title: how a reader calls it; empty: by its name.
        section: the heading that it stands under where there are many.
    """

    name: str
    unit: str = ""
    goal: Goal | None = None
    digits: int = 5
    title: str = ""
    section: str = ""

    def number(self, value: float | None, *, grouped: bool = True) -> str:
        """A value with its digits and, where it does not go without saying, its unit.

        A dash for what was not measured. A whole number is shown in full.

        Args:
            value: of the metric.
            grouped: with commas between thousands, for people; a program has more use for none.
        """
        if value is None or not math.isfinite(value):
            return ABSENT
        if self.unit == "bytes":
            power = min(len(_SIZES) - 1, int(math.log10(value)) // 3) if value >= 1 else 0
            return f"{value / 1000**power:.3g} {_SIZES[power]}"
        if value == math.floor(value) and abs(value) < 1e15:
            text = f"{int(value):,}"
        elif 10**self.digits <= abs(value) < 1e15:
            text = f"{value:,.0f}"
        else:
            text = plain_exponent(f"{value:,.{self.digits}g}")
        if not grouped:
            text = text.replace(",", "")
        return text + _UNITS.get(self.unit, "")

    def to_data(self) -> dict[str, Any]:
        """Plain data; what is at its default is left out."""
        plain = MetricInfo(self.name)
        own = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {key: value for key, value in own if key == "name" or value != getattr(plain, key)}


def plain_exponent(text: str) -> str:
    """`1e-05` as `1e-5`, `1e+06` as `1e6`."""
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else text


KERNEL_METRICS: Final = (
    MetricInfo("loss", goal="min"),
    MetricInfo("learning_rate", title="Learning rate"),
    MetricInfo("grad_norm", title="Gradient norm"),
    MetricInfo("skipped_steps", title="Steps without an update"),
    MetricInfo("loss_scale", title="Loss scale"),
)
"""Of every run."""


class MetricInfos:
    """The declarations that hold in a run.

    Args:
        declared: of the plugins, beside the kernel's; of several with one name the first counts.
    """

    def __init__(self, declared: Iterable[MetricInfo] = ()) -> None:
        self._exact: dict[str, MetricInfo] = {}
        self._patterns: list[MetricInfo] = []
        for info in (*KERNEL_METRICS, *declared):
            if "*" in info.name:
                self._patterns.append(info)
            else:
                self._exact.setdefault(info.name, info)

    @classmethod
    def from_data(cls, data: Any) -> MetricInfos:
        """From what `to_data` gave; what is no declaration is passed over."""
        known = MetricInfo.__slots__
        entries = data if isinstance(data, list) else []
        return cls(
            MetricInfo(**{key: value for key, value in entry.items() if key in known})
            for entry in entries
            if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
        )

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data, for a run's files."""
        return [info.to_data() for info in (*self._exact.values(), *self._patterns)]

    def declares(self, name: str) -> bool:
        """Whether a metric was declared by anybody."""
        return self._declared(name) is not None

    def of(self, name: str) -> MetricInfo:
        """A metric's declaration, or a plain one; `validation_` and a part's name are passed over.

        Args:
            name: as it stands in the log: `validation_accuracy`, `quantization_error/layer1`.
        """
        return self._declared(name) or MetricInfo(name)

    def that_matter(self, names: Iterable[str]) -> list[str]:
        """The metrics of which more, or less, is better: a validation's first, then by direction.

        Args:
            names: as they stand in the log.
        """
        goals = {name: self.of(name).goal for name in names if name != "skipped_steps"}

        def rank(name: str) -> tuple[bool, bool]:
            return not name.startswith(VALIDATION), goals[name] == "min"

        return sorted((name for name, goal in goals.items() if goal is not None), key=rank)

    def _declared(self, name: str) -> MetricInfo | None:
        bare = name.removeprefix(VALIDATION)
        for candidate in dict.fromkeys((name, bare, bare.partition("/")[0])):
            result = self._exact.get(candidate)
            if result is None:
                fits = (info for info in self._patterns if fnmatchcase(candidate, info.name))
                result = next(fits, None)
            if result is not None:
                return result
        return None
