"""One setting that a sweep varies: `key=a,b,c`, or `key=low..high` to draw from."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Final

from forge_kernel.errors import ConfigError, Fault, Mark

_NUMBER: Final = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE: Final = re.compile(rf"(log:)?\s*({_NUMBER})\s*\.\.\s*({_NUMBER})")
_DIGITS: Final = 4  # significant, of a number that is drawn: it is read and repeated by people


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Args:
        low: the least.
        high: the largest.
        whole: whole numbers only.
        log: drawn by the logarithm, as rates are.
    """

    low: float
    high: float
    whole: bool
    log: bool

    def drawn(self, draws: random.Random) -> str:
        """A number as a setting has it."""
        if self.log:
            value = math.exp(draws.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = draws.uniform(self.low, self.high)
        return self.shown(value)

    def shown(self, value: float) -> str:
        """A number as a setting has it, inside the range."""
        inside = min(max(value, self.low), self.high)
        return str(round(inside)) if self.whole else f"{inside:.{_DIGITS}g}"


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting and what it is given, one after the other.

    Args:
        key: such as `optimizer.with.lr`.
        values: as text; of one value, all runs have it. Empty for a range.
        span: what is drawn from, for `--random` and `--optuna`.
    """

    key: str
    values: tuple[str, ...] = ()
    span: Range | None = None

    @property
    def varies(self) -> bool:
        """Whether runs differ in it."""
        return self.span is not None or len(self.values) > 1

    def drawn(self, draws: random.Random) -> str:
        """One value, drawn."""
        return draws.choice(self.values) if self.span is None else self.span.drawn(draws)


def parse_axis(text: str) -> Axis:
    """Read `key=value,value` or `key=low..high`; a comma in brackets or quotes belongs to a value.

    Raises:
        ConfigError: it has another form.
    """
    key, equals, given = text.partition("=")
    source = Mark(f"--set {text}")
    if not equals or not key.strip():
        hint = "write key=value, key=value,value,... or key=low..high"
        raise ConfigError([Fault("a setting of a sweep has a key and values", "", source, (hint,))])
    match = _RANGE.fullmatch(given.strip())
    if match is not None:
        return Axis(key.strip(), span=_range(match, source))
    values = tuple(value.strip() for value in _split(given))
    if not all(values):
        raise ConfigError([Fault("one of the values is empty", key.strip(), source)])
    if len(set(values)) < len(values):
        raise ConfigError([Fault("one of the values is there twice", key.strip(), source)])
    return Axis(key.strip(), values)


def _range(match: re.Match[str], source: Mark) -> Range:
    low, high = float(match[2]), float(match[3])
    log = match[1] is not None
    if not low < high or (log and low <= 0):
        why = "log: takes numbers above 0" if log and low <= 0 else "the first number is the lower"
        raise ConfigError([Fault(f"this is no range: {why}", mark=source)])
    whole = all(re.fullmatch(r"[+-]?\d+", part) for part in (match[2], match[3]))
    return Range(low, high, whole, log)


def _split(text: str) -> list[str]:
    """The values between commas that stand in no bracket and no quotes."""
    result, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == "," and not depth:
            result.append("")
            continue
        result[-1] += sign
    return result


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0-4` or `0,1,7`.

    Raises:
        ConfigError: it has another form, or a seed is there twice.
    """
    result: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        last = int(match[2] or match[1]) if match is not None else -1
        if match is None or last < int(match[1]) or last - int(match[1]) > 9999:
            message = f"'{text}' is no list of seeds"
            raise ConfigError([Fault(message, mark=Mark("--seeds"), hints=("0-4, or 0,1,7",))])
        result.extend(range(int(match[1]), last + 1))
    if len(set(result)) < len(result):
        raise ConfigError([Fault("a seed is there twice", mark=Mark("--seeds"))])
    return tuple(result)
